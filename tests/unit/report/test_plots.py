"""What is drawn is what was counted."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from polar_ray.report.plots import MOST_BARS, gather, quantile, round_ticks


def test_two_far_modes_are_both_drawn():
    gathered = gather({0: 500, 10_000: 500})
    assert (gathered.below, gathered.above) == (0, 0)


@settings(deadline=None)
@given(st.dictionaries(st.integers(-(10**6), 10**6), st.integers(1, 10**9), min_size=1, max_size=200))
def test_gathering_loses_no_row(bins):
    gathered = gather(bins)
    assert sum(gathered.counts) == sum(bins.values())
    assert len(gathered.counts) <= MOST_BARS
    assert gathered.below == sum(count for place, count in bins.items() if place < gathered.first)
    assert gathered.above == sum(count for place, count in bins.items() if place >= gathered.last)


@settings(deadline=None)
@given(st.lists(st.integers(-50, 50), min_size=1), st.floats(0.01, 0.99))
def test_a_quantile_is_in_the_bin_of_the_true_one(values, share):
    bins = {value: values.count(value) for value in values}
    assert np.floor(quantile(bins, share)) in bins or quantile(bins, share) - 1 in bins
    assert sum(value + 1 <= quantile(bins, share) for value in values) <= share * len(values) + 1e-6


@settings(deadline=None)
@given(st.floats(-1e9, 1e9), st.floats(1e-3, 1e9))
def test_ticks_are_few_and_inside(low, width):
    ticks = round_ticks(low, low + width, 6)
    assert 1 <= len(ticks) <= 7
    assert all(low - 1e-6 * width <= value <= low + width * (1 + 1e-6) for value, _ in ticks)
