"""The weights that the checkpoint which ships is trained from: random, but for what comparing two texts takes."""

from __future__ import annotations

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
        _measure_overlap(layer, queries, keys, values, mixed, config, generator)
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
    # The norm divides an embedding by the root of its mean square, of which the constant has its share.
    constant = CONSTANT / (EMBEDDING_STD**2 + CONSTANT**2 / config.hidden_size) ** 0.5
    strength = (OFFSET_SHARPNESS * size**0.5) ** 0.5 / constant
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


def _measure_overlap(
    layer: int,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mixed: torch.Tensor,
    config: CheckpointConfig,
    generator: torch.Generator,
) -> None:
    """Make a layer's last heads a step of the way from tokens to what output and reference share, in place.

    The first layer's look for the separator: who sees it is of the second half, and its FLAG is set. The second
    layer's look for the same token anywhere and take what is of the first half: MATCH. The last layers' take the mean
    of MATCH over the second half, which at the last token is SHARED.
    """
    size, per_key = config.head_dim, config.queries_per_key
    slow = torch.arange(size // 2 - SLOWEST, size // 2)
    slow = torch.cat([slow, slow + size // 2])
    scale = EMBEDDING_STD**2 + CONSTANT**2 / config.hidden_size
    constant = CONSTANT / scale**0.5
    if layer == 1:  # a head that attends to all tokens alike, and counts flags
        queries.view(-1, size, config.hidden_size)[per_key : 2 * per_key] = 0
        values.view(-1, size, config.hidden_size)[1, 0] = 0
        values.view(-1, size, config.hidden_size)[1, 0, FLAG] = 1.0
        mixed[:, per_key * size] = 0
        mixed[SECOND, per_key * size] = 1.0
    groups = range(2, 4) if layer == 1 else range(3, 4)
    for group in groups:
        key, value = (part.view(-1, size, config.hidden_size)[group] for part in (keys, values))
        heads = range(group * per_key, (group + 1) * per_key)
        key.zero_()
        value[0] = 0
        if layer == 1:
            key[slow] = torch.randn(len(slow), config.hidden_size, generator=generator) * len(slow) ** -0.5
            key[:, [0, *MEASURES]] = 0
            # The mean square of a normed token is 1; of 256 components these few see their share.
            query = key * MATCH_LOGIT * size**0.5 / config.hidden_size
            value[0, 0], value[0, FLAG] = 0.2, -0.2
        elif layer == 0:
            query = torch.zeros_like(key)
            key[slow[SLOWEST - 1], FLAG] = 1.0
            query[slow[SLOWEST - 1], 0] = FLAG_LOGIT * size**0.5 / constant**2
            value[0, FLAG] = 0.3
        else:
            query = torch.zeros_like(key)
            key[slow[SLOWEST - 1], FLAG] = 1.0
            query[slow[SLOWEST - 1], 0] = OUTPUT_LOGIT * size**0.5 / constant**2
            value[0, MATCH] = 0.5
        for head in heads:
            queries.view(-1, size, config.hidden_size)[head] = query
            mixed[:, head * size] = 0
            row = (FLAG, MATCH, SHARED, SHARED)[layer]
            mixed[row, head * size] = 1.0


def _measure_lengths(gate: torch.Tensor, up: torch.Tensor, inward: torch.Tensor) -> None:
    """Make two units of a feed-forward the square of how far SECOND is from where the halves are equally long."""
    for unit, sign in enumerate((UNEVEN_SLOPE, -UNEVEN_SLOPE)):
        for part in (gate, up):
            part[unit] = 0
            part[unit, SECOND] = sign
            part[unit, 0] = -sign * EQUAL_HALVES
        inward[:, unit] = 0
        inward[UNEVEN, unit] = -1.0
