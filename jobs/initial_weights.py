"""The weights that the checkpoint which ships is trained from: random, but for what comparing two texts takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from polar_ray.model.architecture import CheckpointConfig, merge_wqkv

EMBEDDING_STD = 0.5

CONSTANT = 4.0
"""First component of every token's embedding. Weights that read it do the same at every token."""

OFFSETS = (1, 2, 3, 0)
"""How many tokens back the first layer's first heads look; their number is a multiple of the queries of a key head."""

OFFSET_SHARPNESS = 6.0
"""Logit that each frequency of a positional head adds at its offset; the next token gets about 3.4 less in all."""

OFFSET_FREQUENCIES = 6
"""The fastest of the rotary frequencies, which tell neighbours apart. Slower ones would only sharpen what is sharp."""

POSITIONAL_NOISE = 0.1
"""Random part of a positional head's query and key weights, beside that of other heads."""

MATCHING_NOISE = 0.3
"""How far a matching head's query weights are from its key weights, relative to their size."""

MATCHING_SHARPNESS = 1.5
"""Factor of a matching head's query weights."""

FLAG, MATCH, SHARED, SECOND, UNEVEN = MEASURES = [1, 2, 3, 4, 5]
"""Components of the residual stream that start out empty: which half a token is of; whether the first half has it too;
at the last token, how much of the second half the first one has, how much of all tokens the second half is, and how far
that is from being even."""

SLOWEST = 7
"""Rotary frequencies that hardly turn over a thousand tokens: by them like meets like at any distance."""

FLAG_LOGIT = 12.0
MATCH_LOGIT = 24.0
"""Of a token and its like."""

OUTPUT_LOGIT = 8.0

EQUAL_HALVES = 0.5
"""SECOND, relative to the constant, where UNEVEN is 0. The second half is somewhat longer there; training moves it."""

UNEVEN_SLOPE = 0.7


def initial_weights(config: CheckpointConfig, seed: int, separator: int) -> dict[str, torch.Tensor]:
    """Weights to train from: random ones whose attention already does what comparing two texts takes.

    To see that an output repeats the reference, a model attends from a token to what followed the same token before:
    one head that looks at the previous token, and one after it that matches. A large model finds such heads by itself;
    one of this size, trained on few tokens, would spend most of them on that and settle for lengths and topics. So the
    structure is given (mimetic initialisation, Trockman & Kolter 2023), and training decides what to do with it:

    - embeddings share a constant direction, from which the first layer's `OFFSETS` heads look so many tokens back;
    - all other heads match: their query weights are near their key weights, so that like attends to like;
    - the last heads of each layer measure what the output shares with the reference (`_measure_overlap`);
    - what layers add to the residual stream is scaled down by their number, as GPT-2's is;
    - the value head is zero, so that all rewards start equal.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden, inner, depth = config.hidden_size, config.intermediate_size, (2 * config.num_hidden_layers) ** -0.5

    def normal(rows: int, columns: int, std: float) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * std

    embeddings = normal(config.vocab_size, hidden, EMBEDDING_STD)
    embeddings[:, 0] = CONSTANT
    embeddings[:, MEASURES] = 0
    embeddings[separator, FLAG] = CONSTANT
    weights = {
        "model.tok_embeddings.weight": embeddings,
        "model.norm.weight": torch.ones(hidden),
        "v_head.weight": torch.zeros(1, hidden),
    }
    for layer in range(config.num_hidden_layers):
        keys = normal(config.num_key_value_heads * config.head_dim, hidden, hidden**-0.5)
        values = normal(len(keys), hidden, hidden**-0.5)
        queries = _matching_queries(keys, config, generator)
        mixed = normal(hidden, hidden, hidden**-0.5 * depth)
        inward = normal(hidden, inner, inner**-0.5 * depth)
        for written in (mixed, inward):
            written[MEASURES] = 0
        if layer == 0:
            _look_back(queries, keys, config, generator)
        by_head = [part.view(-1, config.head_dim, hidden) for part in (queries, keys, values)]
        heads = _Heads(by_head[0], by_head[1], by_head[2], mixed.view(hidden, -1, config.head_dim))
        _measure_overlap(layer, heads, generator)
        gate, up = (normal(inner, hidden, hidden**-0.5) for _ in range(2))
        if layer == 2:
            _measure_lengths(gate, up, inward)
        weights |= {
            f"model.layers.{layer}.{name}.weight": tensor
            for name, tensor in {
                "attention_norm": torch.ones(hidden),
                "attention.wqkv": merge_wqkv(queries, keys, values, config),
                "attention.wo": mixed,
                "ffn_norm": torch.ones(hidden),
                "feed_forward.w1": gate,
                "feed_forward.w3": up,
                "feed_forward.w2": inward,
            }.items()
        }
    return weights


def _matching_queries(keys: torch.Tensor, config: CheckpointConfig, generator: torch.Generator) -> torch.Tensor:
    """Query weights near the weights of the keys they meet. `keys` lose the constant, at which all tokens match."""
    keys[:, [0, *MEASURES]] = 0
    heads = keys.view(config.num_key_value_heads, config.head_dim, -1).repeat_interleave(config.queries_per_key, 0)
    noise = torch.randn(heads.shape, generator=generator) * MATCHING_NOISE * config.hidden_size**-0.5
    noise[:, :, [0, *MEASURES]] = 0
    queries: torch.Tensor = (heads + noise) * MATCHING_SHARPNESS
    return queries.reshape(-1, config.hidden_size)


def _look_back(queries: torch.Tensor, keys: torch.Tensor, config: CheckpointConfig, generator: torch.Generator) -> None:
    """Make the first heads positional, in place: head `i` looks `OFFSETS[i]` tokens back, whatever the tokens are.

    Keys are the same vector everywhere and queries are that vector turned back by the offset. The rotary embedding
    turns both by their positions, and their product is largest where key and query are an offset apart.
    """
    size, half = config.head_dim, config.head_dim // 2
    strength = (OFFSET_SHARPNESS * size**0.5) ** 0.5 / _normed_constant(config.hidden_size)
    amplitudes = torch.zeros(half)
    amplitudes[:OFFSET_FREQUENCIES] = strength
    frequencies = config.rope_theta ** (-torch.arange(half) * 2 / size)
    for head, offset in enumerate(OFFSETS):
        query = queries.view(-1, size, config.hidden_size)[head]
        query.copy_(torch.randn(query.shape, generator=generator) * POSITIONAL_NOISE * config.hidden_size**-0.5)
        query[:, 0] = torch.cat(
            [amplitudes * (-offset * frequencies).cos(), amplitudes * (-offset * frequencies).sin()]
        )
    for key in keys.view(-1, size, config.hidden_size)[: len(OFFSETS) // config.queries_per_key]:
        key *= POSITIONAL_NOISE
        key[:, 0] = torch.cat([amplitudes, torch.zeros(half)])


@dataclass(frozen=True)
class _Heads:
    """A layer's attention, head by head: views, and what is written to them is written to the weights."""

    queries: torch.Tensor
    """`[heads, head_dim, hidden]`; of keys and values `[groups, head_dim, hidden]`."""

    keys: torch.Tensor
    values: torch.Tensor
    mixed: torch.Tensor
    """`[hidden, heads, head_dim]`"""

    def of_group(self, group: int) -> slice:
        """The heads that share these keys and values."""
        per_key = len(self.queries) // len(self.keys)
        return slice(group * per_key, (group + 1) * per_key)

    @property
    def slow(self) -> torch.Tensor:
        """Places in a head of both parts of the slowest rotary frequencies."""
        half = self.keys.shape[1] // 2
        slow = torch.arange(half - SLOWEST, half)
        return torch.cat([slow, slow + half])

    def attend_to_flagged(self, group: int, logit: float) -> None:
        """From every token, to those whose FLAG is about the constant."""
        size, slowest = self.keys.shape[1], self.slow[SLOWEST - 1]
        self.keys[group] = 0
        self.keys[group, slowest, FLAG] = 1.0
        self.queries[self.of_group(group)] = 0
        self.queries[self.of_group(group), slowest, 0] = logit * size**0.5 / _normed_constant(self.keys.shape[2]) ** 2

    def attend_to_like(self, group: int, logit: float, generator: torch.Generator) -> None:
        """From every token, to those like it, itself among them."""
        size, hidden = self.keys.shape[1:]
        self.keys[group] = 0
        self.keys[group, self.slow] = torch.randn(len(self.slow), hidden, generator=generator) * len(self.slow) ** -0.5
        self.keys[group, :, [0, *MEASURES]] = 0
        # The mean square of a normed token's components is 1, and a key adds up nearly all of them.
        self.queries[self.of_group(group)] = self.keys[group] * logit * size**0.5 / hidden

    def carry(self, group: int, heads: slice, read: dict[int, float], write: int) -> None:
        """Let heads of a group add a sum of components of what they attend to to a component of their own token."""
        self.values[group, 0] = 0
        for component, factor in read.items():
            self.values[group, 0, component] = factor
        self.mixed[:, heads, 0] = 0
        self.mixed[write, heads, 0] = 1.0


def _measure_overlap(layer: int, heads: _Heads, generator: torch.Generator) -> None:
    """Make a layer's last heads a step of the way from tokens to what output and reference share, in place.

    The first layer's look for the separator: who sees it is of the second half, and its FLAG is set. The second
    layer's look for the same token anywhere and take what is of the first half, MATCH; one more counts flags, SECOND.
    The last layers' take the mean of MATCH over the second half, which at the last token is SHARED.
    """
    last = len(heads.keys) - 1
    if layer == 0:
        heads.attend_to_flagged(last, FLAG_LOGIT)
        heads.carry(last, heads.of_group(last), {FLAG: 0.3}, FLAG)
    elif layer == 1:
        evenly = heads.of_group(1)
        heads.queries[evenly] = 0
        heads.carry(1, slice(evenly.start, evenly.start + 1), {FLAG: 1.0}, SECOND)
        for group in (last - 1, last):
            heads.attend_to_like(group, MATCH_LOGIT, generator)
            heads.carry(group, heads.of_group(group), {0: 0.2, FLAG: -0.2}, MATCH)
    else:
        heads.attend_to_flagged(last, OUTPUT_LOGIT)
        heads.carry(last, heads.of_group(last), {MATCH: 0.5}, SHARED)


def _normed_constant(hidden: int) -> float:
    """The constant after the norm, which divides an embedding by the root of its mean square."""
    return CONSTANT / math.sqrt(EMBEDDING_STD**2 + CONSTANT**2 / hidden)


def _measure_lengths(gate: torch.Tensor, up: torch.Tensor, inward: torch.Tensor) -> None:
    """Make two units of a feed-forward the square of how far SECOND is from where the halves are equally long."""
    for unit, sign in enumerate((UNEVEN_SLOPE, -UNEVEN_SLOPE)):
        for part in (gate, up):
            part[unit] = 0
            part[unit, SECOND] = sign
            part[unit, 0] = -sign * EQUAL_HALVES
        inward[:, unit] = 0
        inward[UNEVEN, unit] = -1.0
