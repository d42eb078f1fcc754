"""Running units on Ray: the cluster, the actor pool, and the watch over both."""

from __future__ import annotations

import math
import queue
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
import ray.data
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from polar_ray.cluster import is_of_this_process
from polar_ray.config import ScoreConfig
from polar_ray.corpus.account import Account
from polar_ray.corpus.actor import BACK_UP, ActorTask, BuildScorer, ScoringActor
from polar_ray.corpus.manifest import Manifest
from polar_ray.corpus.metrics import JobMetrics
from polar_ray.corpus.progress import JobProgress, Show
from polar_ray.corpus.storage import Location
from polar_ray.corpus.summary import UnitReport
from polar_ray.corpus.tracker import JobTracker, Snapshot
from polar_ray.errors import ConfigError, JobError, JobStalled, PolarRayError, TooManyFailures, first_line, unwrap
from polar_ray.ray_export import exported

CPUS_PER_ENGINE = 8
"""Threads that one CPU engine makes good use of; where there are more cores, more actors are better."""

MOST_TASKS = 4096
"""Ray Data keeps state for every task; beyond this many units a task is to do several."""

UNITS_OF_A_TASK, TASKS_OF_AN_ACTOR = 4, 8
"""At most and at least: within a task an actor reads and writes beside its engine, but tells of it at the end only."""

POLL_SECONDS = 0.25

GRACE_SECONDS = 5.0
"""For actors to leave by themselves when a job is stopped: enough for a batch on a GPU."""

KILL_SECONDS = 30.0
"""For Ray Data to notice that its actors were killed."""


@dataclass(frozen=True)
class Job:
    """A job that was checked and may start."""

    output: Location
    manifest: Manifest
    config: ScoreConfig
    """With `auto` values resolved."""


@dataclass(frozen=True)
class Pool:
    """How many actors, and what each of them asks of Ray."""

    fewest: int
    most: int
    cpus: float
    gpus: int


def run_units(job: Job, todo: list[int], account: Account, progress: JobProgress, build_scorer: BuildScorer) -> int:
    """Score the units in `todo` and write their files; gives the number of actors that worked on them.

    Reports go to `account`. It may lack some in the end: their actor was given up before it had told of them.

    Raises what the job's contract says, typed, with Ray's wrapping removed.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    pool = plan_pool(job.config, len(todo), nodes)
    if is_of_this_process():
        _refuse_what_never_fits(pool, nodes[0])
    threads = job.config.engine.threads or max(1, int(pool.cpus))
    engine = job.config.engine.model_copy(update={"threads": threads})
    task = ActorTask(job.output, job.config.model_copy(update={"engine": engine}), build_scorer)
    tracker = _start_tracker(pool, todo)
    rows_before = job.manifest.rows - sum(job.manifest.units[index].rows for index in todo)
    metrics = JobMetrics(job.manifest.job_id, job.manifest.receipt.receipt_id, len(todo))
    with progress.scoring(job.manifest.rows, rows_before, pool.most) as show, exported(metrics.collect):
        run = _Run(job, todo, account, tracker, show, metrics)
        _drive(run, _dataset(todo, task, tracker, pool))
    return pool.most


def _start_tracker(pool: Pool, todo: list[int]) -> Any:
    """The job's tracker, on the driver's node: if that is lost, so is the job, and nothing else can take it away."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
    return ray.remote(JobTracker).options(**options).remote(pool.most, todo)


def plan_pool(config: ScoreConfig, n_units: int, nodes: Sequence[Mapping[str, float]]) -> Pool:
    """The pool that the settings name, or one that fills `nodes` (their resources); never more actors than units.

    Left to itself, an actor never asks for more than a node has, or it would wait for ever.
    """
    engine, given = config.engine, config.actor_range
    if engine.gpus:
        fitting = sum(int(node.get("GPU", 0)) // engine.gpus for node in nodes)
        fewest, most = (min(count, n_units) for count in given or [max(1, fitting)] * 2)
        return Pool(fewest, most, engine.threads or 1, engine.gpus)
    if engine.is_elsewhere:  # the endpoint does the work, and more callers would only stand in its queue
        fewest, most = (min(count, n_units) for count in given or (1, 1))
        return Pool(fewest, most, engine.threads or 1, 0)
    cpus = [float(node.get("CPU", 0)) for node in nodes]
    size = float(engine.threads or max(1, min(CPUS_PER_ENGINE, int(max(cpus, default=1)))))
    fewest, most = (min(count, n_units) for count in given or [max(1, sum(int(n // size) for n in cpus))] * 2)
    if engine.threads is None and sum(int(n // size) for n in cpus) < most:
        size = max(sum(cpus), 1.0) / most  # more actors were asked for than engines of the usual size fit
        size = min(size, max(cpus)) if size < 1 else float(int(size))
    return Pool(fewest, most, size, 0)


def _refuse_what_never_fits(pool: Pool, node: Mapping[str, float]) -> None:
    """On a cluster that cannot grow, an actor that does not fit its only node would be waited for in vain."""
    remedies = {"GPU": "engine.device = cpu", "CPU": "a lower engine.threads"}
    for name, asked in (("GPU", pool.gpus), ("CPU", pool.cpus)):
        has = node.get(name, 0)
        if asked > has:
            raise ConfigError(
                f"one engine asks for {asked:g} {name}s and this machine has {has:g}; set {remedies[name]}"
            )


def _dataset(todo: list[int], task: ActorTask, tracker: Any, pool: Pool) -> ray.data.Dataset:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = -1  # off: a unit may rightly take hours, and the job watches by itself
    size = max(math.ceil(len(todo) / MOST_TASKS), min(UNITS_OF_A_TASK, len(todo) // (TASKS_OF_AN_ACTOR * pool.most)), 1)
    tasks = [todo[start : start + size] for start in range(0, len(todo), size)]
    tasks += [[BACK_UP]] * (pool.most if pool.most > 1 else 0)
    items = ray.data.from_items([{"units": task} for task in tasks], override_num_blocks=len(tasks))
    return items.map_batches(
        ScoringActor,
        fn_constructor_args=(task, tracker),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
        compute=ray.data.ActorPoolStrategy(
            min_size=pool.fewest, max_size=pool.most, initial_size=pool.fewest, max_tasks_in_flight_per_actor=2
        ),
    )


Arrivals = queue.SimpleQueue[tuple[str, int, UnitReport] | BaseException | None]
"""Units and their reports with the node that each came from, or how it ended."""


@dataclass(frozen=True)
class _Run:
    """What the driver needs to follow a run."""

    job: Job
    todo: list[int]
    account: Account
    tracker: Any
    show: Show
    metrics: JobMetrics


def _drive(run: _Run, data: ray.data.Dataset) -> None:
    """Consume the data set in a thread, so that this one can watch, draw and be interrupted."""
    arrivals: Arrivals = queue.SimpleQueue()

    def consume() -> None:
        try:
            for batch in data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                for row in batch.to_pylist():
                    arrivals.put((row["node"], row["unit"], UnitReport.model_validate_json(row["report"])))
            arrivals.put(None)
        except BaseException as error:  # whatever it is, it is the main thread's to raise
            arrivals.put(error)

    consumer = threading.Thread(target=consume, name="polar-ray-consume", daemon=True)
    consumer.start()
    with _interrupts() as interrupted:
        try:
            _follow(run, arrivals, interrupted)
        finally:
            _end(consumer, run.tracker)


def _follow(run: _Run, arrivals: Arrivals, interrupted: threading.Event) -> None:
    """Until the last report has arrived, or every unit is done and one that hangs does not say so, or it fails."""
    watched = time.monotonic()
    done_since: float | None = None
    while done_since is None or time.monotonic() - done_since < GRACE_SECONDS:
        if interrupted.is_set():
            raise KeyboardInterrupt
        if time.monotonic() - watched >= POLL_SECONDS:
            snapshot = _watch(run)
            watched = time.monotonic()
            if done_since is None and snapshot.finished >= len(run.todo):
                done_since = watched
        try:
            arrival = arrivals.get(timeout=POLL_SECONDS)
        except queue.Empty:
            continue
        if arrival is None:
            run.metrics.watch(ray.get(run.tracker.snapshot.remote()))  # what happened since the last look
            return
        if isinstance(arrival, BaseException):
            raise _typed(arrival, run.tracker) from arrival
        node, unit, report = arrival
        if run.account.add(unit, report):
            run.metrics.add(node, report)
        _stop_a_job_gone_wrong(run.job, run.account.total)


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Set by Ctrl-C and by SIGTERM: an exception raised in the middle of a call into Ray can get lost there."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    kept = {number: signal.signal(number, lambda *_: asked.set()) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in kept.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _end(consumer: threading.Thread, tracker: Any) -> None:
    """Let go of Ray Data before the cluster goes, and of the engines before somebody else wants their GPUs.

    Actors that make progress leave by themselves; those that hang are killed. A consumer that outlived the
    connection would open a new one.
    """
    if not consumer.is_alive():
        return
    try:
        actors = ray.get(tracker.stop.remote(), timeout=GRACE_SECONDS)
        consumer.join(GRACE_SECONDS)
        if consumer.is_alive():
            for actor in actors:
                ray.kill(actor, no_restart=True)
            consumer.join(KILL_SECONDS)
    except ray.exceptions.RayError:
        return  # the cluster itself is gone, and the actors with it


def _watch(run: _Run) -> Snapshot:
    snapshot: Snapshot = ray.get(run.tracker.snapshot.remote())
    run.metrics.watch(snapshot)
    run.show(snapshot)
    if snapshot.seconds_since_progress <= run.job.config.no_progress_timeout_s:
        return snapshot
    stuck = [f"{run.job.manifest.describe(item.unit)} for {item.seconds:.0f} s" for item in snapshot.in_flight]
    raise JobStalled(
        f"no progress for {snapshot.seconds_since_progress:.0f} s; {snapshot.actors} engines came up; in flight: "
        f"{'; '.join(stuck) or 'nothing'}. Run the same command again to go on, or raise no_progress_timeout_s"
    )


def _stop_a_job_gone_wrong(job: Job, done: UnitReport) -> None:
    """Stop as soon as more rows failed than the whole job is allowed."""
    allowed = job.config.max_failed_fraction * job.manifest.rows
    if done.failed > allowed:
        raise TooManyFailures(
            f"{done.failed} of the {done.rows} rows scored so far have no reward; max_failed_fraction = "
            f"{job.config.max_failed_fraction} allows {allowed:.0f} of {job.manifest.rows}. The files finished so far "
            f"in {job.output.url} say why, row by row"
        )


def _typed(error: BaseException, tracker: Any) -> BaseException:
    """What went wrong: the actor's own account where it left one, else Ray's without its wrapping."""
    try:
        snapshot: Snapshot = ray.get(tracker.snapshot.remote(), timeout=10)
    except ray.exceptions.RayError:
        return unwrap(error)
    if snapshot.error is not None:
        return snapshot.error
    found = unwrap(error)
    if isinstance(found, PolarRayError):
        return found
    if isinstance(found, ray.exceptions.RayError):
        return JobError(f"Ray gave up on the job: {first_line(found)}")
    # Another library's message may quote what it could not digest, and that would be somebody's text.
    return JobError(f"an actor failed with {type(found).__name__}; polar-ray --debug shows where")
