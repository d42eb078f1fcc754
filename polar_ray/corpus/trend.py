"""How rewards change along a corpus: its parts one after the other, each beside the first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from polar_ray.corpus.summary import UnitReport
from polar_ray.health import drift, mean_of_bins

MOST_PARTS = 20

FEWEST_ROWS = 500
"""Of a part: two samples of this size are some 0.04 apart when nothing changes."""


class Part(NamedTuple):
    """Consecutive rows of a corpus."""

    start: int
    stop: int
    mean: float
    drift: float
    """Of the part's rewards from the first part's, as `health.drift` has it."""


class Trend:
    """Collects the units of a corpus, in the order of its rows."""

    def __init__(self, rows: int) -> None:
        """`rows` of the whole corpus, of which each part gets about the same."""
        self._rows_a_part = max(FEWEST_ROWS, -(-rows // MOST_PARTS))
        self._edges = [0]
        self._bins: list[dict[int, int]] = [{}]

    def passing(self, reports: Iterable[UnitReport]) -> Iterator[UnitReport]:
        """The same reports, each counted as it passes."""
        for report in reports:
            self.add(report)
            yield report

    def add(self, report: UnitReport) -> None:
        """The next unit."""
        if len(self._edges) > 1 and self._edges[-1] - self._edges[-2] >= self._rows_a_part:
            self._edges.append(self._edges[-1])
            self._bins.append({})
        elif len(self._edges) == 1:
            self._edges.append(0)
        self._edges[-1] += report.rows
        for place, count in report.reward_bins.items():
            self._bins[-1][place] = self._bins[-1].get(place, 0) + count

    @property
    def parts(self) -> list[Part]:
        """In order, and what has too few rewards joined to a neighbour; the first is what the others are held against.

        None where there are too few rewards for one.
        """
        told: list[_Span] = []
        held = _Span(0, 0, {})
        for stop, bins in zip(self._edges[1:], self._bins, strict=False):
            held = held.joined(stop, bins)
            if held.rewards >= FEWEST_ROWS:
                told.append(held)
                held = _Span(stop, stop, {})
        if told and held.stop > held.start:
            told[-1] = told[-1].joined(held.stop, held.bins)
        return [
            Part(span.start, span.stop, mean_of_bins(span.bins), drift(told[0].bins, span.bins) or 0.0) for span in told
        ]


class _Span(NamedTuple):
    start: int
    stop: int
    bins: dict[int, int]

    @property
    def rewards(self) -> int:
        return sum(self.bins.values())

    def joined(self, stop: int, bins: dict[int, int]) -> _Span:
        """With what follows it, up to `stop`."""
        both = {place: self.bins.get(place, 0) + bins.get(place, 0) for place in self.bins.keys() | bins.keys()}
        return _Span(self.start, stop, both)
