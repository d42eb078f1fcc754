"""From pairs to packs and steps: which pairs are computed together, and in which order. Pure: sizes in, places out.

The same sizes, seed and settings give the same packs, on any machine and for any number of workers: a run that was
killed goes on with the pack that would have come next.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from polar_ray.config.training import TrainConfig

Ints = npt.NDArray[np.int64]


NO_PAIRS: Ints = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class PairSizes:
    """Columns over pairs: what packing needs to know of each.

    Equal keys mean equal ids: `group` of what chosen and rejected share, `chosen` and `rejected` of the sequences.
    """

    shared_tokens: Ints
    chosen_tokens: Ints
    """Of the whole sequence."""

    rejected_tokens: Ints
    group: Ints
    chosen: Ints
    rejected: Ints

    def __len__(self) -> int:
        return len(self.group)

    @property
    def tokens(self) -> int:
        """Of all sequences, each computed whole."""
        return int(self.chosen_tokens.sum() + self.rejected_tokens.sum())


@dataclass(frozen=True)
class Schedule:
    """`packs[i]` are places of pairs. Step `s` takes packs `s * packs_per_step` to the next step's."""

    packs: list[Ints]
    packs_per_step: int
    computed_tokens: int
    """Of all packs, at most: what pairs of a pack have in common by chance is not counted off."""

    @property
    def n_steps(self) -> int:
        return -(-len(self.packs) // self.packs_per_step)

    def pairs_of_step(self, step: int) -> int:
        """Pairs that make the gradient of a step."""
        return sum(len(pack) for pack in self.packs_of_step(step))

    def packs_of_step(self, step: int) -> list[Ints]:
        return self.packs[step * self.packs_per_step : (step + 1) * self.packs_per_step]

    def packs_of_worker(self, step: int, rank: int, workers: int) -> list[Ints]:
        """One worker's share of a step: as many packs as any other's, of which some are empty in a last step."""
        packs = self.packs_of_step(step)
        places = range(rank, -(-len(packs) // workers) * workers, workers)
        return [packs[place] if place < len(packs) else NO_PAIRS for place in places]


def cost_alone(sizes: PairSizes, share_prefixes: bool) -> Ints:
    """Tokens that each pair computes where nothing else is in its pack."""
    total = sizes.chosen_tokens + sizes.rejected_tokens
    return total - sizes.shared_tokens if share_prefixes else total


def make_schedule(sizes: PairSizes, config: TrainConfig) -> Schedule:
    """Packs of all epochs, of at most `max_packed_tokens`, filled in the order of the pairs as upstream fills them.

    Pairs that fit no pack must have been taken out before. Epochs do not share packs. A last step may have fewer
    packs than the others. With `max_steps` the schedule ends there.
    """
    packs: list[Ints] = []
    computed = 0
    for epoch in range(config.epochs):
        rng = np.random.default_rng([config.seed, epoch])
        for pack, tokens in _fill(sizes, _order(sizes, config, rng), config):
            packs.append(pack)
            computed += tokens
            if config.max_steps is not None and len(packs) == config.max_steps * config.packs_per_step:
                return Schedule(packs, config.packs_per_step, computed)
    return Schedule(packs, config.packs_per_step, computed)


def _order(sizes: PairSizes, config: TrainConfig, rng: np.random.Generator) -> Ints:
    if config.shuffle == "pairs":
        return rng.permutation(len(sizes))
    _, group = np.unique(sizes.group, return_inverse=True)
    place_of_group = rng.permutation(int(group.max(initial=-1)) + 1)
    return np.lexsort((rng.random(len(sizes)), place_of_group[group]))


def _fill(sizes: PairSizes, order: Ints, config: TrainConfig) -> Iterator[tuple[Ints, int]]:
    """(pack, tokens it computes), in order."""
    alone = cost_alone(sizes, config.share_prefixes).tolist()
    shared, chosen_tokens, rejected_tokens = (
        column.tolist() for column in (sizes.shared_tokens, sizes.chosen_tokens, sizes.rejected_tokens)
    )
    groups, chosen, rejected = (column.tolist() for column in (sizes.group, sizes.chosen, sizes.rejected))
    taken: list[int] = []
    used = 0
    seen: set[tuple[str, int]] = set()
    for pair in order.tolist():
        keys = [("group", groups[pair]), ("output", chosen[pair]), ("output", rejected[pair])]
        cost = alone[pair]
        if config.share_prefixes:
            own = (shared[pair], chosen_tokens[pair] - shared[pair], rejected_tokens[pair] - shared[pair])
            cost = sum(tokens for key, tokens in zip(keys, own, strict=True) if key not in seen)
        if taken and used + cost > config.max_packed_tokens:
            yield np.array(taken, dtype=np.int64), used
            taken, used, seen = [], 0, set()
            cost = alone[pair]
        taken.append(pair)
        used += cost
        seen.update(keys)
    if taken:
        yield np.array(taken, dtype=np.int64), used
