"""Parts of a corpus, each beside the first."""

import random
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from polar_ray.corpus.summary import UnitReport
from polar_ray.corpus.trend import FEWEST_ROWS, MOST_PARTS, Trend
from polar_ray.health import reward_bin


def unit(rows, mean=-3.0, seed=0):
    bins: dict[int, int] = {}
    draw = random.Random(seed)
    for _ in range(rows):
        place = reward_bin(draw.gauss(mean, 1.0))
        bins[place] = bins.get(place, 0) + 1
    return UnitReport(rows=rows, ok=rows, reward_bins=bins)


@given(st.lists(st.integers(1, 900), min_size=1, max_size=30))
def test_parts_are_the_corpus_in_order_and_few(sizes):
    trend = Trend(sum(sizes))
    reports = [UnitReport(rows=size, ok=size, reward_bins={-4: size}) for size in sizes]
    assert list(trend.passing(reports)) == reports
    parts = trend.parts
    assert len(parts) <= MOST_PARTS
    assert all(part.stop - part.start >= FEWEST_ROWS for part in parts)
    assert all(before.stop == after.start for before, after in pairwise(parts))
    assert [part.start for part in parts[:1]] + [part.stop for part in parts[-1:]] == ([0, sum(sizes)] if parts else [])
    assert bool(parts) == (sum(sizes) >= FEWEST_ROWS)
    assert not [part for part in parts if abs(part.drift) > 0.02 or part.mean != -0.875]


def test_a_change_shows_where_it_happened():
    trend = Trend(10_000)
    for number in range(10):
        trend.add(unit(1000, mean=-3.0 if number < 7 else 0.0, seed=number))
    drifts = [part.drift for part in trend.parts]
    assert len(drifts) == 10
    assert drifts[0] == 0
    assert max(drifts[:7]) < 0.1
    assert min(drifts[7:]) > 1
