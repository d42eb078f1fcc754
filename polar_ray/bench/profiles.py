"""Where the time of a run goes, by torch's own account."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from polar_ray.bench.rates import wait_for

MOST_KERNELS = 25


@dataclass(frozen=True)
class KernelTime:
    """A kernel, or on a CPU an operator of torch without those it calls, over one run."""

    name: str
    calls: int
    seconds: float
    share: float
    """Of all of them."""


def kernel_times(run: Callable[[], object], device: torch.device) -> list[KernelTime]:
    """What the device computed in one run, the most first; nothing where torch computes in another process."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        run()
        wait_for(device)
    times = [
        (event.self_device_time_total if on_gpu else event.self_cpu_time_total, event)
        for event in profiler.key_averages()
        if event.device_type.name == device.type.upper()
    ]
    total = sum(taken for taken, _ in times)
    most = sorted(times, key=lambda each: -each[0])[:MOST_KERNELS]
    return [KernelTime(event.key, event.count, taken / 1e6, taken / total) for taken, event in most if taken]
