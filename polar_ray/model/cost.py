"""Floating point operations of a pass through the model, counted from its shape: two for each weight that a token
meets, and four for each element of a query's head and each key that it sees. And the bytes that it moves."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from polar_ray.planning import Batch

if TYPE_CHECKING:  # it loads torch, and every actor and command that scores imports this module
    from polar_ray.model.architecture import CheckpointConfig

PEAK_FLOPS = {
    "a100": 312e12,
    "b200": 2250e12,
    "h100": 989e12,
    "h20": 148e12,
    "h200": 989e12,
    "l4": 121e12,
    "l40s": 362e12,
}
"""Dense bfloat16 operations per second of the makers' data sheets (SXM variants), without sparsity."""

OTHER_BUILDS = {"nvl", "pcie"}
"""In a GPU's name: builds of the same chip whose peak is another."""


def peak_flops_of(gpu: str, dtype: str) -> float | None:
    """The peak of a GPU that calls itself `gpu` ("NVIDIA H100 80GB HBM3"); None where it is not known, or not for
    `dtype`."""
    words = set(re.split(r"[^a-z0-9]+", gpu.lower()))
    if dtype not in ("bfloat16", "float16") or words & OTHER_BUILDS:
        return None
    return next((peak for name, peak in PEAK_FLOPS.items() if name in words), None)


def causal_pairs(n: int) -> int:
    """Pairs of a query and a key in causal attention over `n` tokens."""
    return n * (n + 1) // 2


def flops(config: CheckpointConfig, tokens: int, pairs: int, n_rewards: int | None = None) -> float:
    """Of `tokens` tokens whose queries meet `pairs` keys.

    With `n_rewards` the last layer computes keys and values for every token and the rest for that many only, as the
    torch engine does; its attention is then left out, as it is nearly nothing. Embedding and head are left out too.
    """
    hidden, key_width = config.hidden_size, config.num_key_value_heads * config.head_dim
    key_value = 2 * hidden * key_width
    others = 2 * hidden * hidden + 3 * hidden * config.intermediate_size
    layers, last = config.num_hidden_layers, 0
    if n_rewards is not None:
        layers, last = layers - 1, 2 * (tokens * key_value + n_rewards * others)
    return float(layers * (2 * tokens * (key_value + others) + 4 * pairs * hidden) + last)


def flops_of_lengths(config: CheckpointConfig, lengths: Sequence[int]) -> float:
    """Of whole sequences, the last layer too."""
    return flops(config, sum(lengths), sum(map(causal_pairs, lengths)))


def flops_of_batches(config: CheckpointConfig, batches: Iterable[Batch]) -> float:
    """Of planned batches on an engine that computes each prefix once and the last layer where it is read."""
    tokens = pairs = rewards = 0
    for batch in batches:
        tokens += batch.computed_tokens
        rewards += len(batch)
        for start, node in zip(batch.starts, batch.nodes, strict=True):
            pairs += start * len(node.ids) + causal_pairs(len(node.ids))
    return flops(config, tokens, pairs, rewards)


def bytes_of_batches(config: CheckpointConfig, batches: Iterable[Batch], chunk_tokens: int) -> float:
    """What a GPU's memory reads and writes at least for planned batches in 16 bits, if each product, the attention and
    each step between them is a kernel: weights once for every `chunk_tokens` tokens, everything else where a kernel
    takes it and where it leaves it, the residual stream in float32.

    The attention's keys and values count once for each node that reads them. Copies of shared ones do not count.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    key_width = config.num_key_value_heads * config.head_dim
    embed = 6 * hidden
    # Norm; key and value product; their rotation and placing.
    key_value = 6 * hidden + (2 * hidden + 4 * key_width) + 8 * key_width
    # Query product, rotation, attention, output product; sum and norm; gate and up; gating; down; sum.
    others = 4 * 4 * hidden + 12 * hidden + 4 * (hidden + inner) + 6 * inner + 2 * (inner + hidden) + 10 * hidden
    weights = 2 * (2 * hidden * hidden + 2 * hidden * key_width + 3 * hidden * inner)
    layers, total = config.num_hidden_layers, 0
    for batch in batches:
        tokens, chunks = batch.computed_tokens, -(-batch.computed_tokens // chunk_tokens)
        keys = sum(start + len(node.ids) for start, node in zip(batch.starts, batch.nodes, strict=True))
        total += tokens * embed
        total += (layers - 1) * (chunks * weights + tokens * (key_value + others) + 4 * keys * key_width)
        total += chunks * weights + tokens * key_value + len(batch) * others + 4 * batch.tokens * key_width
    return float(total)
