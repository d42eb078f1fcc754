"""Matrix products with weights: oneDNN's packed ones where they work, torch's own everywhere else.

oneDNN packs a weight once into the layout that its kernels read. On AMD processors this is worth a factor of two in
float32, where torch's own path ends in MKL's slow branch (`gemm_flops_per_cpu_s` of the two kinds in
`jobs/bench/results/engine_small_fp32_cpu2_2026-11.json`). The operators are private to torch, so they are tried on a
small product first and left alone if they are absent or wrong.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

TOKENS_HINT = 512
"""Rows that oneDNN lays weights out for; the engine's chunks have as many."""


class Linear(ABC):
    """`x [T, in] -> [T, out]` with a weight `[out, in]` and no bias."""

    @abstractmethod
    def __init__(self, weight: Tensor) -> None: ...

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor: ...

    def both(self, other: Self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`self(x), other(x)`; what has to be made of `x` for a product is made once."""
        return self(x), other(x)

    def gated(self, up: Self, x: Tensor) -> Tensor:
        """`silu(self(x)) * up(x)`, as `both`."""
        gate, factor = self.both(up, x)
        return F.silu(gate, inplace=True).mul_(factor)


class PlainLinear(Linear):
    def __init__(self, weight: Tensor) -> None:
        self._weight = weight.contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight)


class PackedLinear(Linear):
    def __init__(self, weight: Tensor) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), TOKENS_HINT)

    def __call__(self, x: Tensor) -> Tensor:
        return onednn_product(x, self._weight)

    def gated(self, up: Self, x: Tensor) -> Tensor:
        return onednn_product(x, self._weight, "swish").mul_(up(x))


def onednn_product(x: Tensor, weight: Tensor, activation: str = "none") -> Tensor:
    """`x [M, in] @ weight.T`, the weight `[out, in]` packed or plain; the activation works on unrounded sums."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, activation, [], "")
    return product


def linear_kind(dtype: torch.dtype, device: torch.device) -> type[Linear]:
    """The fastest kind that is right for this dtype on this device."""
    return PackedLinear if onednn_works(dtype, device.type) else PlainLinear


@functools.cache
def onednn_works(dtype: torch.dtype, device_type: str) -> bool:
    """Whether oneDNN's operators are there and agree with float64 to the dtype's rounding."""
    if device_type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(33, 64, generator=generator).to(dtype)
    weight = torch.randn(48, 64, generator=generator).to(dtype)
    expected = x.double() @ weight.double().T
    try:
        packed = PackedLinear(weight)
        found = [packed(x), onednn_product(x, weight), onednn_product(x, packed._weight, "swish")]
    except (AttributeError, RuntimeError):
        return False
    tolerance = 1e-4 if dtype == torch.float32 else 0.1  # sums near 8, spread over a few dozen roundings
    wanted = [expected, expected, F.silu(expected)]
    return all(float((a.double() - b).abs().max()) < tolerance for a, b in zip(found, wanted, strict=True))
