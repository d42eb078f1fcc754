"""A batch as one row of tokens: each prefix once, what follows it behind it, no padding.

Letters: T computed tokens, S sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from polar_ray.planning import Batch


@dataclass(frozen=True, slots=True)
class Span:
    """Half-open range of places in the packed row."""

    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Segment:
    """Queries that attend to all of their prefix, span after span, and causally to their own tokens.

    `queries` are places of the last of `own`.
    """

    queries: Span
    own: Span
    prefix: tuple[Span, ...] = ()

    @property
    def n_keys(self) -> int:
        return sum(map(len, self.prefix)) + len(self.own)


@dataclass(frozen=True)
class Packed:
    """`ids_T` int64; `positions_T` within a token's sequence; `lengths_T` of that sequence, at most `max_shared_length`
    where it is shared; `last_S` the places the rewards are read at, in the batch's order."""

    ids_T: Tensor
    positions_T: Tensor
    lengths_T: Tensor
    last_S: Tensor
    every_token: tuple[Segment, ...]
    """Attention of all tokens."""

    last_tokens: tuple[Segment, ...]
    """Attention of the tokens at `last_S` alone: `queries` are places in `last_S`."""

    def to(self, device: torch.device) -> Packed:
        ids_T, positions_T, lengths_T, last_S = (
            tensor.to(device) for tensor in (self.ids_T, self.positions_T, self.lengths_T, self.last_S)
        )
        return Packed(ids_T, positions_T, lengths_T, last_S, self.every_token, self.last_tokens)


def pack(batch: Batch, max_shared_length: int | None = None, fill_up: Callable[[int], int] | None = None) -> Packed:
    """`batch` must hold at least one sequence. One with a longer sequence than `max_shared_length` is unshared.

    With `fill_up`, from a number of rows to the number there must be, tokens that nobody attends to and last places
    that nobody asks for follow at the end.
    """
    if max_shared_length is not None and _longest(batch) > max_shared_length:
        batch = Batch.unshared(batch.sequences())
    ids = [node.ids for node in batch.nodes]
    edges = [0, *accumulate(map(len, ids))]
    spans = [Span(start, end) for start, end in pairwise(edges)]
    every = [_segment(batch, place, span, spans) for place, span in enumerate(spans)]
    positions = [np.arange(start, start + len(part)) for start, part in zip(batch.starts, ids, strict=True)]
    lengths = [np.full(len(part), start + len(part)) for start, part in zip(batch.starts, ids, strict=True)]
    ends = [segment for segment, node in zip(every, batch.nodes, strict=True) if node.row is not None]
    last = [segment.own.end - 1 for segment in ends]
    lasts = [Segment(Span(n, n + 1), segment.own, segment.prefix) for n, segment in enumerate(ends)]

    if fill_up is not None:
        n_missing = fill_up(edges[-1]) - edges[-1]
        ids.append(np.zeros(n_missing, dtype=np.int32))
        positions.append(np.zeros(n_missing, dtype=np.int64))
        lengths.append(np.ones(n_missing, dtype=np.int64))
        last += [0] * (fill_up(len(last)) - len(last))

    def tensor(parts: Sequence[npt.NDArray[np.int32 | np.int64]]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))

    last_S = torch.tensor(last, dtype=torch.int64)
    return Packed(tensor(ids), tensor(positions), tensor(lengths), last_S, tuple(every), tuple(lasts))


def _longest(batch: Batch) -> int:
    return max(start + len(node.ids) for start, node in zip(batch.starts, batch.nodes, strict=True))


def _segment(batch: Batch, place: int, own: Span, spans: Sequence[Span]) -> Segment:
    """A node's tokens, with those before them in as few spans as they lie in."""
    prefix: list[Span] = []
    for span in (spans[before] for before in batch.path(place)):
        if prefix and prefix[-1].end == span.start:
            span = Span(prefix.pop().start, span.end)
        prefix.append(span)
    return Segment(own, own, tuple(prefix))
