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


@given(st.lists(st.integers(1, 900), min_size=1, max_size=30), st.randoms(use_true_random=False))
def test_parts_are_the_corpus_in_order_and_few(sizes, shuffler):
    trend = Trend(sizes)
    numbers = list(range(len(sizes)))
    shuffler.shuffle(numbers)
    for number in numbers:
        trend.add(number, UnitReport(rows=sizes[number], ok=sizes[number], reward_bins={-4: sizes[number]}))
    parts = trend.parts
    assert len(parts) <= MOST_PARTS
    assert all(part.stop - part.start >= FEWEST_ROWS for part in parts)
    assert all(before.stop == after.start for before, after in pairwise(parts))
    assert [part.start for part in parts[:1]] + [part.stop for part in parts[-1:]] == ([0, sum(sizes)] if parts else [])
    assert bool(parts) == (sum(sizes) >= FEWEST_ROWS)
    assert not [part for part in parts if abs(part.drift) > 0.02 or part.mean != -0.875]


def test_a_change_shows_where_it_happened():
    trend = Trend([1000] * 10)
    for number in reversed(range(10)):
        trend.add(number, unit(1000, mean=-3.0 if number < 7 else 0.0, seed=number))
    parts = trend.parts
    assert [part.start for part in parts] == list(range(0, 10_000, 1000))
    drifts = [part.drift for part in parts]
    assert drifts[0] == 0
    assert max(drifts[:7]) < 0.1
    assert min(drifts[7:]) > 1


def test_rows_without_rewards_are_joined_to_their_neighbours():
    trend = Trend([600] * 4)
    for number in (0, 3):
        trend.add(number, unit(600))
    trend.add(1, UnitReport(rows=600))
    assert [(part.start, part.stop) for part in trend.parts] == [(0, 600), (600, 2400)]
