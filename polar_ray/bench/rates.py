"""What bare products and copies reach on a device: the rates that a model's own are fractions of."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from polar_ray.engines.torch.decoder import CHUNK_TOKENS
from polar_ray.engines.torch.engine import DTYPES
from polar_ray.engines.torch.linear import Linear, PlainLinear, linear_kind
from polar_ray.engines.torch.quantized import Int8Linear
from polar_ray.model.architecture import CheckpointConfig

CPU_TOKENS, CPU_REPEATS = 512, 40
"""Rows of the products of `product_rate`, and how often they are done for one measurement: about half a second."""

PRODUCT_REPEATS, COPY_REPEATS = 50, 20
"""Of one measurement of a rate: on an H200 about 50 ms each."""

COPY_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}


@torch.inference_mode()
def product_rate(config: CheckpointConfig, arithmetic: str) -> float:
    """Floating point operations per CPU second of products in the gate's shape, by the fastest kind there is for
    `arithmetic`: `float32`, `bfloat16` or `int8`, whose roundings of activations are among it."""
    dtype = DTYPES.get(arithmetic, torch.float32)
    x = torch.randn(CPU_TOKENS, config.hidden_size).to(dtype)
    weight = torch.randn(config.intermediate_size, config.hidden_size).to(dtype)
    kinds: set[type[Linear]] = {Int8Linear} if arithmetic == "int8" else {PlainLinear, linear_kind(dtype, x.device)}
    return max(_rate(kind(weight), x, len(weight)) for kind in kinds)


def _rate(product: Linear, x: torch.Tensor, width: int) -> float:
    product(x)
    before = time.process_time()
    for _ in range(CPU_REPEATS):
        product(x)
    return CPU_REPEATS * 2 * x.numel() * width / (time.process_time() - before)


@torch.inference_mode()
def matmul_rate(config: CheckpointConfig, device: torch.device) -> float:
    """Floating point operations per second of bare bfloat16 products with the feed-forward's weights, the faster."""
    rates = []
    rows = CHUNK_TOKENS[device.type]
    for out, into in (
        (config.intermediate_size, config.hidden_size),
        (config.hidden_size, config.intermediate_size),
    ):
        x = torch.randn(rows, into, device=device).bfloat16()
        weight = torch.randn(out, into, device=device).bfloat16()
        taken = seconds_of(partial(_repeat, PRODUCT_REPEATS, F.linear, x, weight), device)
        rates.append(PRODUCT_REPEATS * 2 * rows * into * out / taken)
    return max(rates)


def copy_rate(device: torch.device) -> float:
    """Bytes per second, read and written, of large copies."""
    source = torch.zeros(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    taken = seconds_of(partial(_repeat, COPY_REPEATS, target.copy_, source), device)
    return COPY_REPEATS * 2 * source.nbytes / taken


def _repeat(times: int, function: Callable[..., object], *arguments: object) -> None:
    for _ in range(times):
        function(*arguments)


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Of one run, from idle device to idle device."""
    wait_for(device)
    started = time.perf_counter()
    run()
    wait_for(device)
    return time.perf_counter() - started


def wait_for(device: torch.device) -> None:
    """Until a GPU is idle; a CPU is when a call returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
