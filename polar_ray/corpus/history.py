"""How fast a job went over time, from when its units were finished."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MOST_BUCKETS = 120
MOST_PAUSES = 10
"""Further pauses show as times without work."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Trace:
    """Work over time, in buckets; `starts` and `ends` are Unix times, a rate is per second of its bucket.

    Pauses, in which no unit was worked on, lie between two buckets and are none themselves.
    """

    starts: Floats
    ends: Floats
    rows: Floats
    tokens: Floats
    computed_tokens: Floats

    @property
    def pauses(self) -> Floats:
        """Seconds from each bucket's end to the next one's start, 0 where there is no pause."""
        idle: Floats = np.append(self.starts[1:] - self.ends[:-1], 0.0)
        return idle


def trace(finished: Sequence[tuple[float, int, int, int]], seconds: float) -> Trace | None:
    """The history of a job from (Unix time, rows, tokens, computed tokens) of its units; None without units.

    When a unit was begun is not recorded: the `seconds` of all units are shared out by their computed tokens, and a
    unit's work is spread evenly over its share.
    """
    if not finished:
        return None
    ends, *work = np.asarray(finished, dtype=np.float64).T
    weights = work[2] if work[2].sum() else np.ones_like(ends)
    lasted = np.maximum(seconds * weights / weights.sum(), 1e-3)
    begins = ends - lasted
    edges = _bucket_edges(begins, ends, float(lasted.mean()))
    starts, stops = np.concatenate([edge[:-1] for edge in edges]), np.concatenate([edge[1:] for edge in edges])
    done = [
        np.array([(np.clip((moment - begins) / lasted, 0, 1) @ np.stack(work, axis=1)) for moment in edge])
        for edge in edges
    ]
    rates = np.concatenate([np.diff(totals, axis=0) for totals in done]) / (stops - starts)[:, None]
    return Trace(starts, stops, *rates.T)


def _bucket_edges(begins: Floats, ends: Floats, typical_s: float) -> list[Floats]:
    """Edges of buckets of about one width, a list for each stretch between pauses."""
    order = np.argsort(begins)
    reached = np.maximum.accumulate(ends[order])
    idle = begins[order][1:] - reached[:-1]
    tolerance = 2 * typical_s
    busy = reached[-1] - begins.min() - idle[idle > tolerance].sum()
    tolerance = max(tolerance, 5 * busy / MOST_BUCKETS)
    long = np.sort(np.argsort(-idle)[:MOST_PAUSES])
    pauses = long[idle[long] > tolerance]
    starts = begins[order][np.append(0, pauses + 1)]
    stops = reached[np.append(pauses, len(reached) - 1)]
    lengths = stops - starts
    buckets = 1 + np.floor(lengths / lengths.sum() * (MOST_BUCKETS - len(lengths))).astype(int)
    return [np.linspace(*bounds) for bounds in zip(starts, stops, buckets + 1, strict=True)]
