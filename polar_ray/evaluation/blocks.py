"""The figures of a sample, or of a part of it, for the model and every baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from polar_ray.evaluation.baselines import BASELINES, MODEL
from polar_ray.evaluation.inputs import Sample
from polar_ray.evaluation.measures import auc_with_interval, best_of, rank_correlation, ratio_intervals, wins
from polar_ray.evaluation.result import BestOf, Bin, Block, Interval, MethodResult, Reliability, ValueAt

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]

METHODS = (MODEL, *BASELINES)

LENGTH_RATIO_EDGES = (0.25, 0.5, 0.8, 1.25, 2.0, 4.0)
"""Of the better output's length over the worse's; the middle bin holds those of about equal length."""

FEWEST_IN_A_BIN = 20
"""Pairs of the shortest and of the longest bin of lengths; of fewer an accuracy says nothing."""

RELIABILITY_EDGES = tuple(np.linspace(0.5, 1.0, 11).tolist())


@dataclass(frozen=True)
class Measured:
    """A sample with every method's value of every output; NaN where there is none."""

    sample: Sample
    values: Mapping[str, Floats]
    lengths: Floats
    """Characters of each output."""

    resamples: int
    seed: int

    @property
    def has_reward(self) -> Mask:
        return np.isfinite(self.values[MODEL.name])

    @property
    def scored_pairs(self) -> Mask:
        """Pairs whose two outputs have rewards."""
        has_reward = self.has_reward
        return has_reward[self.sample.better] & has_reward[self.sample.worse]

    def margins(self, name: str, pairs: Mask) -> Floats:
        """A method's value of the better output less that of the worse."""
        values = self.values[name]
        return values[self.sample.better[pairs]] - values[self.sample.worse[pairs]]

    def groups(self, pairs: Mask) -> Ints:
        """What is drawn together, of each pair."""
        return self.sample.group_of[self.sample.better[pairs]]


def measure_block(measured: Measured, column: str | None = None, value: str | None = None) -> Block:
    """The figures of all, or of the outputs with `value` in `column` and the pairs of two such outputs."""
    sample = measured.sample
    rows = np.ones(len(sample.rows), np.bool_)
    if column is not None:
        rows = np.array([found == value for found in sample.values[column]], np.bool_)
    pairs = rows[sample.better] & rows[sample.worse]
    scored = pairs & measured.scored_pairs
    groups, margins = measured.groups(scored), [measured.margins(method.name, scored) for method in METHODS]
    accuracies, leads = _accuracies(measured, margins, groups)
    beaten = _beats_all(measured, scored, pairs)
    rows = rows & measured.has_reward
    orders = [_ordering(measured, method.name, rows) for method in METHODS]
    n_pairs = int(scored.sum())
    return Block(
        column=column,
        value=value,
        pairs=n_pairs,
        unscored_pairs=int(pairs.sum()) - n_pairs,
        rows=int(rows.sum()),
        groups=len(np.unique(sample.group_of[rows])),
        methods=[
            MethodResult(
                name=method.name,
                title=method.title,
                unit=method.unit,
                accuracy=accuracies[place][0],
                accuracy_interval=accuracies[place][1],
                ties=int((margins[place] == 0).sum()),
                mean_margin=float(margins[place].mean()) if n_pairs else None,
                lead=leads[place][0] if method is not MODEL else None,
                lead_interval=leads[place][1] if method is not MODEL else None,
                beats_all=beaten[place][0],
                beats_all_interval=beaten[place][1],
                **orders[place],
            )
            for place, method in enumerate(METHODS)
        ],
    )


Figure = tuple[float | None, Interval | None]


def _accuracies(measured: Measured, margins: Sequence[Floats], groups: Ints) -> tuple[list[Figure], list[Figure]]:
    """Each method's accuracy, and the model's lead over it."""
    if not len(groups):
        return [(None, None)] * len(margins), [(None, None)] * len(margins)
    won = [wins(some) for some in margins]
    ahead = [won[0] - some for some in won]
    ones = [np.ones(len(groups))] * (2 * len(won))
    found = _ratios(measured, [*won, *ahead], ones, groups)
    return found[: len(won)], found[len(won) :]


def _ratios(measured: Measured, tops: Sequence[Floats], bottoms: Sequence[Floats], groups: Ints) -> list[Figure]:
    intervals = ratio_intervals(tops, bottoms, groups, measured.resamples, measured.seed)
    ratios = [float(top.sum() / bottom.sum()) for top, bottom in zip(tops, bottoms, strict=True)]
    return list(zip(ratios, intervals, strict=True))


def _beats_all(measured: Measured, scored: Mask, pairs: Mask) -> list[Figure]:
    """Over input rows of pairs whose outputs all have rewards: whether the worst chosen beats the best rejected."""
    sample = measured.sample
    if sample.layout != "pairs" or not sample.place_of.any():
        return [(None, None)] * len(METHODS)
    row_ids = np.stack([sample.file_of[sample.better], sample.row_of[sample.better]])
    _, row_of_pair = np.unique(row_ids, axis=1, return_inverse=True)
    row_of_pair = row_of_pair.ravel()
    whole = np.bincount(row_of_pair[pairs & ~scored], minlength=row_of_pair.max() + 1) == 0
    used = scored & whole[row_of_pair]
    if not used.any():
        return [(None, None)] * len(METHODS)
    rows, first, dense = np.unique(row_of_pair[used], return_index=True, return_inverse=True)
    all_won = []
    for method in METHODS:
        lost = measured.margins(method.name, used) <= 0
        all_won.append((np.bincount(dense, weights=lost, minlength=len(rows)) == 0).astype(np.float64))
    groups = measured.groups(used)[first]
    return _ratios(measured, all_won, [np.ones(len(rows))] * len(METHODS), groups)


def _ordering(measured: Measured, name: str, rows: Mask) -> dict[str, float | Interval | None]:
    """AUC for two labels, the mean rank correlation within groups for more; nothing for pairs."""
    sample = measured.sample
    if sample.layout != "triples":
        return {}
    values, labels, groups = measured.values[name][rows], sample.labels[rows], sample.group_of[rows]
    if not len(values):
        return {}
    if sample.has_two_labels:
        is_good = labels == sample.known_labels[-1]
        auc, interval = auc_with_interval(values, is_good, groups, measured.resamples, measured.seed)
        return {"auc": auc, "auc_interval": interval}
    members = [some for some in _members(groups) if np.ptp(labels[some]) > 0]
    if not members:
        return {}
    found = np.array([rank_correlation(values[some], labels[some]) for some in members])
    of = np.array([groups[some[0]] for some in members])
    ((spearman, interval),) = _ratios(measured, [found], [np.ones(len(found))], of)
    return {"spearman": spearman, "spearman_interval": interval}


def _members(groups: Ints) -> list[Ints]:
    """The places of each group."""
    order = np.argsort(groups, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(groups[order])) + 1) if len(order) else []


def measure_best_of(measured: Measured, sizes: Sequence[int]) -> list[BestOf]:
    """Best of n for each of `sizes`, or for 2, 4, 8 and so on as long as half of the groups have so many outputs."""
    sample = measured.sample
    if sample.layout != "triples":
        return []
    rows = np.flatnonzero(measured.has_reward)
    members = [rows[some] for some in _members(sample.group_of[rows])]
    if not sizes:
        typical = int(np.median([len(some) for some in members]))
        sizes = [2**power for power in range(1, typical.bit_length()) if 2**power <= typical]
    return [found for n in sizes if (found := _best_of_n(measured, [m for m in members if len(m) >= n], n)) is not None]


def _best_of_n(measured: Measured, members: Sequence[Ints], n: int) -> BestOf | None:
    if not members:
        return None
    labels = [measured.sample.labels[some] for some in members]
    picked = [
        np.array(
            [best_of(measured.values[method.name][some], own, n) for some, own in zip(members, labels, strict=True)]
        )
        for method in METHODS
    ]
    groups = measured.sample.group_of[np.array([some[0] for some in members])]
    found = _ratios(measured, picked, [np.ones(len(members))] * len(picked), groups)
    return BestOf(
        n=n,
        groups=len(members),
        random=float(np.mean([own.mean() for own in labels])),
        oracle=float(np.mean([best_of(own, own, n) for own in labels])),
        methods={
            method.name: ValueAt(value=value, interval=interval)
            for method, (value, interval) in zip(METHODS, found, strict=True)
            if value is not None
        },
    )


def measure_reliability(measured: Measured) -> Reliability | None:
    """Predicted against observed: how sure the model is of its choice, and how often the choice is right."""
    scored = measured.scored_pairs
    if not scored.any():
        return None
    margins = measured.margins(MODEL.name, scored)
    sure = 1 / (1 + np.exp(-np.minimum(np.abs(margins), 700.0)))
    bins = _bins(measured, sure, wins(margins), measured.groups(scored), RELIABILITY_EDGES)
    gaps = [some.pairs * abs(some.accuracy - some.mean_x) for some in bins]
    return Reliability(ece=sum(gaps) / len(margins), bins=bins)


def measure_lengths(measured: Measured) -> tuple[list[Bin], list[Bin]]:
    """The model's accuracy by the length of a pair's outputs, and by the ratio of the two lengths."""
    scored = measured.scored_pairs
    if not scored.any():
        return [], []
    better, worse = (measured.lengths[some[scored]] for some in (measured.sample.better, measured.sample.worse))
    won, groups = wins(measured.margins(MODEL.name, scored)), measured.groups(scored)
    typical = np.maximum((better + worse) / 2, 1.0)
    by_length = _bins(measured, typical, won, groups, _doubling_edges(typical))
    ratios = np.maximum(better, 1.0) / np.maximum(worse, 1.0)
    return by_length, _bins(measured, ratios, won, groups, (None, *LENGTH_RATIO_EDGES, None))


def _doubling_edges(lengths: Floats) -> list[float]:
    """Powers of two around `lengths`; the outermost bins are taken together until they hold `FEWEST_IN_A_BIN`."""
    octaves = np.sort(np.floor(np.log2(lengths)).astype(np.int64))
    fewest = min(FEWEST_IN_A_BIN, len(octaves))
    inner = range(int(octaves[fewest - 1]) + 1, int(octaves[-fewest]) + 1)
    return [2.0 ** int(octaves[0]), *(2.0**power for power in inner), 2.0 ** (int(octaves[-1]) + 1)]


def _bins(measured: Measured, at: Floats, won: Floats, groups: Ints, edges: Sequence[float | None]) -> list[Bin]:
    """The pairs by where `at` lies between edges, in bins that are not empty; the last bin holds its upper edge."""
    inner = np.array([edge for edge in edges[1:-1] if edge is not None])
    bin_of = np.searchsorted(inner, at, side="right")
    used = np.unique(bin_of).tolist()
    inside = [(bin_of == place).astype(np.float64) for place in used]
    found = _ratios(measured, [won * some for some in inside], inside, groups)
    return [
        Bin(
            low=edges[place],
            high=edges[place + 1],
            pairs=int(some.sum()),
            mean_x=float((at * some).sum() / some.sum()),
            accuracy=accuracy,
            interval=interval,
        )
        for place, some, (accuracy, interval) in zip(used, inside, found, strict=True)
        if accuracy is not None
    ]
