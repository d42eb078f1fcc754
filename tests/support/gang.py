"""Several processes that hold a gloo group together, for tests of what workers do side by side."""

from __future__ import annotations

import importlib
import multiprocessing as mp
import socket
from typing import Any

DEADLINE_S = 120


def run_gang(function: str, workers: int, *arguments: Any) -> list[Any]:
    """`module:name` called as `name(rank, workers, *arguments)` in each of `workers` processes; what they return.

    Raises what the first process to fail raised.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    with context.Pool(workers) as pool:
        calls = [pool.apply_async(_work, (function, rank, workers, port, arguments)) for rank in range(workers)]
        return [call.get(DEADLINE_S) for call in calls]


def _work(function: str, rank: int, workers: int, port: int, arguments: tuple[Any, ...]) -> Any:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers)
    try:
        module, name = function.split(":")
        return getattr(importlib.import_module(module), name)(rank, workers, *arguments)
    finally:
        dist.destroy_process_group()
