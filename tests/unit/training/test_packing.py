"""Packs and steps: every pair once, within the budget, the same on every machine."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polar_ray.config import TrainConfig
from polar_ray.training.packing import PairSizes, cost_alone, make_schedule


def make_sizes(n_groups: int, pairs_per_group: int, seed: int = 0) -> PairSizes:
    """Groups of pairs among a few outputs; a sequence's key is its group and its number."""
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(n_groups), pairs_per_group)
    shared = rng.integers(16, 60, n_groups)[group]
    own = rng.integers(1, 40, (n_groups, 4))
    chosen, rejected = (rng.integers(0, 2, len(group)) + 2 * side for side in (0, 1))
    return PairSizes(
        shared_tokens=shared,
        chosen_tokens=shared + own[group, chosen],
        rejected_tokens=shared + own[group, rejected],
        group=group,
        chosen=10 * group + chosen,
        rejected=10 * group + rejected,
    )


def tokens_of(sizes: PairSizes, pack: np.ndarray) -> int:
    """Computed tokens of a pack: each prefix once, each different output once."""
    prefixes = {int(sizes.group[pair]): int(sizes.shared_tokens[pair]) for pair in pack}
    outputs = {}
    for pair in pack:
        outputs[int(sizes.chosen[pair])] = int(sizes.chosen_tokens[pair] - sizes.shared_tokens[pair])
        outputs[int(sizes.rejected[pair])] = int(sizes.rejected_tokens[pair] - sizes.shared_tokens[pair])
    return sum(prefixes.values()) + sum(outputs.values())


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 20),
    st.integers(1, 6),
    st.sampled_from(["pairs", "groups"]),
    st.integers(200, 2000),
    st.integers(1, 3),
)
def test_every_pair_is_in_one_pack_of_each_epoch_and_no_pack_is_too_large(n_groups, each, shuffle, most, epochs):
    sizes = make_sizes(n_groups, each)
    config = TrainConfig(shuffle=shuffle, max_packed_tokens=most, epochs=epochs, packs_per_step=2)
    schedule = make_schedule(sizes, config)
    places = np.concatenate(schedule.packs)
    assert np.array_equal(np.sort(places), np.repeat(np.arange(len(sizes)), epochs))
    costs = [tokens_of(sizes, pack) for pack in schedule.packs]
    assert max(costs) <= most
    assert sum(costs) == schedule.computed_tokens


def test_without_sharing_whole_sequences_count():
    sizes = make_sizes(10, 3)
    config = TrainConfig(share_prefixes=False, max_packed_tokens=500, packs_per_step=1)
    schedule = make_schedule(sizes, config)
    for pack in schedule.packs:
        assert (sizes.chosen_tokens[pack] + sizes.rejected_tokens[pack]).sum() <= 500
    assert schedule.computed_tokens == sizes.tokens == cost_alone(sizes, False).sum()


def test_pairs_of_a_group_stay_together_and_cost_less():
    sizes = make_sizes(40, 8)
    by_pair, by_group = (
        make_schedule(sizes, TrainConfig(shuffle=shuffle, max_packed_tokens=1000, packs_per_step=1))
        for shuffle in ("pairs", "groups")
    )
    order = sizes.group[np.concatenate(by_group.packs)]
    assert (np.diff(order) != 0).sum() == 39
    assert by_group.computed_tokens < 0.6 * by_pair.computed_tokens


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_a_step_has_the_same_packs_whatever_the_number_of_workers(workers):
    sizes = make_sizes(30, 4)
    schedule = make_schedule(sizes, TrainConfig(max_packed_tokens=400, packs_per_step=4))
    for step in range(schedule.n_steps):
        of_step = [[pack.tolist() for pack in schedule.packs_of_worker(step, rank, workers)] for rank in range(workers)]
        assert len({len(packs) for packs in of_step}) == 1, "workers wait for each other"
        found = sorted(pack for packs in of_step for pack in packs if pack)
        assert found == sorted(pack.tolist() for pack in schedule.packs_of_step(step))


def test_a_seed_is_an_order_and_epochs_differ():
    sizes = make_sizes(30, 4)
    first, again, other = (
        np.concatenate(make_schedule(sizes, TrainConfig(seed=seed, epochs=2)).packs).tolist() for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other
    assert first[:120] != first[120:]


def test_max_steps_ends_the_schedule():
    sizes = make_sizes(30, 4)
    schedule = make_schedule(sizes, TrainConfig(max_packed_tokens=400, packs_per_step=2, max_steps=3))
    assert schedule.n_steps == 3
    assert len(schedule.packs) == 6
