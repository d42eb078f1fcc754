"""The actor of a job: takes units one by one, scores them, writes their files."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol
from uuid import uuid4

import pyarrow as pa
import ray

from polar_ray.config import ScoreConfig
from polar_ray.corpus.manifest import Manifest, load_manifest
from polar_ray.corpus.storage import Location
from polar_ray.corpus.summary import UnitReport, report_unit
from polar_ray.corpus.tracker import MAIN, Assignment, Verdict
from polar_ray.corpus.units import read_report, read_unit, read_written_report, write_unit
from polar_ray.encoding.tokenizer import PolarTokenizer
from polar_ray.errors import (
    CheckpointError,
    EngineError,
    EngineStartError,
    JobError,
    PolarRayError,
    ProcessCrashed,
    TripleError,
    unwrap,
)
from polar_ray.model.locate import locate_model
from polar_ray.receipts import build_receipt
from polar_ray.scoring import CANARY, Prepared, Scorer, Usage
from polar_ray.stages import watched
from polar_ray.tracing import Tracing
from polar_ray.triples import Scored, Triple

MOST_QUARANTINED_ROWS = 16
"""Of one unit. Each cost two processes; where there are more, it is the machine and not the rows."""

MOST_OTHER_DEATHS = 3
"""On one unit, outside the engine. A lost node explains one or two; more is the file or the memory."""

CHECK_POLL_SECONDS = 0.5

BACK_UP = -1
"""In place of a unit: see to those of other actors that are queued or overdue, until none is."""

FIRST_WAIT_SECONDS = 0.05
LONGEST_WAIT_SECONDS = 2.0
"""Between two looks for units to back up: a short job is not held up, and the tail of a long one costs few calls."""

REPORTS = pa.schema({"unit": pa.int64(), "report": pa.string(), "node": pa.string()})
"""What an actor gives back: units, their reports as JSON, and the address of its node."""

Done = Callable[[], UnitReport]
"""Gives a unit's report once its file is written, or raises what that has raised."""

BuildScorer = Callable[[ScoreConfig], Scorer]


def open_scorer(config: ScoreConfig) -> Scorer:
    """The scorer that every actor of a job opens."""
    return Scorer.open(config.model, revision=config.revision, engine=config.engine, limits=config.limits)


class Tracker(Protocol):
    """`JobTracker`, as its handle looks from another process."""

    def __getattr__(self, name: str) -> Any: ...


@dataclass(frozen=True)
class ActorTask:
    """What an actor needs to know; small, because it is copied to every restart."""

    output: Location
    config: ScoreConfig
    """With `auto` values resolved."""

    build_scorer: BuildScorer


class ScoringActor:
    """One engine, fed by Ray Data with units. Every failure that ends it is told to the tracker first, typed.

    While the engine computes a unit, the next one of the same task is read, encoded and planned, and the one before is
    written. Not while a unit is looked into on which a process has died, which nothing else must then explain.
    """

    def __init__(self, task: ActorTask, tracker: Tracker) -> None:
        self._task = task
        self._tracker = tracker
        self._node = ray.util.get_node_ip_address()
        self._process = uuid4().hex
        try:
            if not ray.get(tracker.starting.remote(ray.get_runtime_context().current_actor)):
                raise EngineStartError("the processes of several actors died while loading the model: out of memory?")
            manifest = load_manifest(task.output)
            if manifest is None:
                raise JobError(f"{task.output.url}: the manifest is gone")
            self._manifest = manifest
            with watched(lambda text: tracker.stage.remote(text)):
                self._check_node(manifest)
                self._scorer = task.build_scorer(task.config)
            self._tracing = Tracing.from_environment()
            self._reader, self._writer = ThreadPoolExecutor(1, "read"), ThreadPoolExecutor(1, "write")
            self._ahead: dict[int, Future[_Rows]] = {}
            self._writing: Future[UnitReport] | None = None
        except ProcessCrashed:  # one of the engine's own: as if it was this one, which is started again some times
            os._exit(1)
        except Exception as error:  # whatever it is, the driver is told what, without a remote traceback
            known = error if isinstance(error, PolarRayError) else EngineStartError(f"{type(error).__name__}: {error}")
            ray.get(tracker.fail.remote(unwrap(known)))
            raise
        ray.get(tracker.started.remote())

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Lists of unit indices in, in a column `units`; `REPORTS` out, a row for each unit, their files written."""
        done: list[tuple[int, Done]] = []
        for units in batch.column("units").to_pylist():
            for unit, following in zip(units, [*units[1:], None], strict=True):
                done += self._do(unit, following)
        told = [{"unit": unit, "report": report().model_dump_json(), "node": self._node} for unit, report in done]
        self._tracing.flush()  # Ray ends an actor that has no unit left without asking
        return pa.Table.from_pylist(told, REPORTS)

    def _do(self, unit: int, following: int | None) -> Iterator[tuple[int, Done]]:
        if unit != BACK_UP:
            yield unit, self._do_unit(unit, MAIN, following)
            return
        who = ray.get_runtime_context().get_actor_id()
        wait_s = FIRST_WAIT_SECONDS
        while (found := ray.get(self._tracker.back_up.remote(who))) != "leave":
            if found == "wait":
                time.sleep(wait_s)
                wait_s = min(2 * wait_s, LONGEST_WAIT_SECONDS)
            else:
                yield found, self._do_unit(found, who, None)
                self._wait_until_written()  # who asks the tracker for more has nothing under way

    def _check_node(self, manifest: Manifest) -> None:
        """Weights of the same name can differ from node to node; one actor of each compares, the others wait for it."""
        node = ray.get_runtime_context().get_node_id()
        while (verdict := ray.get(self._tracker.claim_check.remote(node))) == "wait":
            time.sleep(CHECK_POLL_SECONDS)
        if verdict == "passed":
            return
        config = self._task.config
        folder = locate_model(config.model, config.revision)
        receipt = build_receipt(folder, PolarTokenizer(folder), config.engine, config.limits)
        differences = manifest.receipt.differences(receipt)
        if differences:
            raise CheckpointError(
                f"{config.model} on this node is not what the job was planned with: "
                + "; ".join(f"{name} {theirs!r} instead of {ours!r}" for name, (ours, theirs) in differences.items())
            )
        ray.get(self._tracker.pass_check.remote(node))

    def _do_unit(self, index: int, who: str, following: int | None) -> Done:
        """Score a unit and have its file written, unless that is done already. `who` does it: see `tracker.MAIN`."""
        try:
            committed = read_report(self._task.output, self._manifest, index)
            if committed is None:
                with self._tracing.span("unit", unit=index, job_id=self._manifest.job_id):
                    return self._score_unit(index, who, following)
            self._tell_finished(index, who, committed)  # by another actor, or by this task's first try
        except _DoneElsewhere:
            return partial(read_written_report, self._task.output, self._manifest, index)
        except ProcessCrashed:  # a process of the engine's: as if it was this one, so that the rows are looked into
            os._exit(1)
        except PolarRayError as error:
            ray.get(self._tracker.fail.remote(error))
            raise
        return lambda: committed

    def _score_unit(self, index: int, who: str, following: int | None) -> Done:
        started = time.perf_counter()
        rows_of_unit = self._manifest.units[index].rows
        assignment: Assignment = ray.get(self._tracker.begin.remote(index, rows_of_unit, who, self._process))
        if assignment.other_deaths > MOST_OTHER_DEATHS:
            raise JobError(
                f"{self._manifest.describe(index)}: {assignment.other_deaths} processes died while reading or writing "
                "it; look at the file and at the memory, or lower unit_rows"
            )
        if len(assignment.quarantined) > MOST_QUARANTINED_ROWS:
            raise EngineError(
                f"more than {MOST_QUARANTINED_ROWS} rows of {self._manifest.describe(index)} killed their process; "
                "that is not the rows: look for a lack of memory, or lower engine.token_budget"
            )
        if assignment.deaths:
            self._wait_until_written()
        ahead = self._ahead.pop(index, None)
        rows = self._tracing.traced("read", ahead.result if ahead else partial(self._read, index))
        if following is not None and not assignment.deaths:
            self._ahead = {following: self._reader.submit(self._read_and_prepare, following)}
        before = self._scorer.usage.copy()
        scored = self._tracing.traced("score", self._score_ranges, index, who, rows, assignment)
        _obey(ray.get(self._tracker.scored.remote(index, who)))
        self._check_engine(index, who, rows.triples, scored)
        usage, seconds = self._scorer.usage - before, time.perf_counter() - started
        self._wait_until_written()
        commit = partial(self._commit, index, who, rows, scored, usage, seconds)
        self._writing = self._writer.submit(copy_context().run, commit)
        return self._writing.result

    def _read(self, index: int) -> _Rows:
        return _Rows(*read_unit(self._manifest, index))

    def _read_and_prepare(self, index: int) -> _Rows:
        table, triples = read_unit(self._manifest, index)
        return _Rows(table, triples, self._scorer.prepare(triples))

    def _commit(
        self, index: int, who: str, rows: _Rows, scored: list[Scored], usage: Usage, seconds: float
    ) -> UnitReport:
        report = report_unit(rows.triples, scored, usage, seconds)
        write = partial(write_unit, self._task.output, self._manifest, index, rows.table, scored, report)
        try:
            self._tracing.traced("write", write)
        except PolarRayError as error:
            ray.get(self._tracker.fail.remote(error))
            raise
        self._tell_finished(index, who, report)
        return report

    def _wait_until_written(self) -> None:
        """Raises what the writing of the last unit has raised."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _tell_finished(self, index: int, who: str, report: UnitReport) -> None:
        ray.get(self._tracker.finish.remote(index, report.rows, report.tokens, report.computed_tokens, who))

    def _score_ranges(self, index: int, who: str, rows: _Rows, assignment: Assignment) -> list[Scored]:
        scored: dict[int, Scored] = {row: _crashed() for row in assignment.quarantined}
        progress = _Progress(self._tracker, index, who, self._scorer)
        prepared = rows.prepared
        if prepared is not None and assignment.deaths:
            prepared.cancel()
            prepared = None  # a row that kills its process must do so while its range is marked
        for part in assignment.ranges:
            ray.get(self._tracker.mark.remote(index, part, who))
            outcomes = self._scorer.score(prepared or rows.triples[part.start : part.stop], progress.on_batch)
            scored.update(zip(range(part.start, part.stop), outcomes, strict=True))
        return [scored[row] for row in range(len(rows.triples))]

    def _check_engine(self, index: int, who: str, triples: list[Triple | TripleError], scored: list[Scored]) -> None:
        """Leave, without writing, when it is the engine that is broken: a fresh process first, then the job fails.

        Where the engine failed on rows, one that went well must go well again; after an error that sticks to a GPU
        nothing does.
        """
        failed = [row for row in scored if row.status == EngineError.code]
        if not failed:
            return
        good = (triple for triple, row in zip(triples, scored, strict=True) if row.is_ok)
        if self._scorer.score([next(good, CANARY)])[0].is_ok:
            return
        if ray.get(self._tracker.engine_failed.remote(index, who)):
            os._exit(1)
        raise EngineError(
            f"the engine fails on {self._manifest.describe(index)}, in fresh processes as well; the first failure: "
            f"{failed[0].detail}"
        )


@dataclass(frozen=True)
class _Rows:
    """The rows of a unit."""

    table: pa.Table
    triples: list[Triple | TripleError]
    prepared: Prepared | None = None
    """Of rows that were read ahead."""


class _DoneElsewhere(Exception):
    """Another actor has written the unit's file."""


def _obey(verdict: Verdict) -> None:
    """Raise, to leave a unit, what the tracker's verdict asks for."""
    if verdict == "stop":
        raise JobError("the job was stopped")
    if verdict == "drop":
        raise _DoneElsewhere


class _Progress:
    """Tells the tracker what was scored since it was last told, and learns a batch later whether to go on: the engine
    does not wait for the answer."""

    def __init__(self, tracker: Tracker, unit: int, who: str, scorer: Scorer) -> None:
        self._tracker = tracker
        self._unit = unit
        self._who = who
        self._scorer = scorer
        self._told = scorer.usage.copy()
        self._answer: Any = None

    def on_batch(self) -> None:
        usage: Usage = self._scorer.usage - self._told
        self._told = self._scorer.usage.copy()
        before = self._answer
        self._answer = self._tracker.progress.remote(
            self._unit, usage.rows, usage.tokens, usage.computed_tokens, self._who
        )
        if before is not None:
            _obey(ray.get(before))


def _crashed() -> Scored:
    message = "scoring this row killed the process, and did so again when the row was alone; it is quarantined"
    return Scored(None, ProcessCrashed.code, message)
