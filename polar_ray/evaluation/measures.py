"""How well values order outputs: pair accuracy, AUC, best-of-n, and how sure these figures are.

Pairs of one prompt are not independent, so the bootstrap draws whole groups. Every figure is a ratio of sums over
groups (or an AUC over weighted rows), so a resample costs one product with how often each group was drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from polar_ray.evaluation.result import Interval

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]

LOW_PERCENTILE, HIGH_PERCENTILE = 2.5, 97.5


def wins(margins: Floats) -> Floats:
    """1 for each margin above 0, one half for a tie, 0 below."""
    return (np.sign(margins) + 1) / 2


def ratio_intervals(
    numerators: Sequence[Floats], denominators: Sequence[Floats], groups: Ints, resamples: int, seed: int
) -> list[Interval | None]:
    """The interval of each sum(numerator) / sum(denominator) over units, drawing whole groups of units.

    The same groups are drawn for every ratio, so the interval of a difference is that of paired figures.
    """
    _, dense = np.unique(groups, return_inverse=True)
    n_groups = int(dense.max(initial=-1)) + 1
    if n_groups < 2:
        return [None] * len(numerators)
    columns = [*numerators, *denominators]
    sums = np.stack([np.bincount(dense, weights=column, minlength=n_groups) for column in columns], axis=1)
    drawn = np.array([counts @ sums for counts in draw_groups(n_groups, resamples, seed)])
    tops, bottoms = np.split(drawn, 2, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = np.where(bottoms > 0, tops / bottoms, np.nan)
    return [percentile_interval(ratio) for ratio in ratios.T]


def draw_groups(n_groups: int, resamples: int, seed: int) -> Iterator[Floats]:
    """For each resample, how often each group was drawn; as many draws as there are groups."""
    generator = np.random.default_rng(seed)
    for _ in range(resamples):
        yield np.bincount(generator.integers(n_groups, size=n_groups), minlength=n_groups).astype(np.float64)


def percentile_interval(values: Floats) -> Interval | None:
    """The middle 95 % of resampled figures; None where they are all one number, which says nothing of its certainty."""
    values = values[np.isfinite(values)]
    if len(values) < 2 or np.ptp(values) <= 1e-12 * max(1.0, float(np.abs(values).max())):
        return None
    low, high = np.percentile(values, [LOW_PERCENTILE, HIGH_PERCENTILE])
    return Interval(low=float(low), high=float(high))


class RocCurve:
    """AUC of values against good and bad, for any weights of the rows."""

    def __init__(self, values: Floats, is_good: Mask) -> None:
        _, self._levels = np.unique(values, return_inverse=True)
        self._is_good = is_good.astype(np.float64)

    def auc(self, weights: Floats) -> float:
        """P(value of a good row > that of a bad one), ties one half; NaN unless there are both."""
        good = np.bincount(self._levels, weights=weights * self._is_good)
        bad = np.bincount(self._levels, weights=weights * (1 - self._is_good))
        total = good.sum() * bad.sum()
        return float((good * (np.cumsum(bad) - bad / 2)).sum() / total) if total else float("nan")


def auc_with_interval(
    values: Floats, is_good: Mask, groups: Ints, resamples: int, seed: int
) -> tuple[float | None, Interval | None]:
    """AUC over all rows, and its interval from drawing whole groups; None unless there are good and bad rows."""
    curve = RocCurve(values, is_good)
    auc = curve.auc(np.ones(len(values)))
    if np.isnan(auc):
        return None, None
    _, dense = np.unique(groups, return_inverse=True)
    n_groups = int(dense.max()) + 1
    if n_groups < 2:
        return auc, None
    drawn = [curve.auc(counts[dense]) for counts in draw_groups(n_groups, resamples, seed)]
    return auc, percentile_interval(np.array(drawn))


def best_of(values: Floats, labels: Floats, n: int) -> float:
    """The expected label of the output with the highest value among `n` drawn without replacement; exact.

    Equal values are picked equally often. `n` is at most the number of outputs.
    """
    levels, level_of = np.unique(-values, return_inverse=True)
    ranked = np.argsort(level_of, kind="stable")
    chances = np.bincount(level_of[ranked], weights=_chances_of_ranks(len(values), n), minlength=len(levels))
    mean_labels = np.bincount(level_of, weights=labels) / np.bincount(level_of)
    return float(chances @ mean_labels)


@lru_cache(maxsize=1024)
def _chances_of_ranks(outputs: int, n: int) -> Floats:
    """The chance that the k-th best of all is the best of `n`: C(outputs - k, n - 1) / C(outputs, n), k from 1."""
    ranks = np.arange(1, outputs)
    steps = np.maximum(outputs - ranks - n + 1, 0) / (outputs - ranks)
    chances: Floats = n / outputs * np.cumprod(np.append(1.0, steps))
    return chances


def rank_correlation(one: Floats, other: Floats) -> float:
    """Spearman's; 0 where either has no order, for what gives everything one value says nothing."""
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return 0.0
    return float(np.corrcoef(_average_ranks(one), _average_ranks(other))[0, 1])


def _average_ranks(values: Floats) -> Floats:
    """Ranks from 1, the lowest; equal values share the mean of their ranks."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Floats = (np.cumsum(counts) - (counts - 1) / 2)[places]
    return ranks
