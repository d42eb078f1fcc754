"""The actor of a job: takes units one by one, scores them, writes their files."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import ray

from polar_ray.config import ScoreConfig
from polar_ray.corpus.manifest import Manifest, load_manifest
from polar_ray.corpus.storage import Location
from polar_ray.corpus.summary import UnitReport, report_unit
from polar_ray.corpus.tracker import Assignment
from polar_ray.corpus.units import read_report, read_unit, write_unit
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
from polar_ray.scoring import CANARY, Scorer, Usage
from polar_ray.stages import watched
from polar_ray.tracing import Tracing
from polar_ray.triples import Scored, Triple

MOST_QUARANTINED_ROWS = 16
"""Of one unit. Each cost two processes; where there are more, it is the machine and not the rows."""

MOST_OTHER_DEATHS = 3
"""On one unit, outside the engine. A lost node explains one or two; more is the file or the memory."""

CHECK_POLL_SECONDS = 0.5

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
    """One engine, fed by Ray Data with units. Every failure that ends it is told to the tracker first, typed."""

    def __init__(self, task: ActorTask, tracker: Tracker) -> None:
        self._task = task
        self._tracker = tracker
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
        except ProcessCrashed:  # one of the engine's own: as if it was this one, which is started again some times
            os._exit(1)
        except Exception as error:  # whatever it is, the driver is told what, without a remote traceback
            known = error if isinstance(error, PolarRayError) else EngineStartError(f"{type(error).__name__}: {error}")
            ray.get(tracker.fail.remote(unwrap(known)))
            raise
        ray.get(tracker.started.remote())

    def __call__(self, batch: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        """A column of unit indices in, a column of their reports (JSON) out, with the address of this node."""
        reports = [self._do_unit(int(unit)).model_dump_json() for unit in batch["unit"]]
        return {
            "unit": batch["unit"],
            "report": np.array(reports, dtype=object),
            "node": np.array([ray.util.get_node_ip_address()] * len(reports), dtype=object),
        }

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

    def _do_unit(self, index: int) -> UnitReport:
        committed = read_report(self._task.output, self._manifest, index)
        if committed is not None:  # the task is a retry, and its first try got this far
            self._tell_finished(index, committed)
            return committed
        try:
            with self._tracing.span("unit", unit=index, job_id=self._manifest.job_id):
                return self._score_unit(index)
        except ProcessCrashed:  # a process of the engine's: as if it was this one, so that the rows are looked into
            os._exit(1)
        except PolarRayError as error:
            ray.get(self._tracker.fail.remote(error))
            raise
        finally:
            self._tracing.flush()  # Ray ends an actor that has no unit left without asking

    def _score_unit(self, index: int) -> UnitReport:
        started = time.perf_counter()
        assignment: Assignment = ray.get(self._tracker.begin.remote(index, self._manifest.units[index].rows))
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
        table, triples = self._tracing.traced("read", read_unit, self._manifest, index)
        before = self._scorer.usage.copy()
        scored = self._tracing.traced("score", self._score_ranges, index, triples, assignment)
        ray.get(self._tracker.scored.remote(index))
        self._check_engine(index, triples, scored)
        usage = self._scorer.usage - before
        report = report_unit(triples, scored, usage, time.perf_counter() - started)
        self._tracing.traced("write", write_unit, self._task.output, self._manifest, index, table, scored, report)
        self._tell_finished(index, report)
        return report

    def _tell_finished(self, index: int, report: UnitReport) -> None:
        ray.get(self._tracker.finish.remote(index, report.rows, report.tokens, report.computed_tokens))

    def _score_ranges(self, index: int, triples: list[Triple | TripleError], assignment: Assignment) -> list[Scored]:
        scored: dict[int, Scored] = {row: _crashed() for row in assignment.quarantined}
        progress = _Progress(self._tracker, index, self._scorer)
        for rows in assignment.ranges:
            ray.get(self._tracker.mark.remote(index, rows))
            outcomes = self._scorer.score(triples[rows.start : rows.stop], progress.on_batch)
            scored.update(zip(range(rows.start, rows.stop), outcomes, strict=True))
        return [scored[row] for row in range(len(triples))]

    def _check_engine(self, index: int, triples: list[Triple | TripleError], scored: list[Scored]) -> None:
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
        if ray.get(self._tracker.engine_failed.remote(index)):
            os._exit(1)
        raise EngineError(
            f"the engine fails on {self._manifest.describe(index)}, in fresh processes as well; the first failure: "
            f"{failed[0].detail}"
        )


class _Progress:
    """Tells the tracker what was scored since it was last told, and learns whether to go on."""

    def __init__(self, tracker: Tracker, unit: int, scorer: Scorer) -> None:
        self._tracker = tracker
        self._unit = unit
        self._scorer = scorer
        self._told = scorer.usage.copy()

    def on_batch(self) -> None:
        usage: Usage = self._scorer.usage - self._told
        self._told = self._scorer.usage.copy()
        told = self._tracker.progress.remote(self._unit, usage.rows, usage.tokens, usage.computed_tokens)
        if ray.get(told):
            raise JobError("the job was stopped")


def _crashed() -> Scored:
    message = "scoring this row killed the process, and did so again when the row was alone; it is quarantined"
    return Scored(None, ProcessCrashed.code, message)
