"""What a job did, added up as its units report: a driver's memory does not grow with its job."""

from __future__ import annotations

from collections.abc import Sequence

from polar_ray.corpus.summary import UnitReport, add_to
from polar_ray.corpus.trend import Part, Trend


class Account:
    """The sum of units' reports, in whatever order they come."""

    def __init__(self, rows_of_units: Sequence[int]) -> None:
        """The rows of every unit of the job, in the order of its input."""
        self.total = UnitReport()
        self._trend = Trend(rows_of_units)
        self._missing = dict.fromkeys(range(len(rows_of_units)))

    def add(self, unit: int, report: UnitReport) -> bool:
        """Count a unit. False, and nothing counted, if it was before: two actors may tell of the same file."""
        if unit not in self._missing:
            return False
        del self._missing[unit]
        add_to(self.total, report)
        self._trend.add(unit, report)
        return True

    @property
    def missing(self) -> list[int]:
        """Units that nobody has reported yet, in order."""
        return list(self._missing)

    @property
    def parts(self) -> list[Part]:
        """How rewards change along the corpus."""
        return self._trend.parts
