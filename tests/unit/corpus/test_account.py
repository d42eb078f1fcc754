"""A job added up as its units report is what all reports together are."""

import random

import pytest

from polar_ray.corpus.account import Account
from polar_ray.corpus.summary import UnitReport, combine

SIZES = [600, 700, 20, 900, 400]


def report(unit):
    rows = SIZES[unit]
    return UnitReport(
        rows=rows, ok=rows, by_status={"ok": rows}, tokens=10 * rows, computed_tokens=4 * rows, reward_sum=-2.5 * rows,
        lowest_reward=-3.0 - unit, highest_reward=-2.0, reward_bins={-10: rows}, finished=[(100.0 - unit, rows, 1, 1)],
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_in_any_order_it_comes_to_the_same(seed):
    account = Account(SIZES)
    order = random.Random(seed).sample(range(len(SIZES)), len(SIZES))
    for n, unit in enumerate(order):
        assert account.missing == sorted(order[n:])
        assert account.add(unit, report(unit))
    assert account.missing == []
    account.total.finished.sort()
    assert account.total == combine(report(unit) for unit in range(len(SIZES)))
    assert [(part.start, part.stop) for part in account.parts] == [(0, 600), (600, 1300), (1300, 2620)]


def test_a_unit_that_two_actors_tell_of_counts_once():
    account = Account(SIZES)
    assert [account.add(1, report(1)) for _ in range(2)] == [True, False]
    assert account.total.rows == 700
    assert account.missing == [0, 2, 3, 4]
