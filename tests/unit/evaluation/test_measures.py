"""Every measure beside the slow, obvious way to compute it; intervals beside the truth they should cover."""

import math
from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polar_ray.evaluation.measures import (
    auc_with_interval,
    best_of,
    draw_groups,
    percentile_interval,
    rank_correlation,
    ratio_intervals,
    wins,
)

values = st.integers(-3, 3).map(float)
"""Few different ones, so that there are ties."""

rows = st.lists(st.tuples(values, st.booleans()), min_size=2, max_size=12)


def test_a_tie_is_half_a_win():
    assert wins(np.array([-2.0, 0.0, 1e-9])).tolist() == [0.0, 0.5, 1.0]


@settings(deadline=None)
@given(rows)
def test_auc_is_the_share_of_good_and_bad_pairs_in_order(rows):
    scores, is_good = (np.array(column) for column in zip(*rows, strict=True))
    good, bad = scores[is_good], scores[~is_good]
    auc, _ = auc_with_interval(scores, is_good, np.arange(len(rows)), 100, 0)
    if not len(good) or not len(bad):
        assert auc is None
        return
    expected = [1.0 if high > low else 0.5 if high == low else 0.0 for high in good for low in bad]
    assert auc == pytest.approx(np.mean(expected))


@settings(deadline=None)
@given(st.lists(st.tuples(values, st.integers(0, 4)), min_size=1, max_size=7), st.data())
def test_best_of_n_is_the_mean_over_every_draw_and_every_order_among_equals(rows, data):
    scores, labels = (np.array(column, float) for column in zip(*rows, strict=True))
    n = data.draw(st.integers(1, len(rows)))
    picked = []
    for drawn in combinations(range(len(rows)), n):
        top = max(scores[list(drawn)])
        picked.append(np.mean([labels[place] for place in drawn if scores[place] == top]))
    assert best_of(scores, labels, n) == pytest.approx(np.mean(picked))


def test_best_of_many_is_exact_where_binomials_are_huge():
    scores = np.arange(400.0)
    assert best_of(scores, (scores == 399).astype(float), 200) == pytest.approx(0.5)
    assert best_of(scores, scores, 400) == pytest.approx(399)


@settings(deadline=None)
@given(st.lists(st.tuples(values, values), min_size=2, max_size=5))
def test_rank_correlation_is_that_of_average_ranks(pairs):
    one, other = (np.array(column) for column in zip(*pairs, strict=True))

    def ranks(some):
        return [np.mean([order.index(place) for order in orders(some)]) for place in range(len(some))]

    def orders(some):
        return [order for order in permutations(range(len(some))) if all(np.diff(some[list(order)]) >= 0)]

    if len(set(one)) == 1 or len(set(other)) == 1:
        assert rank_correlation(one, other) == 0
    else:
        assert rank_correlation(one, other) == pytest.approx(np.corrcoef(ranks(one), ranks(other))[0, 1])


def test_a_resample_draws_as_many_groups_as_there_are():
    drawn = np.array(list(draw_groups(7, 500, seed=3)))
    assert (drawn.sum(axis=1) == 7).all()
    assert drawn.mean(axis=0) == pytest.approx(np.ones(7), abs=0.15)
    assert (drawn == np.array(list(draw_groups(7, 500, seed=3)))).all()
    assert (drawn != np.array(list(draw_groups(7, 500, seed=4)))).any()


def test_an_interval_is_that_of_resampling_the_rows_themselves():
    generator = np.random.default_rng(0)
    groups = generator.integers(0, 40, 200)
    won = generator.integers(0, 2, 200).astype(float)
    (interval,) = ratio_intervals([won], [np.ones(200)], groups, 400, seed=5)
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    slow = []
    for counts in draw_groups(len(members), 400, seed=5):
        drawn = np.concatenate([some for some, count in zip(members, counts, strict=True) for _ in range(int(count))])
        slow.append(won[drawn].mean())
    assert (interval.low, interval.high) == pytest.approx(tuple(np.percentile(slow, [2.5, 97.5])))


def test_intervals_cover_the_truth_as_often_as_they_say_although_pairs_of_a_group_are_alike():
    """Each group has a success rate of its own, so that pairs are not independent; the mean rate is 0.5."""
    generator = np.random.default_rng(1)
    n_groups, size, runs = 60, 8, 300
    groups = np.repeat(np.arange(n_groups), size)
    covered = covered_by_pairs = 0
    for run in range(runs):
        rates = generator.beta(1, 1, n_groups)
        won = (generator.random(n_groups * size) < np.repeat(rates, size)).astype(float)
        ones = np.ones(len(won))
        (interval,) = ratio_intervals([won], [ones], groups, 200, seed=run)
        (naive,) = ratio_intervals([won], [ones], np.arange(len(won)), 200, seed=run)
        covered += interval.low <= 0.5 <= interval.high
        covered_by_pairs += naive.low <= 0.5 <= naive.high
    assert 0.90 <= covered / runs <= 0.98
    assert covered_by_pairs / runs < 0.80


def test_the_interval_of_auc_covers_the_truth():
    """Good rows are one standard deviation above bad ones: AUC is the normal distribution at 1 / sqrt(2)."""
    truth = 0.5 * (1 + math.erf(0.5))
    generator = np.random.default_rng(2)
    covered = 0
    for run in range(120):
        is_good = generator.random(240) < 0.4
        scores = generator.normal(size=240) + is_good
        auc, interval = auc_with_interval(scores, is_good, np.repeat(np.arange(60), 4), 150, seed=run)
        assert interval.low <= auc <= interval.high
        covered += interval.low <= truth <= interval.high
    assert 0.88 <= covered / 120 <= 0.99


def test_the_interval_of_a_difference_is_of_paired_figures():
    generator = np.random.default_rng(3)
    won = generator.integers(0, 2, 300).astype(float)
    rival = won.copy()
    rival[:10] = 1 - rival[:10]
    ones = np.ones(300)
    own, ahead = ratio_intervals([won, won - rival], [ones, ones], np.arange(300), 500, seed=0)
    assert ahead.high - ahead.low < (own.high - own.low) / 2


@pytest.mark.parametrize(
    ("won", "groups"),
    [([1.0, 0.0, 1.0], [4, 4, 4]), ([1.0, 1.0, 1.0], [1, 2, 3]), ([], [])],
    ids=["one group", "all won", "nothing"],
)
def test_no_interval_where_the_bootstrap_has_nothing_to_say(won, groups):
    assert ratio_intervals([np.array(won)], [np.ones(len(won))], np.array(groups, np.int64), 100, 0) == [None]


def test_resamples_without_any_of_a_part_do_not_count_for_it():
    won, part = np.array([1.0, 0.0, 1.0, 0.0]), np.array([1.0, 1.0, 0.0, 0.0])
    (interval,) = ratio_intervals([won * part], [part], np.arange(4), 400, 0)
    assert (interval.low, interval.high) == (0.0, 1.0)
    assert percentile_interval(np.array([np.nan, np.nan])) is None
