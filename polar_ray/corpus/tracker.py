"""The one place that knows what every actor of a job is doing: progress, and which rows kill their process.

A plain class; the job runs it as a Ray actor. An actor says what it is about to score before it does, so that when a
process dies the rows it died on are known, and a row that kills again and again is found by narrowing down instead
of being retried for ever.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any, Literal, NamedTuple

from polar_ray.errors import PolarRayError

NARROWING = 8
"""Parts into which rows are split after a process died on them. Each death costs loading the model once: with 8, a
row among 4096 is found by the sixth death or so; halving would take fourteen."""

DEATHS_BEFORE_NARROWING = 2
"""One death is most often the node's; only rows that were there at two are looked into."""

FAILED_STARTS_BEFORE_GIVING_UP = 3
ENGINE_FAILURES_BEFORE_GIVING_UP = 3


CHECK_SECONDS = 600.0
"""After this an actor that was checking its node's weights is taken for dead; hashing 15 GB takes a minute at worst."""

PASSED = math.inf
"""In place of the time at which a check was claimed."""

CheckVerdict = Literal["check", "wait", "passed"]

MAIN = "main"
"""Who works on a unit: Ray Data's own task for it, of which one runs at a time. Others are named by their actor."""

Verdict = Literal["go_on", "drop", "stop"]
"""What an actor is to do next: go on, drop the unit because its file is there, or stop because the job is over."""

OVERDUE = 2.0
"""A unit that takes so many times as long as its rows usually do is done again by an actor that has nothing to do."""

OVERDUE_SECONDS = 10.0
"""And no sooner than this: two engines on one unit must not be the rule where units are small."""

PACES = 256
"""Units, the last ones, by which is judged how long one usually takes."""

PRESENT_SECONDS = 5.0
"""An idle actor asks every two seconds at least; one that has not asked for so long has gone."""


class Rows(NamedTuple):
    """Rows `start` to `stop` of a unit, counted from the unit's first."""

    start: int
    stop: int


@dataclass(frozen=True)
class Assignment:
    """How an actor is to go through a unit: these ranges in order, leaving out the quarantined rows.

    `deaths` counts processes that died on the unit, `other_deaths` those of them that were not scoring: reading it, or
    writing it.
    """

    ranges: tuple[Rows, ...]
    quarantined: frozenset[int]
    other_deaths: int = 0
    deaths: int = 0


@dataclass(frozen=True)
class Stuck:
    """A unit that somebody is working on, and for how long."""

    unit: int
    rows: Rows
    seconds: float


@dataclass(frozen=True)
class Snapshot:
    """A job at one moment. Counts are of this run only; units that were done before are not in them."""

    actors: int
    rows: int
    tokens: int
    computed_tokens: int
    quarantined: int
    deaths: int
    finished: int
    """Units whose files are written, or were found written."""

    seconds_since_progress: float
    in_flight: tuple[Stuck, ...]
    stage: str
    """What the first engine's start is busy with; empty when it is not known."""

    error: PolarRayError | None
    repeated_units: int = 0
    """Times that a unit was begun which had been begun before."""


@dataclass
class _Attempt:
    """One process's go at a unit."""

    begun: float
    process: str | None = None
    in_flight: Rows | None = None
    since: float = 0.0
    rows: int = 0
    tokens: int = 0
    computed_tokens: int = 0


@dataclass
class _UnitState:
    size: int
    ranges: list[Rows]
    attempts: dict[str, _Attempt] = field(default_factory=dict)
    other_deaths: int = 0
    deaths: dict[Rows, int] = field(default_factory=dict)
    quarantined: set[int] = field(default_factory=set)
    engine_failures: int = 0

    @property
    def furthest(self) -> _Attempt:
        """The attempt that has come furthest; one that has done nothing where there is none."""
        return max(self.attempts.values(), key=lambda attempt: attempt.rows, default=_Attempt(0.0))


class JobTracker:
    """State of one run of a job. Lives as long as its driver; what must outlive it is in the files.

    What it does not expect it passes over: it may be a restart that has forgotten, and an actor that Ray gave up for
    dead may still be talking.
    """

    def __init__(self, most_actors: int = 1, units: Iterable[int] = ()) -> None:
        """`units` are those that the run is to do, in the order in which they are handed out."""
        self._most_actors = most_actors
        self._unbegun = dict.fromkeys(units)
        self._units: dict[int, _UnitState] = {}
        self._done = [0, 0, 0]
        self._finished: set[int] = set()
        self._paces: deque[float] = deque(maxlen=PACES)
        self._idle: dict[str, float] = {}
        self._starting = 0
        self._stage = ""
        self._handles: list[Any] = []
        self._actors = 0
        self._deaths = 0
        self._dead: set[str | None] = set()
        self._quarantined = 0
        self._repeated = 0
        self._checks: dict[str, float] = {}
        self._last_progress = time.monotonic()
        self._error: PolarRayError | None = None
        self._stopping = False

    def starting(self, actor: Any = None) -> bool:
        """`actor` (its handle) begins to load its engine. False: too many processes died doing so, do not try."""
        self._handles.append(actor)
        self._starting += 1
        return self._starting <= FAILED_STARTS_BEFORE_GIVING_UP * self._most_actors

    def stage(self, text: str) -> None:
        """An actor's engine is busy starting with this."""
        self._stage = text

    def started(self) -> None:
        """An actor's engine is up."""
        self._actors += 1
        self._starting = 0
        self._last_progress = time.monotonic()

    def claim_check(self, node: str) -> CheckVerdict:
        """What an actor on `node` is to do about the node's weights: `check` them, `wait`, or go on: `passed`."""
        claimed = self._checks.get(node)
        if claimed is None or time.monotonic() - claimed > CHECK_SECONDS:
            self._checks[node] = time.monotonic()
            return "check"
        return "passed" if claimed == PASSED else "wait"

    def pass_check(self, node: str) -> None:
        """The weights on `node` are the job's."""
        self._checks[node] = PASSED

    def begin(self, unit: int, rows: int, who: str = MAIN, process: str | None = None) -> Assignment:
        """`who` takes a unit. If they had it already, the process that had it is dead.

        `process` names the one they run in: with several units in its hands, its death counts once.
        """
        self._repeated += unit in self._units
        self._unbegun.pop(unit, None)
        state = self._units.setdefault(unit, _UnitState(rows, [Rows(0, rows)]))
        self._end_attempt(state, who)
        state.attempts[who] = _Attempt(time.monotonic(), process)
        deaths = sum(state.deaths.values()) + state.other_deaths
        return Assignment(tuple(state.ranges), frozenset(state.quarantined), state.other_deaths, deaths)

    def mark(self, unit: int, rows: Rows, who: str = MAIN) -> None:
        """These rows are about to go into the engine."""
        attempt = self._attempt(unit, who)
        if attempt is not None:
            attempt.in_flight, attempt.since = rows, time.monotonic()

    def scored(self, unit: int, who: str = MAIN) -> Verdict:
        """No row of the unit is in the engine any more; what happens now is not the rows' doing."""
        attempt = self._attempt(unit, who)
        if attempt is not None:
            attempt.in_flight = None
        return self._verdict(unit)

    def progress(self, unit: int, rows: int, tokens: int, computed_tokens: int, who: str = MAIN) -> Verdict:
        """Work done on a unit since the last call."""
        attempt = self._attempt(unit, who)
        if attempt is not None:
            attempt.rows += rows
            attempt.tokens += tokens
            attempt.computed_tokens += computed_tokens
        self._last_progress = time.monotonic()
        return self._verdict(unit)

    def finish(self, unit: int, rows: int, tokens: int, computed_tokens: int, who: str = MAIN) -> None:
        """A unit's file is written. Said twice, it counts once."""
        attempt = self._attempt(unit, who)
        if attempt is not None:
            self._paces.append((time.monotonic() - attempt.begun) / max(1, rows))
        self._units.pop(unit, None)
        self._unbegun.pop(unit, None)
        if unit not in self._finished:
            self._finished.add(unit)
            self._done = [a + b for a, b in zip(self._done, (rows, tokens, computed_tokens), strict=True)]
        self._last_progress = time.monotonic()

    def engine_failed(self, unit: int, who: str = MAIN) -> bool:
        """An engine fails on most of a unit. True: a fresh process may try it again."""
        state = self._units.get(unit)
        if state is None:
            return True
        state.attempts.pop(who, None)  # the process goes on purpose: that is no death
        state.engine_failures += 1
        return state.engine_failures < ENGINE_FAILURES_BEFORE_GIVING_UP

    def back_up(self, who: str) -> int | Literal["wait", "leave"]:
        """What an actor is to do for which there is no unit left: one that nobody has begun, or that is overdue.

        Those wait in the queue of a busy actor, or are with one that is slow, hangs, or is gone and Ray has not
        noticed. `wait`: ask again in a moment. `leave`: there are more idle actors than units left, let this one go.
        """
        now = time.monotonic()
        self._idle.pop(who, None)
        for state in self._units.values():
            self._end_attempt(state, who)
        if self._stopping:
            return "leave"
        if self._unbegun:
            return self._unbegun.popitem()[0]  # the last one: whoever has them in their queue begins with the first
        overdue = [unit for unit, state in self._units.items() if self._is_overdue(state, now)]
        if overdue:
            return overdue[0]
        idle = sum(now - seen < PRESENT_SECONDS for seen in self._idle.values())
        if idle >= len(self._units):
            return "leave"
        self._idle[who] = now
        return "wait"

    def fail(self, error: PolarRayError) -> None:
        """An actor cannot go on. The first such error is the job's."""
        self._error = self._error or error

    def stop(self) -> list[Any]:
        """Tell every actor, at its next progress, to stop; gives their handles, for those that make none."""
        self._stopping = True
        return self._handles

    def snapshot(self) -> Snapshot:
        now = time.monotonic()
        furthest = [state.furthest for state in self._units.values()]
        return Snapshot(
            actors=self._actors,
            rows=self._done[0] + sum(attempt.rows for attempt in furthest),
            tokens=self._done[1] + sum(attempt.tokens for attempt in furthest),
            computed_tokens=self._done[2] + sum(attempt.computed_tokens for attempt in furthest),
            quarantined=self._quarantined,
            deaths=self._deaths,
            finished=len(self._finished),
            seconds_since_progress=now - self._last_progress,
            in_flight=tuple(
                Stuck(unit, attempt.in_flight, now - attempt.since)
                for unit, state in self._units.items()
                for attempt in state.attempts.values()
                if attempt.in_flight is not None
            ),
            stage=self._stage,
            error=self._error,
            repeated_units=self._repeated,
        )

    def _attempt(self, unit: int, who: str) -> _Attempt | None:
        state = self._units.get(unit)
        return None if state is None else state.attempts.get(who)

    def _verdict(self, unit: int) -> Verdict:
        if self._stopping:
            return "stop"
        return "drop" if unit in self._finished else "go_on"

    def _is_overdue(self, state: _UnitState, now: float) -> bool:
        """Whether nobody works on a unit, or all have done so for longer than it should take."""
        if not state.attempts:
            return True
        if not self._paces:
            return False
        latest = max(attempt.begun for attempt in state.attempts.values())
        return now - latest > max(OVERDUE_SECONDS, OVERDUE * median(self._paces) * state.size)

    def _end_attempt(self, state: _UnitState, who: str) -> None:
        """If `who` has an attempt at the unit still open, its process has died."""
        attempt = state.attempts.pop(who, None)
        if attempt is None:
            return
        self._deaths += attempt.process is None or attempt.process not in self._dead
        self._dead.add(attempt.process)
        if attempt.in_flight is None:
            state.other_deaths += 1
        elif attempt.in_flight in state.ranges:  # else another attempt has narrowed them down already
            self._note_death(state, attempt.in_flight)

    def _note_death(self, state: _UnitState, rows: Rows) -> None:
        deaths = state.deaths[rows] = state.deaths.get(rows, 0) + 1
        is_suspect = deaths >= DEATHS_BEFORE_NARROWING or len(state.ranges) > 1
        if rows.stop - rows.start == 1:
            if deaths >= DEATHS_BEFORE_NARROWING:
                state.quarantined.add(rows.start)
                state.ranges.remove(rows)
                self._quarantined += 1
        elif is_suspect:
            place = state.ranges.index(rows)
            state.ranges[place : place + 1] = _split(rows)


def _split(rows: Rows) -> list[Rows]:
    """`rows` in up to `NARROWING` parts of nearly equal size."""
    parts = min(NARROWING, rows.stop - rows.start)
    edges = [rows.start + (rows.stop - rows.start) * part // parts for part in range(parts + 1)]
    return [Rows(start, stop) for start, stop in pairwise(edges)]
