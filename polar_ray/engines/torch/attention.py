"""Causal attention over packed tokens, with prefixes that several sequences share.

Letters: T tokens, G key-value heads, R query heads of each, D head size, M query rows of one product, N keys of it.
Queries are laid out `[G, T, R, D]`, so that the rows of a block of tokens, all R heads of them, are one matrix per G.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from polar_ray.engines.torch.layout import Segment, Span
from polar_ray.engines.torch.linear import onednn_product, onednn_works
from polar_ray.engines.torch.varlen import VarlenAttention, varlen_works

BLOCK_TOKENS = 128
"""Query tokens of one block on a CPU: causal attention computes at most this many keys too many for a row, and below
it the products get too small to run at full speed."""

BLOCK_SCORES = 1 << 25
"""Scores of one block at most, which bounds memory for long sequences: 64 MB in bfloat16."""

PLACED_BLOCK_TOKENS = 128
"""Query tokens of one block where blocks begin at multiples of this in their own sequence."""

SDPA_BLOCK_TOKENS = 1024
"""Query tokens of one call with an explicit mask, whose memory is this times the keys."""

LOWEST_SUM, HIGHEST_SUM = 2.0**-64, 2.0**96
"""Sums of unnormalised weights that are trusted: what the range of float32 and bfloat16 cuts off is below rounding."""


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`[T, G * R * D]` from queries `[G, T, R, D]` and keys and values `[G, any, D]`."""


class Attention(Protocol):
    score_scale: float
    """What queries are multiplied by before they come here."""

    by_token: bool
    """Whether queries, keys and values are read best if memory has all heads of a token side by side."""

    def over(self, segments: Sequence[Segment]) -> Attend:
        """The attention of `segments`, which every query is in, for all layers of a batch."""
        ...


def attention_for(
    dtype: torch.dtype, device: torch.device, head_dim: int, queries_per_key: int, block_tokens: int | None = None
) -> Attention:
    """The fastest that is right here; with `block_tokens` the one whose blocks have their place in the sequence."""
    if block_tokens is not None:
        return PlacedAttention(dtype, device, head_dim, queries_per_key, block_tokens)
    if onednn_works(dtype, device.type):
        return BlockAttention(dtype, head_dim, queries_per_key)
    if varlen_works(dtype, device, head_dim, queries_per_key):
        return VarlenAttention(device, head_dim)
    return SdpaAttention(head_dim)


class SegmentAttention(ABC):
    """Takes the segments one after the other, and needs nothing of them beforehand."""

    by_token = False

    def over(self, segments: Sequence[Segment]) -> Attend:
        return partial(self._attend, segments=segments)

    @abstractmethod
    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, segments: Sequence[Segment]) -> Tensor: ...


class SdpaAttention(SegmentAttention):
    """torch's own kernels, a call for each block: for GPUs, and wherever oneDNN is not to be had."""

    def __init__(self, head_dim: int) -> None:
        self.score_scale = head_dim**-0.5

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, segments: Sequence[Segment]) -> Tensor:
        groups, n_tokens, per_key, size = queries.shape
        out = queries.new_empty(n_tokens, groups * per_key, size)
        for segment, own_keys, own_values in _segments(segments, keys, values):
            own_keys, own_values = (part.repeat_interleave(per_key, 0).unsqueeze(0) for part in (own_keys, own_values))
            for rows, n_keys in _blocks(segment, segment.n_keys, SDPA_BLOCK_TOKENS):
                q = queries[:, rows.start : rows.end].transpose(1, 2).reshape(1, groups * per_key, len(rows), size)
                whole = len(rows) == n_keys
                mask = None if whole else queries.new_ones(len(rows), n_keys, dtype=torch.bool).tril(n_keys - len(rows))
                mixed = F.scaled_dot_product_attention(
                    q, own_keys[:, :, :n_keys], own_values[:, :, :n_keys], attn_mask=mask, is_causal=whole, scale=1.0
                )
                out[rows.start : rows.end] = mixed[0].transpose(0, 1)
        return out.flatten(1)


class BlockAttention(SegmentAttention):
    """Products of blocks of queries with all their keys, on a CPU.

    torch's flash kernel for CPUs does not use oneDNN's products, which are faster in either dtype. Weights are powers
    of two without the usual subtraction of each row's largest score, for which all scores would be read once more. The
    sums tell afterwards whether a row has left the range in which this is exact; then the call is done again with the
    subtraction.
    """

    def __init__(self, dtype: torch.dtype, head_dim: int, queries_per_key: int) -> None:
        self.score_scale = math.log2(math.e) * head_dim**-0.5
        self._later = _later(BLOCK_TOKENS, queries_per_key, dtype, torch.device("cpu"))

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, segments: Sequence[Segment]) -> Tensor:
        out, lowest, highest = self._mix(queries, keys, values, segments, subtract_largest=False)
        if not (lowest > LOWEST_SUM and highest < HIGHEST_SUM):
            out, _, _ = self._mix(queries, keys, values, segments, subtract_largest=True)
        return out

    def _mix(
        self, queries: Tensor, keys: Tensor, values: Tensor, segments: Sequence[Segment], *, subtract_largest: bool
    ) -> tuple[Tensor, float, float]:
        """The values mixed, and the lowest and highest sum of a row's weights before they were normalised."""
        groups, n_tokens, per_key, size = queries.shape
        out = queries.new_empty(n_tokens, groups, per_key, size)
        sums = queries.new_empty(groups, n_tokens, per_key)
        # Only in bfloat16 does torch send batches of products to oneDNN; float32 ones would end in MKL.
        step = groups if queries.dtype == torch.bfloat16 else 1
        for segment, own_keys, own_values in _segments(segments, keys, values):
            n_all = segment.n_keys
            most_tokens = BLOCK_SCORES // (step * per_key * n_all)
            for rows, n_keys in _blocks(segment, n_all, max(16, min(BLOCK_TOKENS, most_tokens))):
                n_rows = len(rows)
                for g in range(0, groups, step):
                    part, place = slice(g, g + step), slice(rows.start, rows.end)
                    q = queries[part, place].reshape(step, n_rows * per_key, size)
                    weights = _product(q, own_keys[part, :n_keys])
                    weights[..., n_keys - n_rows :] += self._later[: n_rows * per_key, :n_rows]
                    if subtract_largest:
                        weights -= weights.amax(-1, keepdim=True)
                    total = weights.exp2_().sum(-1).view(step, n_rows, per_key)
                    mixed = _product(weights, own_values[part, :n_keys].mT).view(step, n_rows, per_key, size)
                    torch.div(mixed, total.unsqueeze(-1), out=out[place, part].transpose(0, 1))
                    sums[part, place] = total
        lowest, highest = torch.aminmax(sums)
        return out.flatten(1), float(lowest), float(highest)


class PlacedAttention(SegmentAttention):
    """Blocks of `block_tokens` queries that begin at multiples of it in their own sequence, for deterministic rewards.

    A token's scores, weights and values are then row for row the same products of the same shapes, whatever else is
    in the batch and however much of its sequence is a shared prefix: what is missing of a block is filled up with
    zeros. One query token to a block is for calls in which each sequence has a single one.
    """

    def __init__(
        self, dtype: torch.dtype, device: torch.device, head_dim: int, queries_per_key: int, block_tokens: int
    ) -> None:
        self.score_scale = head_dim**-0.5
        self._size = block_tokens
        self._later = _later(block_tokens, queries_per_key, dtype, device)
        self._mix = _mix_by_products if onednn_works(dtype, device.type) else _mix_by_sdpa

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, segments: Sequence[Segment]) -> Tensor:
        groups, n_tokens, per_key, size = queries.shape
        out = queries.new_zeros(n_tokens, groups, per_key, size)
        for segment, own_keys, own_values in _segments(segments, keys, values):
            n_keys = segment.n_keys
            first = n_keys - len(segment.queries)
            missing = -n_keys % self._size
            own_keys, own_values = (F.pad(part, (0, 0, 0, missing)) for part in (own_keys, own_values))
            for start in range(first - first % self._size, n_keys, self._size):
                end = start + self._size
                inside = slice(max(first - start, 0), min(n_keys - start, self._size))
                place = segment.queries.start + start - first
                rows = slice(place + inside.start, place + inside.stop)
                block = queries.new_zeros(groups, self._size, per_key, size)
                block[:, inside] = queries[:, rows]
                mixed = self._mix(block.flatten(1, 2), own_keys[:, :end], own_values[:, :end], self._later)
                out[rows] = mixed.view(block.shape)[:, inside].transpose(0, 1)
        return out.flatten(1)


def _mix_by_products(queries: Tensor, keys: Tensor, values: Tensor, later: Tensor) -> Tensor:
    """`[G, M, D]` from queries `[G, M, D]`, keys and values `[G, N, D]`, and what hides the last keys, `[M, n]`.

    torch's softmax takes each row by itself, so that its bits do not depend on the number of threads either.
    """
    mixed = torch.empty_like(queries)
    step = len(queries) if queries.dtype == torch.bfloat16 else 1
    for g in range(0, len(queries), step):
        part = slice(g, g + step)
        weights = _product(queries[part], keys[part].contiguous())
        weights[..., -later.shape[1] :] += later
        mixed[part] = _product(weights.softmax(-1), values[part].mT.contiguous())
    return mixed


def _mix_by_sdpa(queries: Tensor, keys: Tensor, values: Tensor, later: Tensor) -> Tensor:
    """As `_mix_by_products`."""
    mask = F.pad(later, (keys.shape[1] - later.shape[1], 0))
    q, k, v = (part.contiguous().unsqueeze(0) for part in (queries, keys, values))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)[0]


def _later(block_tokens: int, queries_per_key: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Hides the keys behind each query of a block, `[M, N]`; rows are ordered by token, then R."""
    hidden = torch.full((block_tokens, block_tokens), -math.inf, device=device).triu(1)
    return hidden.repeat_interleave(queries_per_key, 0).to(dtype)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b.mT` for `[batch, M, K]` and `[batch, N, K]`."""
    if a.dtype == torch.bfloat16:
        return torch.bmm(a, b.mT)
    return onednn_product(a[0], b[0]).unsqueeze(0)


def _segments(segments: Sequence[Segment], keys: Tensor, values: Tensor) -> Iterator[tuple[Segment, Tensor, Tensor]]:
    """Each segment with all its keys and values, the prefix's first."""
    for segment in segments:
        spans = (*segment.prefix, segment.own)
        if all(span.end == following.start for span, following in pairwise(spans)):
            whole = slice(spans[0].start, segment.own.end)
            yield segment, keys[:, whole], values[:, whole]
        else:
            yield segment, _join(keys, spans), _join(values, spans)


def _join(parts: Tensor, spans: Sequence[Span]) -> Tensor:
    return torch.cat([parts[:, span.start : span.end] for span in spans], 1)


def _blocks(segment: Segment, n_keys: int, max_tokens: int) -> Iterator[tuple[Span, int]]:
    """The segment's queries in even blocks, each with the number of keys that its last query sees."""
    queries = segment.queries
    n_blocks = -(-len(queries) // max_tokens)
    size = -(-len(queries) // n_blocks)
    for start in range(queries.start, queries.end, size):
        end = min(start + size, queries.end)
        yield Span(start, end), n_keys - (queries.end - end)
