"""What bare matrix products reach on this CPU: the rate that a model's own is a fraction of."""

from __future__ import annotations

import time

import torch

from polar_ray.engines.torch.engine import DTYPES
from polar_ray.engines.torch.linear import Linear, PlainLinear, linear_kind
from polar_ray.engines.torch.quantized import Int8Linear
from polar_ray.model.architecture import CheckpointConfig

TOKENS, REPEATS = 512, 40
"""Rows of the products, and how often they are done for one measurement: about half a second."""


@torch.inference_mode()
def product_rate(config: CheckpointConfig, arithmetic: str) -> float:
    """Floating point operations per CPU second of products in the gate's shape, by the fastest kind there is for
    `arithmetic`: `float32`, `bfloat16` or `int8`, whose roundings of activations are among it."""
    dtype = DTYPES.get(arithmetic, torch.float32)
    x = torch.randn(TOKENS, config.hidden_size).to(dtype)
    weight = torch.randn(config.intermediate_size, config.hidden_size).to(dtype)
    kinds: set[type[Linear]] = {Int8Linear} if arithmetic == "int8" else {PlainLinear, linear_kind(dtype, x.device)}
    return max(_rate(kind(weight), x, len(weight)) for kind in kinds)


def _rate(product: Linear, x: torch.Tensor, width: int) -> float:
    product(x)
    before = time.process_time()
    for _ in range(REPEATS):
        product(x)
    return REPEATS * 2 * x.numel() * width / (time.process_time() - before)
