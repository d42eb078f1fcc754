"""Linear layers in 8 bits: weights rounded once, activations as they come, each row of either by its own scale.

Nothing is calibrated, so nothing depends on other rows or on data seen before. Products are summed up in 32 bits and
scaled in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

from polar_ray.engines.torch.linear import TOKENS_HINT, Linear
from polar_ray.errors import EngineStartError

INT8_LARGEST = 127
SAFE_INT8_LARGEST = 64
"""Of weights where products are added up in pairs in 16 bits, which x86 without VNNI instructions does: two products of
255 and 64 still fit (oneDNN's documentation, "Nuances of int8 computations")."""

ZERO_POINT = 128
"""Of activations, which oneDNN wants as unsigned bytes."""

FP8 = torch.float8_e4m3fn
FP8_LARGEST = torch.finfo(FP8).max

SMALLEST_SCALE = 1e-30
"""Of a row of zeros."""

RowsOf = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From activations to rows in 8 bits and their scales."""


class Int8Linear(Linear):
    """On a CPU, by oneDNN. Products are float32 whatever is put in: rounding them to 16 bits would only cost, as what
    follows them, or rounds them for the next product, has vector code for float32 alone."""

    def __init__(self, weight: Tensor) -> None:
        largest = _int8_largest()
        scales = (weight.float().abs().amax(1) / largest).clamp_min_(SMALLEST_SCALE)
        rounded = (weight / scales.unsqueeze(1)).round_().to(torch.int8)
        self._weight = torch.ops.onednn.qlinear_prepack(rounded, [TOKENS_HINT, weight.shape[1]])
        self._scales = scales
        self._zero_points = torch.zeros(len(weight), dtype=torch.int32)

    def __call__(self, x: Tensor) -> Tensor:
        return self._product(*_int8_rows(x))

    def both(self, other: Self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = _int8_rows(x)
        return self._product(*rows), other._product(*rows)

    def _product(self, rounded: Tensor, scales: Tensor) -> Tensor:
        return _int8_product(rounded, self._weight, self._scales, self._zero_points).mul_(scales)


def fp8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows `[M, N]` in float8, and their scales `[M, 1]` in float32."""
    scales = (x.abs().amax(-1, keepdim=True).float() / FP8_LARGEST).clamp_min(SMALLEST_SCALE)
    return (x / scales).to(FP8), scales


class Fp8Linear(Linear):
    """On a GPU, by the matrix units' own float8 products; on a CPU the same numbers, slowly."""

    def __init__(self, weight: Tensor, rows_of: RowsOf = fp8_rows) -> None:
        """`rows_of` does what `fp8_rows` does."""
        self._rows_of = rows_of
        self._weight, self._scales = fp8_rows(weight)
        self._dtype = weight.dtype

    def __call__(self, x: Tensor) -> Tensor:
        return self._product(*self._rows_of(x))

    def both(self, other: Self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = self._rows_of(x)
        return self._product(*rows), other._product(*rows)

    def _product(self, rounded: Tensor, scales: Tensor) -> Tensor:
        product: Tensor = torch._scaled_mm(
            rounded, self._weight.T, scale_a=scales, scale_b=self._scales.T, out_dtype=torch.bfloat16
        )
        return product.to(self._dtype)


def _int8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows `[M, N]` in bytes above `ZERO_POINT`, and their scales `[M, 1]` in float32."""
    x = x.float()
    # Of the ways to the largest magnitude only the two reductions have vector code in torch 2.13; of those to a byte
    # only the signed one has.
    largest = torch.maximum(x.amax(-1, keepdim=True), x.amin(-1, keepdim=True).neg_())
    scales = largest.div_(INT8_LARGEST).clamp_min_(SMALLEST_SCALE)
    return (x * scales.reciprocal()).round_().to(torch.int8).view(torch.uint8).add_(ZERO_POINT), scales


def _int8_product(x: Tensor, weight: Tensor, scales: Tensor, zero_points: Tensor) -> Tensor:
    """float32 `[M, out]` from bytes `[M, in]` above `ZERO_POINT` and a packed weight with scales `[out]`."""
    product: Tensor = torch.ops.onednn.qlinear_pointwise(
        x, 1.0, ZERO_POINT, weight, scales, zero_points, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return product


@functools.cache
def _int8_largest() -> int:
    """The largest weight with which this machine adds up the largest activations rightly. Raises `EngineStartError` if
    it does so with none."""
    n = 64
    for largest in (INT8_LARGEST, SAFE_INT8_LARGEST):
        weight = torch.full((n, n), largest, dtype=torch.int8)
        packed = torch.ops.onednn.qlinear_prepack(weight, [n, n])
        x = torch.full((n, n), ZERO_POINT + INT8_LARGEST, dtype=torch.uint8)
        found = _int8_product(x, packed, torch.ones(n), torch.zeros(n, dtype=torch.int32))
        if bool((found == n * INT8_LARGEST * largest).all()):
            return largest
    raise EngineStartError("this machine's int8 products are wrong; leave engine.quantization out")
