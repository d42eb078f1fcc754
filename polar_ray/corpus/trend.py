"""How rewards change along a corpus: its parts one after the other, each beside the first."""

from __future__ import annotations

from collections.abc import Sequence
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
    """Collects the units of a corpus, in any order, each once."""

    def __init__(self, rows_of_units: Sequence[int]) -> None:
        """The rows of every unit, in the order of the corpus; parts are of whole units and of about the same size."""
        rows_a_part = max(FEWEST_ROWS, -(-sum(rows_of_units) // MOST_PARTS))
        self._part_of_unit: list[int] = []
        self._parts: list[_Span] = []
        row = 0
        for rows in rows_of_units:
            if not self._parts or row - self._parts[-1].start >= rows_a_part:
                self._parts.append(_Span(row, row, {}))
            row += rows
            self._parts[-1] = self._parts[-1]._replace(stop=row)
            self._part_of_unit.append(len(self._parts) - 1)

    def add(self, unit: int, report: UnitReport) -> None:
        """Unit number `unit` was scored."""
        bins = self._parts[self._part_of_unit[unit]].bins
        for place, count in report.reward_bins.items():
            bins[place] = bins.get(place, 0) + count

    @property
    def parts(self) -> list[Part]:
        """In order, and what has too few rewards joined to a neighbour; the first is what the others are held against.

        Empty where there are too few rewards for one.
        """
        told: list[_Span] = []
        held: _Span | None = None
        for part in self._parts:
            held = part if held is None else held.joined(part)
            if held.rewards >= FEWEST_ROWS:
                told.append(held)
                held = None
        if told and held is not None:
            told[-1] = told[-1].joined(held)
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

    def joined(self, after: _Span) -> _Span:
        """With what follows it."""
        places = self.bins.keys() | after.bins.keys()
        both = {place: self.bins.get(place, 0) + after.bins.get(place, 0) for place in places}
        return _Span(self.start, after.stop, both)
