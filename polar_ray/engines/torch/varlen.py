"""Causal attention of all segments of a batch in one call for each layer, by the flash kernel that torch has for GPUs.

Which keys a segment reads is the same in every layer: their places and the segments' edges go to the device once for a
batch. The kernel's own contract (the last query meets all keys, few key-value heads serve many query heads, one query
takes another path) has changed between versions, so it is tried before it is used.

Letters: T tokens, N keys of all segments, G key-value heads, R query heads of each, D head size.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from polar_ray.engines.torch.layout import Segment, Span
from polar_ray.errors import first_line

if TYPE_CHECKING:
    from polar_ray.engines.torch.attention import Attend

logger = logging.getLogger(__name__)

MAX_KEYS = 1 << 18
"""Keys of one call at most, unless a segment alone has more. Shared prefixes are copied for every segment that reads
them, and this bounds the copies: 1 GiB in bfloat16 for eight heads of 128."""

TOLERANCES = {torch.bfloat16: 0.05, torch.float16: 0.01}
"""Largest difference from float64 that is rounding: values are normally distributed. A key too many or too few shows
in the second digit where there are few."""


@dataclass(frozen=True)
class Edges:
    """What belongs together: the queries, and the keys and values, between two edges (int32, from 0)."""

    queries: Tensor
    keys: Tensor
    max_queries: int
    """Between two edges at most."""

    max_keys: int


Kernel = Callable[[Tensor, Tensor, Tensor, Edges], Tensor]
"""`[T, G * R, D]` from queries of that shape and keys and values `[N, G, D]`, scores as they are. Of what belongs
together the last query meets all keys, and each one before it one fewer."""


def flash(queries: Tensor, keys: Tensor, values: Tensor, edges: Edges) -> Tensor:
    """The kernel for GPUs, in 16 bits."""
    from torch.nn.attention.varlen import varlen_attn

    lengths = edges.queries, edges.keys, edges.max_queries, edges.max_keys
    mixed = varlen_attn(queries, keys, values, *lengths, scale=1.0, window_size=(-1, 0), enable_gqa=True)
    assert isinstance(mixed, Tensor)  # without `return_aux` it is
    return mixed


def exact(queries: Tensor, keys: Tensor, values: Tensor, edges: Edges) -> Tensor:
    """What a kernel promises, in float64 and a segment at a time: the measure of the others."""
    per_key = queries.shape[1] // keys.shape[1]
    mixed = torch.empty_like(queries)
    of_queries, of_keys = (pairwise(each.tolist()) for each in (edges.queries, edges.keys))
    for (start, end), (first, last) in zip(of_queries, of_keys, strict=True):
        q = queries[start:end].double().transpose(0, 1)
        k, v = (part[first:last].double().repeat_interleave(per_key, 1).transpose(0, 1) for part in (keys, values))
        sees = torch.ones(end - start, last - first, dtype=torch.bool, device=q.device).tril(last - first - end + start)
        weights = (q @ k.mT).masked_fill(~sees, -math.inf).softmax(-1)
        mixed[start:end] = (weights @ v).transpose(0, 1).to(mixed.dtype)
    return mixed


@dataclass(frozen=True)
class _Call:
    """Segments whose queries follow each other."""

    rows: slice
    """Of the queries."""

    places: Tensor | slice
    """Of the keys and values, in the order of the segments."""

    edges: Edges


class VarlenAttention:
    """The segments' queries must follow each other from the first row to the last, as `pack` lays them."""

    by_token = True

    def __init__(self, device: torch.device, head_dim: int, kernel: Kernel = flash) -> None:
        self.score_scale = head_dim**-0.5
        self._device = device
        self._kernel = kernel

    def over(self, segments: Sequence[Segment]) -> Attend:
        calls = [_call(run, self._device) for run in _runs(segments)]
        return functools.partial(self._attend, calls=calls)

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, *, calls: Sequence[_Call]) -> Tensor:
        queries, keys, values = queries.transpose(0, 1).flatten(1, 2), keys.transpose(0, 1), values.transpose(0, 1)
        parts = [self._kernel(queries[call.rows], keys[call.places], values[call.places], call.edges) for call in calls]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(1)


@functools.cache
def varlen_works(
    dtype: torch.dtype, device: torch.device, head_dim: int, queries_per_key: int, kernel: Kernel = flash
) -> bool:
    """Whether the kernel is there for such heads and agrees with float64 to the dtype's rounding."""
    if device.type != "cuda" or dtype not in TOLERANCES:
        return False
    try:
        error = largest_error(dtype, device, head_dim, queries_per_key, kernel)
    except (AttributeError, ImportError, RuntimeError, TypeError, ValueError) as failure:
        reason = first_line(failure)
    else:
        if error < TOLERANCES[dtype]:
            return True
        reason = f"it is off by {error:.3g}"
    logger.warning("torch's varlen attention is left alone, which makes long batches slower: %s", reason)
    return False


def largest_error(
    dtype: torch.dtype, device: torch.device, head_dim: int, queries_per_key: int, kernel: Kernel
) -> float:
    """Of `kernel` on segments of every form, and on their last tokens alone; nan if it gives that."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    first, second, single, rest, apart = Span(0, 80), Span(80, 140), Span(140, 141), Span(141, 300), Span(300, 463)
    every = (
        Segment(first, first),
        Segment(second, second, (first,)),
        Segment(single, single, (Span(0, 140),)),
        Segment(rest, rest, (Span(0, 60), Span(100, 140))),
        Segment(apart, apart),
    )
    last = tuple(Segment(Span(n, n + 1), segment.own, segment.prefix) for n, segment in enumerate(every))
    keys, values = draw(2, 463, head_dim), draw(2, 463, head_dim)
    errors = []
    for segments in (every, last, every[:1]):
        n_queries = segments[-1].queries.end
        queries = draw(n_queries, 2, queries_per_key, head_dim).transpose(0, 1) * head_dim**-0.5
        found, expected = (
            VarlenAttention(device, head_dim, each).over(segments)(queries, keys, values) for each in (kernel, exact)
        )
        errors.append((found.double() - expected.double()).abs().max())
    return float(torch.stack(errors).max())


def _runs(segments: Sequence[Segment]) -> Iterator[Sequence[Segment]]:
    """The segments in order, as many to a run as `MAX_KEYS` allows."""
    start = n_keys = 0
    for place, segment in enumerate(segments):
        if place > start and n_keys + segment.n_keys > MAX_KEYS:
            yield segments[start:place]
            start, n_keys = place, 0
        n_keys += segment.n_keys
    yield segments[start:]


def _call(segments: Sequence[Segment], device: torch.device) -> _Call:
    spans = [span for segment in segments for span in (*segment.prefix, segment.own)]
    n_queries = [len(segment.queries) for segment in segments]
    n_keys = [segment.n_keys for segment in segments]
    places: Tensor | slice
    if all(span.end == following.start for span, following in pairwise(spans)):
        places = slice(spans[0].start, spans[-1].end)
    else:
        places = torch.from_numpy(np.concatenate([np.arange(span.start, span.end) for span in spans])).to(device)

    def up_to(lengths: Sequence[int]) -> Tensor:
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)

    rows = slice(segments[0].queries.start, segments[-1].queries.end)
    return _Call(rows, places, Edges(up_to(n_queries), up_to(n_keys), max(n_queries), max(n_keys)))
