"""Causal attention over packed tokens, with prefixes that several sequences share.

Letters: T tokens, G key-value heads, R query heads of each, D head size, M query rows of one product, N keys of it.
Queries are laid out `[G, T, R, D]`, so that the rows of a block of tokens, all R heads of them, are one matrix per G.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from polar_ray.engines.torch.layout import Family, Segment, Span
from polar_ray.engines.torch.linear import onednn_product, onednn_works

BLOCK_TOKENS = 128
"""Query tokens of one block on a CPU: causal attention computes at most this many keys too many for a row, and below
it the products get too small to run at full speed."""

BLOCK_SCORES = 1 << 25
"""Scores of one block at most, which bounds memory for long sequences: 64 MB in bfloat16."""

SDPA_BLOCK_TOKENS = 1024
"""Query tokens of one call with an explicit mask, whose memory is this times the keys."""

LOWEST_SUM, HIGHEST_SUM = 2.0**-64, 2.0**96
"""Sums of unnormalised weights that are trusted: what the range of float32 and bfloat16 cuts off is below rounding."""


class Attention(Protocol):
    score_scale: float
    """What queries are multiplied by before they come here."""

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, families: Sequence[Family]) -> Tensor:
        """`[T, G * R * D]` from queries `[G, T, R, D]`, all in `families`, and keys and values `[G, any, D]`."""
        ...


def attention_for(dtype: torch.dtype, device: torch.device, head_dim: int) -> Attention:
    if onednn_works(dtype, device.type):
        return BlockAttention(head_dim)
    return SdpaAttention(head_dim)


class SdpaAttention:
    """torch's own kernels, a call for each block: for GPUs, and wherever oneDNN is not to be had."""

    def __init__(self, head_dim: int) -> None:
        self.score_scale = head_dim**-0.5

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, families: Sequence[Family]) -> Tensor:
        groups, n_tokens, per_key, size = queries.shape
        out = queries.new_empty(n_tokens, groups * per_key, size)
        for segment, n_prefix, own_keys, own_values in _segments(families, keys, values):
            own_keys, own_values = (part.repeat_interleave(per_key, 0).unsqueeze(0) for part in (own_keys, own_values))
            for rows, n_keys in _blocks(segment, n_prefix + len(segment.own), SDPA_BLOCK_TOKENS):
                q = queries[:, rows.start : rows.end].transpose(1, 2).reshape(1, groups * per_key, len(rows), size)
                whole = len(rows) == n_keys
                mask = None if whole else queries.new_ones(len(rows), n_keys, dtype=torch.bool).tril(n_keys - len(rows))
                mixed = F.scaled_dot_product_attention(
                    q, own_keys[:, :, :n_keys], own_values[:, :, :n_keys], attn_mask=mask, is_causal=whole, scale=1.0
                )
                out[rows.start : rows.end] = mixed[0].transpose(0, 1)
        return out.flatten(1)


class BlockAttention:
    """Products of blocks of rows with all their keys, on a CPU.

    The flash kernel for CPUs reaches a fifth of the speed of plain products in bfloat16 and half of it in float32.
    Weights are powers of two without the usual subtraction of each row's largest score, which would read all scores
    once more; the sums tell afterwards whether any row left the range in which this is exact, and then the whole call
    is done again with the subtraction.
    """

    def __init__(self, head_dim: int) -> None:
        self.score_scale = math.log2(math.e) * head_dim**-0.5
        # Masks the keys behind each query; rows are (token, R), so each token's row is repeated by indexing.
        self._later = torch.full((BLOCK_TOKENS, BLOCK_TOKENS), -math.inf).triu(1)
        self._masks: dict[tuple[torch.dtype, int], Tensor] = {}

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, families: Sequence[Family]) -> Tensor:
        sums = torch.empty(queries.shape[:3], dtype=torch.float32)
        out = self._mix(queries, keys, values, families, sums)
        lowest, highest = torch.aminmax(sums)
        if not (lowest > LOWEST_SUM and highest < HIGHEST_SUM):
            out = self._mix(queries, keys, values, families, None)
        return out

    def _mix(
        self, queries: Tensor, keys: Tensor, values: Tensor, families: Sequence[Family], sums: Tensor | None
    ) -> Tensor:
        """Unnormalised weights with their sums written to `sums`, or softmax if that is None."""
        groups, n_tokens, per_key, size = queries.shape
        out = queries.new_empty(n_tokens, groups, per_key, size)
        later = self._mask(queries.dtype, per_key)
        # oneDNN's batched product takes bfloat16 alone; float32 would end in MKL, at half the speed of single products.
        step = groups if queries.dtype == torch.bfloat16 else 1
        most_tokens = BLOCK_SCORES // (step * per_key)
        for segment, n_prefix, own_keys, own_values in _segments(families, keys, values):
            n_all = n_prefix + len(segment.own)
            for rows, n_keys in _blocks(segment, n_all, max(16, min(BLOCK_TOKENS, most_tokens // n_all))):
                n_rows = len(rows)
                hidden = later[: n_rows * per_key, :n_rows]
                for g in range(0, groups, step):
                    q = queries[g : g + step, rows.start : rows.end].reshape(step, n_rows * per_key, size)
                    weights = _product(q, own_keys[g : g + step, :n_keys])
                    weights[..., n_keys - n_rows :] += hidden
                    v = own_values[g : g + step, :n_keys]
                    place = out[rows.start : rows.end, g : g + step].transpose(0, 1)
                    if sums is None:
                        weights = torch.softmax(weights.float().mul_(math.log(2)), -1).to(v.dtype)
                        place.copy_(_product(weights, v.mT).view(place.shape))
                        continue
                    total = sums[g : g + step, rows.start : rows.end]
                    total.copy_(weights.exp2_().sum(-1).view(total.shape))
                    mixed = _product(weights, v.mT).view(place.shape)
                    torch.div(mixed, total.unsqueeze(-1), out=place)
        return out.flatten(1)

    def _mask(self, dtype: torch.dtype, per_key: int) -> Tensor:
        key = (dtype, per_key)
        if key not in self._masks:
            self._masks[key] = self._later.repeat_interleave(per_key, 0).to(dtype)
        return self._masks[key]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b.mT` for `[batch, M, K]` and `[batch, N, K]`."""
    if a.dtype == torch.bfloat16:
        return torch.bmm(a, b.mT)
    return onednn_product(a[0], b[0]).unsqueeze(0)


def _segments(
    families: Sequence[Family], keys: Tensor, values: Tensor
) -> Iterator[tuple[Segment, int, Tensor, Tensor]]:
    """Each segment with the length of its prefix and all its keys and values, the prefix's first."""
    for family in families:
        prefix = slice(family.prefix.start, family.prefix.end)
        for segment in family.segments:
            own = slice(segment.own.start, segment.own.end)
            if not len(family.prefix):
                yield segment, 0, keys[:, own], values[:, own]
                continue
            all_keys = torch.cat([keys[:, prefix], keys[:, own]], 1)
            yield segment, len(family.prefix), all_keys, torch.cat([values[:, prefix], values[:, own]], 1)


def _blocks(segment: Segment, n_keys: int, max_tokens: int) -> Iterator[tuple[Span, int]]:
    """The segment's queries in even blocks, each with the number of keys that its last query sees."""
    queries = segment.queries
    n_blocks = -(-len(queries) // max_tokens)
    size = -(-len(queries) // n_blocks)
    for start in range(queries.start, queries.end, size):
        end = min(start + size, queries.end)
        yield Span(start, end), n_keys - (queries.end - end)
