"""Which part of each weight belongs to which rank, when several compute one model together.

A rank has whole key-value heads with the queries that read them, and a slice of the inner size. What it computes up to
`wo` and up to `w2` needs nothing of the others; the products of these two are partial sums, which are added up over the
ranks. Embedding, norms and head are every rank's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from polar_ray.errors import ConfigError
from polar_ray.model.architecture import CheckpointConfig

SPLIT_ALONG = {
    "attention.wqkv": 0,  # its rows are ordered by key-value head, each with its queries: even parts are whole heads
    "attention.wo": 1,
    "feed_forward.w1": 0,
    "feed_forward.w3": 0,
    "feed_forward.w2": 1,
}
"""The dimension along which a layer's tensor is cut."""


@dataclass(frozen=True, slots=True)
class Shard:
    """What rank `rank` of `ranks` holds of a checkpoint that `refuse_uneven` accepts."""

    rank: int = 0
    ranks: int = 1

    def config(self, config: CheckpointConfig) -> CheckpointConfig:
        """The numbers of heads and the inner size that this rank computes; all else is the whole model's."""
        names = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
        return config.model_copy(update={name: getattr(config, name) // self.ranks for name in names})

    def part(self, name: str, shape: Sequence[int]) -> tuple[slice, ...]:
        """Where this rank's part of tensor `name`, of `shape`, lies; empty for the whole of it."""
        along = next((along for key, along in SPLIT_ALONG.items() if name.endswith(f".{key}.weight")), None)
        if along is None or self.ranks == 1:
            return ()
        size = shape[along] // self.ranks
        mine = slice(self.rank * size, (self.rank + 1) * size)
        return (slice(None),) * along + (mine,)


def refuse_uneven(config: CheckpointConfig, ranks: int) -> None:
    """Raise `ConfigError` for a number of ranks that does not divide what they share among them."""
    for name in ("num_key_value_heads", "intermediate_size"):
        if getattr(config, name) % ranks:
            common = math.gcd(config.num_key_value_heads, config.intermediate_size)
            sizes = [str(size) for size in range(1, common + 1) if common % size == 0]
            raise ConfigError(
                f"engine.tensor_parallel_size = {ranks}: does not divide this model's {name} = "
                f"{getattr(config, name)}; take one of {', '.join(sizes)}"
            )
