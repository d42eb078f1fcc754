"""Rewards of a packed batch, with gradients: what is shared is computed once, and nothing is padded but attention.

The torch engine computes the same without gradients and faster. Here the layers are transformers' own, so that
adapters, sharding and activation checkpointing find the modules they know.

Letters: T packed tokens, S sequences, B segments of one call, Q and K their queries and keys, H query heads, G
key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface

from polar_ray.engines.torch.layout import Packed, Segment, Span
from polar_ray.model.polar import PolarForReward

ATTENTION = "polar_packed"
"""Under this name transformers' layers find `attend`."""

BATCHED_KEYS = 1024
"""Segments with at most so many keys are attended to together, padded to the longest; a longer one is a call of its
own, which can leave out what lies in its future instead of masking it."""

PADDING_SHARE = 0.25
"""Of the scores of one call that padding may take."""


@dataclass(frozen=True)
class Call:
    """One attention call: places in the packed row, int64 `[B, Q]` and `[B, K]`, and which scores count."""

    queries: Tensor
    keys: Tensor
    mask: Tensor | None
    """bool `[B, 1, Q, K]`; None for one segment whose queries are its last keys."""

    kept: Tensor | None
    """Places within `[B * Q]` that are no padding, in the order of `written`; None if all are."""

    written: Tensor
    """Where in the packed row the results belong."""

    def to(self, device: torch.device) -> Call:
        mask, kept = (None if part is None else part.to(device) for part in (self.mask, self.kept))
        return Call(self.queries.to(device), self.keys.to(device), mask, kept, self.written.to(device))


class PackedPolar(nn.Module):
    """`model` on packed batches. The parameters are `model`'s own; nothing is copied.

    The model's own forward is out of use from here on and fails: its layers now expect packed tokens, also when
    activations are recomputed on the way back.
    """

    def __init__(self, model: PolarForReward) -> None:
        super().__init__()
        self.polar = model
        model.config._attn_implementation = ATTENTION
        model.model.config._attn_implementation = ATTENTION

    def forward(self, packed: Packed) -> Tensor:
        """Rewards, float32 `[S]`, in the order of the batch that was packed."""
        device = packed.ids_T.device
        calls = [call.to(device) for call in plan_calls(packed)]
        order = torch.cat([call.written for call in calls]).argsort()
        polar = self.polar
        hidden_TH = polar.model(
            input_ids=packed.ids_T.unsqueeze(0),
            # A row's base follows from its longest position: `pack` shares only where that is no matter, and what is
            # longer is refused before training.
            position_ids=packed.positions_T.long().unsqueeze(0),
            use_cache=False,
            polar_calls=calls,
            polar_order=order,
        ).last_hidden_state[0]
        last_SH = hidden_TH[packed.last_S]
        # Not a Linear: under autocast that would be rounded to half precision.
        rewards_S: Tensor = (last_SH.float() * polar.v_head.weight[0].float()).sum(-1)
        return rewards_S


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    polar_calls: Sequence[Call],
    polar_order: Tensor,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: `[1, T, H, D]` from query `[1, H, T, D]`, key and value `[1, G, T, D]`.

    `polar_order` puts the results of the calls, one after another, into the order of the packed row.
    """
    per_key = query.shape[1] // key.shape[1]
    # Rows of tokens, so that a segment is gathered as it lies.
    queries, keys, values = (part[0].transpose(0, 1).to(value.dtype) for part in (query, key, value))
    mixed = []
    for call in polar_calls:
        q, k, v = (
            part[places].transpose(1, 2)
            for part, places in ((queries, call.queries), (keys, call.keys), (values, call.keys))
        )
        if per_key > 1:
            k, v = k.repeat_interleave(per_key, 1), v.repeat_interleave(per_key, 1)
        out = _mix(q, k, v, call.mask, scaling).transpose(1, 2).flatten(0, 1)
        mixed.append(out if call.kept is None else out[call.kept])
    return torch.cat(mixed)[polar_order].unsqueeze(0), None


AttentionInterface.register(ATTENTION, attend)


def _mix(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """`[B, H, Q, D]` from as many queries and `[B, H, K, D]` keys and values."""
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, causal_lower_right(q.shape[2], k.shape[2]), scale=scaling)
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scaling)
    scores = (q * scaling) @ k.mT
    return scores.masked_fill(~mask, -1e4).softmax(-1) @ v


def plan_calls(packed: Packed) -> list[Call]:
    """Attention calls that cover every token of `packed` once, few of them and with little padding."""
    segments = sorted(packed.every_token, key=lambda segment: (-segment.n_keys, -len(segment.queries)))
    return [_alone(*group) if len(group) == 1 else _together(group) for group in _similar(segments)]


def _similar(segments: Sequence[Segment]) -> Iterator[list[Segment]]:
    """Runs of segments that are alike enough to be padded to each other."""
    taken: list[Segment] = []
    scores = rows = columns = 0
    for segment in segments:
        n_rows, n_columns = len(segment.queries), segment.n_keys
        together = scores + n_rows * n_columns
        padded = (len(taken) + 1) * max(rows, n_rows) * max(columns, n_columns)
        if taken and (columns > BATCHED_KEYS or padded * (1 - PADDING_SHARE) > together):
            yield taken
            taken, scores, rows, columns = [], 0, 0, 0
            together = n_rows * n_columns
        taken.append(segment)
        scores, rows, columns = together, max(rows, n_rows), max(columns, n_columns)
    if taken:
        yield taken


def _alone(segment: Segment) -> Call:
    queries = _places(segment.queries)
    return Call(queries.unsqueeze(0), _key_places(segment).unsqueeze(0), None, None, queries)


def _together(segments: Sequence[Segment]) -> Call:
    n_rows = torch.tensor([len(segment.queries) for segment in segments]).unsqueeze(1)
    n_keys = torch.tensor([segment.n_keys for segment in segments]).unsqueeze(1)
    queries = pad_sequence([_places(segment.queries) for segment in segments], batch_first=True)
    keys = pad_sequence([_key_places(segment) for segment in segments], batch_first=True)
    row, column = torch.arange(queries.shape[1]), torch.arange(keys.shape[1])
    is_row = row < n_rows
    # Query i of a segment is its key n_keys - n_rows + i. A padded query sees what the last one sees: something.
    last_seen = (n_keys - n_rows + row).clamp(max=n_keys - 1)
    mask = (column <= last_seen.unsqueeze(-1)).unsqueeze(1)
    kept = None if bool(is_row.all()) else is_row.flatten().nonzero().squeeze(1)
    return Call(queries, keys, mask, kept, queries[is_row])


def _key_places(segment: Segment) -> Tensor:
    return torch.cat([_places(span) for span in (*segment.prefix, segment.own)])


def _places(span: Span) -> Tensor:
    return torch.arange(span.start, span.end)
