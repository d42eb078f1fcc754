"""A batch as one row of tokens: each prefix once, its suffixes behind it, no padding.

Letters: T computed tokens, S sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from polar_ray.planning import Batch, Ids


@dataclass(frozen=True, slots=True)
class Span:
    """Half-open range of places in the packed row."""

    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Segment:
    """Queries that attend causally to their own tokens. `queries` are places of the last of `own`."""

    queries: Span
    own: Span


@dataclass(frozen=True, slots=True)
class Family:
    """Segments that all attend to the whole of `prefix`, which may be empty, and then each to its own tokens."""

    prefix: Span
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Packed:
    """`ids_T` int64; `positions_T` within a token's sequence; `lengths_T` of that sequence, at most `max_shared_length`
    where it is shared; `last_S` the places the rewards are read at, in the batch's order."""

    ids_T: Tensor
    positions_T: Tensor
    lengths_T: Tensor
    last_S: Tensor
    every_token: tuple[Family, ...]
    """Attention of all tokens."""

    last_tokens: tuple[Family, ...]
    """Attention of the tokens at `last_S` alone: `queries` are places in `last_S`."""

    def to(self, device: torch.device) -> Packed:
        ids_T, positions_T, lengths_T, last_S = (
            tensor.to(device) for tensor in (self.ids_T, self.positions_T, self.lengths_T, self.last_S)
        )
        return Packed(ids_T, positions_T, lengths_T, last_S, self.every_token, self.last_tokens)


def pack(batch: Batch, max_shared_length: int | None = None, fill_up: Callable[[int], int] | None = None) -> Packed:
    """`batch` must hold at least one sequence. A group with a longer sequence than `max_shared_length` is unshared.

    With `fill_up`, from a number of rows to the number there must be, tokens that nobody attends to and last places
    that nobody asks for follow at the end.
    """
    ids: list[Ids] = []
    positions: list[Ids] = []
    lengths: list[Ids] = []
    last: list[int] = []
    every: list[Family] = []
    lasts: list[Family] = []
    place = 0

    def add(part: Ids, offset: int) -> Span:
        nonlocal place
        ids.append(part)
        positions.append(np.arange(offset, offset + len(part), dtype=np.int32))
        lengths.append(np.full(len(part), offset + len(part), dtype=np.int32))
        place += len(part)
        return Span(place - len(part), place)

    for prefix_ids, suffixes in _parts(batch, max_shared_length):
        prefix = add(prefix_ids, 0)
        own = [add(suffix, len(prefix)) for suffix in suffixes]
        if len(prefix):
            every.append(Family(Span(prefix.start, prefix.start), (Segment(prefix, prefix),)))
        every.append(Family(prefix, tuple(Segment(span, span) for span in own)))
        lasts.append(Family(prefix, tuple(Segment(Span(n, n + 1), span) for n, span in enumerate(own, len(last)))))
        last += [span.end - 1 for span in own]

    if fill_up is not None:
        n_missing = fill_up(place) - place
        ids.append(np.zeros(n_missing, dtype=np.int32))
        positions.append(np.zeros(n_missing, dtype=np.int32))
        lengths.append(np.ones(n_missing, dtype=np.int32))
        last += [0] * (fill_up(len(last)) - len(last))

    def tensor(parts: list[Ids]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))

    last_S = torch.tensor(last, dtype=torch.int64)
    return Packed(tensor(ids), tensor(positions), tensor(lengths), last_S, tuple(every), tuple(lasts))


def _parts(batch: Batch, max_shared_length: int | None) -> Iterator[tuple[Ids, tuple[Ids, ...]]]:
    for group in batch.groups:
        longest = len(group.prefix) + max(map(len, group.suffixes))
        if max_shared_length is None or longest <= max_shared_length:
            yield group.prefix, group.suffixes
        else:
            for suffix in group.suffixes:
                yield group.prefix[:0], (np.concatenate([group.prefix, suffix]),)
