"""Signs of unhealthy rewards, and their sums, which are the same however the rows are divided."""

import math
import random
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_ray.errors import RowUnreadable
from polar_ray.health import (
    FEWEST_RECENT_ROWS,
    REFERENCE_ROWS,
    Moments,
    RecentHealth,
    RewardHealth,
    Spread,
    drift,
    examine,
    reward_bin,
)
from polar_ray.triples import Rendered, Scored, TokenIds, Triple

LONG = "The capital of China is Beijing, in the north of the country."
TEXTS = st.sampled_from(["", "Beijing.", "Shanghai.", LONG, f"As they say: {LONG}"])
GROUPS = st.lists(
    st.tuples(TEXTS, st.lists(st.tuples(TEXTS, st.none() | st.integers(-12, 4).map(float)), min_size=1, max_size=4)),
    max_size=6,
)


def rows_of(groups, first=0):
    """Triples and results of groups given as (reference, [(output, reward)])."""
    triples, scored = [], []
    for number, (reference, members) in enumerate(groups, first):
        for output, reward in members:
            triples.append(Triple(f"question {number}", reference, output))
            scored.append(Scored(None, "engine_failed", "x") if reward is None else Scored(reward))
    return triples, scored


@given(GROUPS, GROUPS)
def test_the_sum_of_two_parts_is_the_whole(first, second):
    whole, whole_spread = examine(*rows_of(first + second))
    total, spread = examine(*rows_of(first))
    other, other_spread = examine(*rows_of(second, first=len(first)))
    total += other
    for name in ("rows", "equal_echoes", "contained_echoes"):
        assert getattr(total, name) == getattr(whole, name)
    for name in Moments.model_fields:
        assert getattr(total.length, name) == getattr(whole.length, name)
        assert getattr(total.length_in_groups, name) == pytest.approx(getattr(whole.length_in_groups, name), abs=1e-9)
    assert spread.groups + other_spread.groups == whole_spread.groups
    assert spread.zero_groups + other_spread.zero_groups == whole_spread.zero_groups


@given(st.lists(st.tuples(st.integers(0, 4000), st.floats(-12, 4)), min_size=2, max_size=50))
def test_the_correlation_is_pearsons(pairs):
    moments = Moments()
    xs, ys = [x for x, _ in pairs], [y for _, y in pairs]
    moments.add(xs, ys)
    if statistics.pstdev(xs) < 1e-3 * (1 + max(xs)) or statistics.pstdev(ys) < 1e-3 * (1 + max(map(abs, ys))):
        return
    assert moments.correlation == pytest.approx(statistics.correlation(xs, ys), abs=1e-5)


def test_what_does_not_vary_has_no_correlation():
    for pairs in ([], [(3, 0.1)], [(3, 0.1)] * 1000, [(n, 0.1) for n in range(1000)]):
        moments = Moments()
        moments.add([x for x, _ in pairs], [y for _, y in pairs])
        assert moments.correlation is None


def test_echoes_are_outputs_that_are_or_hold_the_reference():
    group = [(LONG, 1.0), (f" {LONG}\n", 1.0), (f"I quote: {LONG} Done.", 0.5), ("Beijing.", 0.5), (LONG[:-1], 0.0)]
    health, _ = examine(*rows_of([(LONG, group)]))
    assert (health.rows, health.equal_echoes, health.contained_echoes) == (5, 2, 1)
    short, _ = examine(*rows_of([("Beijing.", [("Beijing.", 1.0), ("It is Beijing.", 1.0)])]))
    assert (short.equal_echoes, short.contained_echoes) == (1, 0)


def test_conversations_are_read_as_their_contents():
    messages = [{"role": "assistant", "content": LONG}]
    health, spread = examine([Triple("q", messages, LONG), Triple("q", messages, messages)], [Scored(1.0)] * 2)
    assert (health.equal_echoes, health.length.x, spread.zero_groups) == (2, 2 * len(LONG), 1)


def test_rows_without_texts_or_rewards_are_in_no_figure():
    rows = [Rendered("a"), TokenIds([1]), RowUnreadable("x"), Triple("q", "r", "o")]
    scored = [Scored(1.0), Scored(1.0), Scored(None, "x", "x"), Scored(None, "x", "x")]
    assert examine(rows, scored) == (RewardHealth(), Spread())


def test_length_in_groups_does_not_see_what_differs_between_groups():
    groups = [("r", [("x" * 10, -8.0), ("x" * 12, -8.2)]), ("r", [("x" * 100, 0.0), ("x" * 102, -0.2)])]
    health, _ = examine(*rows_of(groups))
    assert health.length.correlation > 0.99
    assert health.length_in_groups.correlation == pytest.approx(-1)


def bins_of(rewards):
    bins: dict[int, int] = {}
    for reward in rewards:
        bins[reward_bin(reward)] = bins.get(reward_bin(reward), 0) + 1
    return bins


def draws(mean, n, seed):
    draw = random.Random(seed)
    return bins_of(draw.gauss(mean, 2.0) for _ in range(n))


def test_drift_grows_with_the_change():
    reference = draws(-3.0, 2000, 1)
    values = [drift(reference, draws(mean, 2000, 2)) for mean in (-3.0, -2.5, -2.0, 0.0, 6.0)]
    assert values == sorted(values)
    assert drift(reference, reference) == pytest.approx(0)
    assert values[0] < 0.03
    assert values[2] > 0.2
    assert values[-1] > 2


def test_drift_is_the_index_of_its_definition():
    reference, recent = (
        dict.fromkeys(range(10), 100),
        {**dict.fromkeys(range(5), 200), **dict.fromkeys(range(5, 10), 0)},
    )
    was = (np.array([0, *[100] * 10, 0]) + 0.5) / 1006
    now = (np.array([0, *[200] * 5, *[0] * 5, 0]) + 0.5) / 1006
    assert drift(reference, recent) == pytest.approx(float(((now - was) * np.log(now / was)).sum()))


def test_rewards_that_were_all_equal_drift_too():
    assert drift({-4: 1000}, {-4: 500}) < 0.01
    assert drift({-4: 1000}, {5: 500}) > 1


@given(
    st.dictionaries(st.integers(-60, 60), st.integers(1, 100)),
    st.dictionaries(st.integers(-60, 60), st.integers(1, 100)),
)
def test_drift_is_finite_and_never_below_nothing(reference, recent):
    found = drift(reference, recent)
    assert found is None if not (reference and recent) else (math.isfinite(found) and found > -1e-12)


def test_the_latest_rewards_are_held_against_the_first():
    recent = RecentHealth()
    recent.add(draws(-3.0, REFERENCE_ROWS, 1), RewardHealth())
    assert recent.drift is None
    recent.add(draws(-3.0, FEWEST_RECENT_ROWS, 2), RewardHealth())
    assert recent.drift < 0.1
    for seed in range(3, 8):
        recent.add(draws(0.0, 1000, seed), RewardHealth())
    changed = recent.drift
    assert changed > 0.25
    for seed in range(8, 20):
        recent.add(draws(-3.0, 1000, seed), RewardHealth())
    assert recent.drift < 0.1, "what is long past is forgotten"


def test_the_latest_lengths_decide():
    recent = RecentHealth()

    def rows(sign):
        group = [("x" * n, sign * n / 10) for n in range(1, 101)]
        return examine(*rows_of([("r", group)]))[0]

    for _ in range(10):
        recent.add({}, rows(1))
    assert recent.length_correlation == pytest.approx(1)
    assert recent.length_correlation_in_groups == pytest.approx(1)
    for _ in range(60):
        recent.add({}, rows(-1))
    assert recent.length_correlation < -0.8
