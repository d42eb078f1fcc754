"""The steps between a layer's products: norm, rotation, gating and the residual sum.

They compute next to nothing and move as much memory as the products do. torch's own kernels read and write everything
once for each operation; compiled, a step is one kernel, which on a GPU is the difference. On a CPU a chunk stays in the
cache, and nothing is compiled.

Letters: T tokens, H hidden size, G key-value heads, R query heads of each, D head size.
"""

from __future__ import annotations

import functools
import logging
import subprocess
from collections.abc import Callable
from types import FunctionType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from polar_ray.engines.torch.linear import Linear, PlainLinear
from polar_ray.engines.torch.quantized import RowsOf, fp8_rows
from polar_ray.errors import first_line
from polar_ray.model.architecture import CheckpointConfig

logger = logging.getLogger(__name__)

SERIAL_ELEMENTS = 32767
"""torch divides element-wise work on a CPU among threads above this (`GRAIN_SIZE` in aten/src/ATen/TensorIterator.h),
and where one's part ends within a vector it multiplies complex numbers by other instructions, which round otherwise."""

TRIED_ROWS = ((24, 0), (40, 8), (56, 0), (1, 0))
"""Numbers of rows and of others before them. A number that was seen once is a constant to the compiler, a second one
makes it a variable; that rows begin a tensor or lie further behind in it, and a single row, are cases of their own. So
a model's first batch finds everything compiled."""

MAX_DIFFERENCE = 0.03
"""Of two numbers, by one more than their size, that is rounding: the compiled form rounds once, torch's kernels several
times, by a 256th each in bfloat16."""


class Steps(Protocol):
    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm of float32 rows `[T, H]`, rounded once to the products' dtype."""
        ...

    def add_and_norm(self, x: Tensor, product: Tensor, weight: Tensor) -> Tensor:
        """`norm` of `x` after `product` was added to it in place."""
        ...

    def rotate_into(self, out: Tensor, x: Tensor, turn: Tensor) -> None:
        """Heads `[T, G * R * D]` turned by complex numbers `[T, 1, D / 2]`, into `out [T, G, R, D]`.

        A pair that is turned lies side by side.
        """
        ...

    def gated(self, gate: Linear, up: Linear, x: Tensor) -> Tensor:
        """`silu(gate(x)) * up(x)`."""
        ...


class EagerSteps:
    """torch's own kernels. `serial`: no two threads share a step whose bits would tell where they met."""

    def __init__(self, dtype: torch.dtype, epsilon: float, chunk_tokens: int, *, serial: bool = False) -> None:
        self.epsilon = epsilon
        self._dtype = dtype
        self._chunk_tokens = chunk_tokens
        self._serial = serial

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, self.epsilon, self._dtype, self._chunk_tokens)

    def add_and_norm(self, x: Tensor, product: Tensor, weight: Tensor) -> Tensor:
        x += product
        return self.norm(x, weight)

    def rotate_into(self, out: Tensor, x: Tensor, turn: Tensor) -> None:
        rows = max(1, SERIAL_ELEMENTS // (x.shape[1] // 2)) if self._serial else len(x)
        for start in range(0, len(x), rows):
            part = slice(start, start + rows)
            pairs = x[part].float().view(len(x[part]), -1, out.shape[-1] // 2, 2)
            rotated = torch.view_as_real(torch.view_as_complex(pairs) * turn[part])
            out[part] = rotated.view(out[part].shape)

    def gated(self, gate: Linear, up: Linear, x: Tensor) -> Tensor:
        return gate.gated(up, x)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype, chunk_tokens: int) -> Tensor:
    """RMSNorm of float32 rows, rounded once, on a CPU `chunk_tokens` at a time."""
    if x.is_cuda:
        return F.rms_norm(x, x.shape[-1:], weight, epsilon).to(dtype)
    # On a CPU rms_norm is a chain of whole-tensor operations.
    normed = torch.empty(x.shape, dtype=dtype)
    for start in range(0, len(x), chunk_tokens):
        chunk = slice(start, start + chunk_tokens)
        norms = torch.linalg.vector_norm(x[chunk], dim=-1, keepdim=True)
        scale = torch.rsqrt(norms.square_().div_(x.shape[-1]).add_(epsilon))
        torch.mul(x[chunk] * scale, weight, out=normed[chunk])
    return normed


class CompiledSteps:
    """A kernel for each step, in float32 between what it reads and what it writes."""

    def __init__(self, dtype: torch.dtype, epsilon: float) -> None:
        self._dtype = dtype
        self._epsilon = epsilon
        self._compiled = functools.cache(_compile)

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        normed: Tensor = self._compiled(_norm, x.shape[1])(x, weight, self._epsilon, self._dtype)
        return normed

    def add_and_norm(self, x: Tensor, product: Tensor, weight: Tensor) -> Tensor:
        step = self._compiled(_add_and_norm, x.shape[1])
        normed: Tensor = step(x, product, weight, self._epsilon, self._dtype)
        return normed

    def rotate_into(self, out: Tensor, x: Tensor, turn: Tensor) -> None:
        self._compiled(_rotate_into, x.shape[1])(out, x, torch.view_as_real(turn))

    def gated(self, gate: Linear, up: Linear, x: Tensor) -> Tensor:
        products = gate.both(up, x)
        gated: Tensor = self._compiled(_silu_times, products[0].shape[1])(*products)
        return gated


def compiled_if_it_works(
    eager: EagerSteps, config: CheckpointConfig, dtype: torch.dtype, device: torch.device
) -> Steps:
    """Compiled steps that agree with `eager` at this model's widths; `eager` where they do not, or where there is
    nothing to compile with (torch takes triton and a C compiler for it)."""
    compiled = CompiledSteps(dtype, eager.epsilon)
    wrong = _what_is_wrong(lambda: largest_difference(compiled, eager, config, dtype, device))
    if wrong is None:
        return compiled
    logger.warning("The steps between products are not compiled, which makes them slower: %s", wrong)
    return eager


def compiled_fp8_rows_if_they_work(config: CheckpointConfig, dtype: torch.dtype, device: torch.device) -> RowsOf:
    """`fp8_rows` as one kernel for each of this model's widths, or as it is, as `compiled_if_it_works`."""
    kernels = functools.cache(_compile)

    def compiled(x: Tensor) -> tuple[Tensor, Tensor]:
        rows: tuple[Tensor, Tensor] = kernels(fp8_rows, x.shape[1])(x)
        return rows

    wrong = _what_is_wrong(lambda: largest_rms_difference(compiled, fp8_rows, config, dtype, device))
    if wrong is None:
        return compiled
    logger.warning("The rounding of activations to fp8 is not compiled, which makes it slower: %s", wrong)
    return fp8_rows


def _what_is_wrong(try_out: Callable[[], float]) -> str | None:
    """Why something compiled cannot be taken whose difference from what is right `try_out` gives."""
    try:
        difference = try_out()
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as failure:
        return first_line(failure)
    return None if difference < MAX_DIFFERENCE else f"they differ by {difference:.3g}"


def largest_rms_difference(
    a: RowsOf, b: RowsOf, config: CheckpointConfig, dtype: torch.dtype, device: torch.device
) -> float:
    """Of what two ways to rows in 8 bits make of the same numbers, over the numbers' own root mean square. A single one
    may fall to either side of a tie, which is an eighth of it."""
    generator = torch.Generator().manual_seed(0)
    differences = []
    for width in {config.hidden_size, config.intermediate_size}:
        for n_rows, n_before in TRIED_ROWS:
            x = torch.randn(n_before + n_rows, width, generator=generator).to(device, dtype)[n_before:]
            one, other = (values.float() * scales for values, scales in (a(x), b(x)))
            differences.append((one - other).square().mean().sqrt() / other.square().mean().sqrt())
    return float(torch.stack(differences).max())


def largest_difference(a: Steps, b: Steps, config: CheckpointConfig, dtype: torch.dtype, device: torch.device) -> float:
    """Of what two kinds of steps make of the same numbers, in a model's widths, by one more than their size; nan if one
    of them gives that."""
    generator = torch.Generator().manual_seed(0)
    groups, per_key, size = config.num_key_value_heads, config.queries_per_key, config.head_dim
    differences = []

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    for n_rows, n_before in TRIED_ROWS:
        n_all = n_before + n_rows
        residual, weight = draw(n_all, config.hidden_size), draw(config.hidden_size)
        product = draw(n_rows, config.hidden_size).to(dtype)
        heads, keys_values = draw(n_rows, groups * per_key * size), draw(n_rows, 2 * groups * size)
        turn = torch.polar(torch.ones(n_all, 1, size // 2, device=device), draw(n_all, 1, size // 2))[n_before:]
        gate, up = (PlainLinear(draw(config.intermediate_size, 16).to(dtype) / 4) for _ in range(2))
        x = draw(n_rows, 16).to(dtype)
        found = []
        for steps in (a, b):
            rows = residual.clone()[n_before:]
            queries = torch.empty(n_all, groups, per_key, size, dtype=dtype, device=device)[n_before:]
            keys = torch.empty(n_all, groups, size, dtype=dtype, device=device)[n_before:]
            found.append(
                [
                    steps.norm(rows, weight),
                    steps.add_and_norm(rows, product, weight),
                    rows,
                    queries,
                    keys,
                    steps.gated(gate, up, x),
                ]
            )
            steps.rotate_into(queries, heads.to(dtype), turn)
            steps.rotate_into(keys.unsqueeze(2), keys_values.to(dtype).chunk(2, -1)[0], turn)
        for one, other in zip(*found, strict=True):
            differences.append(((one.float() - other.float()).abs() / (1 + other.float().abs())).max())
    return float(torch.stack(differences).max())


def _norm(x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight).to(dtype)


def _add_and_norm(x: Tensor, product: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
    x += product
    return _norm(x, weight, epsilon, dtype)


def _rotate_into(out: Tensor, x: Tensor, turn: Tensor) -> None:
    """`turn` as pairs of real numbers `[T, 1, D / 2, 2]`: complex ones are not compiled."""
    pairs = x.float().view(*out.shape[:-1], -1, 2)
    cosine, sine = turn.unsqueeze(1)[..., :1], turn.unsqueeze(1)[..., 1:]
    signs = torch.arange(-1, 2, 2, device=x.device)
    out.copy_((pairs * cosine + pairs.flip(-1) * (sine * signs)).flatten(-2))


def _silu_times(gate: Tensor, up: Tensor) -> Tensor:
    return (F.silu(gate.float()) * up.float()).to(gate.dtype)


def _compile(function: Callable[..., Any], width: int) -> Callable[..., Any]:
    """`function` for rows of this width, which is a constant to it.

    torch keeps variants by code object and takes for a variable what has changed under one name, in whatever model.
    It compiles in this process: an engine leaves no other behind, and a few small kernels need none.
    """
    assert isinstance(function, FunctionType)
    code = function.__code__.replace(co_name=f"{function.__name__}_{width}")
    compiled: Callable[..., Any] = torch.compile(
        FunctionType(code, function.__globals__), options={"compile_threads": 1}
    )
    return compiled
