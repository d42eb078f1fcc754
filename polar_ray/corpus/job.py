"""`score_parquet`: a corpus in, the same corpus with rewards out, on Ray Data, exactly once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path, PurePosixPath

from pydantic import BaseModel

from polar_ray.cluster import has_gpu, has_workers, ray_cluster
from polar_ray.columns import detect_message_json
from polar_ray.config import EngineConfig, ScoreConfig
from polar_ray.corpus.account import Account
from polar_ray.corpus.actor import BuildScorer, open_scorer
from polar_ray.corpus.inputs import LISTING_THREADS, InputFile, examine, input_names, list_inputs
from polar_ray.corpus.manifest import (
    FOLDER,
    Manifest,
    check_same_job,
    check_writable,
    discard_job,
    discard_leftovers,
    load_manifest,
    make_manifest,
    save_manifest,
    unfinished_units,
)
from polar_ray.corpus.progress import JobProgress, SilentProgress
from polar_ray.corpus.report import ReportFacts, write_report
from polar_ray.corpus.run import Job, run_units
from polar_ray.corpus.storage import Location
from polar_ray.corpus.summary import UnitReport
from polar_ray.corpus.units import read_sample, read_written_report
from polar_ray.encoding.tokenizer import PolarTokenizer
from polar_ray.engines.build import refuse_unsupported, resolve_engine
from polar_ray.errors import ConfigError, TooManyFailures
from polar_ray.model.locate import absolute_model, is_untrained, locate_model
from polar_ray.receipts import build_receipt


class JobSummary(BaseModel):
    """A finished job in numbers. Counts are of the whole output, whichever runs made it."""

    rows: int
    ok: int
    failed: int
    by_status: dict[str, int]
    tokens: int
    computed_tokens: int
    duplicates: int
    cut_rows: int
    seconds: float
    """Wall time of this run."""

    receipt_id: str
    units: int
    resumed_units: int
    """Units that earlier runs had finished."""

    output: str
    untrained: bool
    """Whether the checkpoint says of itself that its weights are random."""

    report: str
    """Where report.html is: among the job's own files, for readers of Parquet folders stumble over anything else."""


def score_parquet(
    inputs: str | Path | Sequence[str | Path],
    output: str | Path,
    config: ScoreConfig | None = None,
    *,
    fresh: bool = False,
    progress: JobProgress | None = None,
    build_scorer: BuildScorer | None = None,
) -> JobSummary:
    """Score every row of `inputs` and write it, with its reward, below `output`.

    Inputs are Parquet or JSONL files, folders, globs or URLs; all their columns pass through, in order. Run again
    after a crash, it finishes only what is missing; run again after success, it changes nothing. `fresh` discards
    what an earlier job left in `output`. Uses the Ray cluster this process is connected to, else the one at
    RAY_ADDRESS, else one on this machine for the time being.

    Raises `InputError`, `SchemaError`, `OutputError`, `ManifestConflict`, `ConfigError` or `CheckpointError` before
    any engine starts; `TooManyFailures`, `JobStalled` or `EngineError` from a running job. What was finished stays.
    """
    started = time.time()
    config, progress = config or ScoreConfig(), progress or SilentProgress()
    names = input_names(inputs)
    place = Location(str(output)).absolute()
    refuse_unsupported(config.engine)
    with ExitStack() as cluster:
        with progress.stage("checking the input"):
            files = list_inputs(names, besides=place)
            earlier = load_manifest(place)
        resumed = earlier is not None and not fresh
        if earlier is None or fresh:
            job = _begin(place, files, config, progress, cluster, fresh=fresh)
        else:
            job = _resume(place, earlier, files, config, progress)
        todo = unfinished_units(place, job.manifest)
        account = Account([unit.rows for unit in job.manifest.units])
        actors = 0
        if todo and resumed:  # a new job has needed the cluster already, to know its devices
            _connect(cluster, progress)
        if todo:
            actors = run_units(job, todo, account, progress, build_scorer or open_scorer)
    _add_up(job, account, progress)
    return _conclude(job, names, started, todo, account, actors)


def _begin(
    output: Location,
    files: list[InputFile],
    config: ScoreConfig,
    progress: JobProgress,
    cluster: ExitStack,
    *,
    fresh: bool,
) -> Job:
    """A new job, its manifest written. What is cheap to check comes first; the weights are hashed last.

    With `fresh` an earlier job in `output` is discarded, when nothing can go wrong any more but the work itself.
    """
    with progress.counted("reading footers", len(files)) as on_file:
        contents = examine(files, config.columns, config.unit_rows, on_file)
    message_json = detect_message_json(read_sample(files, contents, config.columns), config.columns)
    folder = locate_model(config.model, config.revision)
    tokenizer = PolarTokenizer(folder)
    check_writable(output)
    _connect(cluster, progress)
    _refuse_to_guess(config)
    engine = resolve_engine(config.engine, folder, has_gpu=has_gpu(), max_tokens=config.limits.max_tokens)
    with progress.stage("reading the weights"):
        receipt = build_receipt(folder, tokenizer, engine, config.limits)
    manifest = make_manifest(files, contents, receipt, config.columns, message_json)
    if fresh:
        discard_job(output)
    save_manifest(output, manifest)
    job = Job(output, manifest, _resolved(config, engine))
    output.join(FOLDER, "settings.json").write_atomically(job.config.model_dump_json(indent=2).encode())
    return job


def _resume(
    output: Location, manifest: Manifest, files: list[InputFile], config: ScoreConfig, progress: JobProgress
) -> Job:
    """The job that `output` has, if it is this very job.

    `auto` means what it meant when the job was made: a cluster that has lost its GPUs does not change a job.
    """
    folder = locate_model(config.model, config.revision)
    before = manifest.receipt
    kept = {name: getattr(before, name) for name in ("device", "dtype") if getattr(config.engine, name) == "auto"}
    engine = config.engine.model_copy(update=kept)
    engine = resolve_engine(engine, folder, has_gpu=before.device == "cuda", max_tokens=config.limits.max_tokens)
    with progress.stage("reading the weights"):
        receipt = build_receipt(folder, PolarTokenizer(folder), engine, config.limits)
    check_same_job(manifest, files, receipt, config.columns, output)
    discard_leftovers(output)
    return Job(output, manifest, _resolved(config, engine))


def _resolved(config: ScoreConfig, engine: EngineConfig) -> ScoreConfig:
    """Settings that mean the same in an actor's process."""
    return config.model_copy(update={"engine": engine, "model": absolute_model(config.model)})


def _connect(cluster: ExitStack, progress: JobProgress) -> None:
    with progress.stage("connecting to Ray"):
        cluster.enter_context(ray_cluster())


def _refuse_to_guess(config: ScoreConfig) -> None:
    """`auto` is what the nodes that run suggest, and without one POLAR-7B would be scored on a CPU, by one actor."""
    if has_workers() or config.engine.is_elsewhere:
        return
    engine = config.engine
    settings = {"engine.device": engine.device, "actors": config.actors}
    if engine.device != "cuda":
        settings["engine.threads"] = engine.threads or "auto"
    left = [name for name, value in settings.items() if value == "auto"]
    if left:
        raise ConfigError(
            f"{' and '.join(left)}: the cluster has no worker node yet, so nothing to go by; say what it is to "
            "grow to, for example engine.device = cuda and actors = 8"
        )


def _conclude(job: Job, names: list[str], started: float, todo: list[int], account: Account, actors: int) -> JobSummary:
    """Write report.html, and judge the failures."""
    untrained = is_untrained(locate_model(job.config.model, job.config.revision))
    total = account.total
    receipt, seconds = job.manifest.receipt, time.time() - started
    report = job.output.join(FOLDER, "report.html")
    if todo or not report.exists():
        facts = ReportFacts(
            title=PurePosixPath(job.output.path).name,
            model=job.config.model,
            receipt=receipt.model_dump(),
            receipt_id=receipt.receipt_id,
            inputs=tuple(names),
            started=started,
            finished=time.time(),
            wall_seconds=seconds,
            actors=actors,
        )
        report.write_atomically(write_report(total, facts, account.parts).encode())
    if total.failed > job.config.max_failed_fraction * total.rows:
        causes = ", ".join(f"{count} {status}" for status, count in sorted(total.by_status.items()) if status != "ok")
        raise TooManyFailures(
            f"{total.failed} of {total.rows} rows have no reward ({causes}), more than max_failed_fraction = "
            f"{job.config.max_failed_fraction}. All rows are written; {report.url} and the reward_status column say why"
        )
    return JobSummary(
        **total.model_dump(include=set(JobSummary.model_fields) - {"seconds"}),
        failed=total.failed,
        seconds=seconds,
        receipt_id=receipt.receipt_id,
        units=len(job.manifest.units),
        resumed_units=len(job.manifest.units) - len(todo),
        output=job.output.url,
        untrained=untrained,
        report=report.url,
    )


def _add_up(job: Job, account: Account, progress: JobProgress) -> None:
    """Complete the account by the reports in files that this run did not write, or did not hear of."""

    def read(index: int) -> tuple[int, UnitReport]:
        report = read_written_report(job.output, job.manifest, index)
        on_unit()
        return index, report

    missing = account.missing
    with progress.counted("adding up", len(missing)) as on_unit, ThreadPoolExecutor(LISTING_THREADS) as pool:
        for index, report in pool.map(read, missing):
            account.add(index, report)
    account.total.finished.sort()
