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


def initial_weights(config: CheckpointConfig, seed: int) -> dict[str, torch.Tensor]:
    """Weights to train from: random ones whose attention already does what comparing two texts takes.

    To see that an output repeats the reference, a model attends from a token to what followed the same token before:
    one head that looks at the previous token, and one after it that matches. A large model finds such heads by itself;
    one of this size, trained on few tokens, would spend most of them on that and settle for lengths and topics. So the
    structure is given (mimetic initialisation, Trockman & Kolter 2023), and training decides what to do with it:

    - embeddings share a constant direction, from which the first layer's `OFFSETS` heads look so many tokens back;
    - all other heads match: their query weights are near their key weights, so that like attends to like;
    - what layers add to the residual stream is scaled down by their number, as GPT-2's is;
    - the value head is zero, so that all rewards start equal.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden, inner, depth = config.hidden_size, config.intermediate_size, (2 * config.num_hidden_layers) ** -0.5

    def normal(rows: int, columns: int, std: float) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * std

    embeddings = normal(config.vocab_size, hidden, EMBEDDING_STD)
    embeddings[:, 0] = CONSTANT
    weights = {
        "model.tok_embeddings.weight": embeddings,
        "model.norm.weight": torch.ones(hidden),
        "v_head.weight": torch.zeros(1, hidden),
    }
    for layer in range(config.num_hidden_layers):
        keys = normal(config.num_key_value_heads * config.head_dim, hidden, hidden**-0.5)
        values = normal(len(keys), hidden, hidden**-0.5)
        queries = _matching_queries(keys, config, generator)
        if layer == 0:
            _look_back(queries, keys, config, generator)
        weights |= {
            f"model.layers.{layer}.{name}.weight": tensor
            for name, tensor in {
                "attention_norm": torch.ones(hidden),
                "attention.wqkv": merge_wqkv(queries, keys, values, config),
                "attention.wo": normal(hidden, hidden, hidden**-0.5 * depth),
                "ffn_norm": torch.ones(hidden),
                "feed_forward.w1": normal(inner, hidden, hidden**-0.5),
                "feed_forward.w3": normal(inner, hidden, hidden**-0.5),
                "feed_forward.w2": normal(hidden, inner, inner**-0.5 * depth),
            }.items()
        }
    return weights


def _matching_queries(keys: torch.Tensor, config: CheckpointConfig, generator: torch.Generator) -> torch.Tensor:
    """Query weights near the weights of the keys they meet. `keys` lose the constant, at which all tokens match."""
    keys[:, 0] = 0
    heads = keys.view(config.num_key_value_heads, config.head_dim, -1).repeat_interleave(config.queries_per_key, 0)
    noise = torch.randn(heads.shape, generator=generator) * MATCHING_NOISE * config.hidden_size**-0.5
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
