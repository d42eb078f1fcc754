"""`score_parquet`: a corpus in, the same corpus with rewards out, on Ray Data, exactly once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path, PurePosixPath

from pydantic import BaseModel

from polar_ray.config import EngineConfig, ScoreConfig
from polar_ray.corpus.actor import BuildScorer, open_scorer
from polar_ray.corpus.columns import detect_message_json
from polar_ray.corpus.inputs import LISTING_THREADS, InputFile, examine, list_inputs
from polar_ray.corpus.manifest import (
    FOLDER,
    Manifest,
    check_same_job,
    discard_job,
    discard_leftovers,
    finished_parts,
    load_manifest,
    make_manifest,
    save_manifest,
)
from polar_ray.corpus.progress import JobProgress, SilentProgress
from polar_ray.corpus.report import ReportFacts, write_report
from polar_ray.corpus.run import Job, has_gpu, ray_cluster, run_units
from polar_ray.corpus.storage import Location
from polar_ray.corpus.summary import UnitReport, combine
from polar_ray.corpus.units import read_report, read_sample
from polar_ray.encoding.tokenizer import PolarTokenizer
from polar_ray.engines.build import resolve_engine
from polar_ray.errors import JobError, OutputError, TooManyFailures
from polar_ray.model.locate import locate_model
from polar_ray.receipts import Receipt, build_receipt


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
    names = [str(given) for given in ([inputs] if isinstance(inputs, (str, Path)) else inputs)]
    place = Location(str(output)).absolute()
    with ExitStack() as cluster:
        with progress.stage("checking the input"):
            files = list_inputs(names)
            _refuse_output_among_inputs(place, files)
            if fresh:
                discard_job(place)
            manifest = load_manifest(place)
            folder = locate_model(config.model, config.revision)
        if manifest is None:
            with progress.stage("starting Ray"):
                cluster.enter_context(ray_cluster())
        engine = _resolve(config.engine, folder, manifest)
        with progress.stage("reading the weights"):
            receipt = build_receipt(folder, PolarTokenizer(folder), engine, config.limits)
        resolved = config.model_copy(update={"engine": engine})
        job = _prepare(place, manifest, files, resolved, receipt, progress)
        todo = _unfinished(job)
        actors = 0
        if todo and manifest is not None:
            with progress.stage("starting Ray"):
                cluster.enter_context(ray_cluster())
        if todo:
            actors = run_units(job, todo, progress, build_scorer or open_scorer)
    return _conclude(job, names, started, todo, actors, progress)


def _resolve(engine: EngineConfig, folder: Path, manifest: Manifest | None) -> EngineConfig:
    """`auto` means what it meant when the job was made: a cluster that has lost its GPUs does not change a job."""
    if manifest is None:
        return resolve_engine(engine, folder, has_gpu=has_gpu())
    before = manifest.receipt
    kept = {name: getattr(before, name) for name in ("device", "dtype") if getattr(engine, name) == "auto"}
    return resolve_engine(engine.model_copy(update=kept), folder, has_gpu=before.device == "cuda")


def _prepare(
    output: Location,
    manifest: Manifest | None,
    files: list[InputFile],
    config: ScoreConfig,
    receipt: Receipt,
    progress: JobProgress,
) -> Job:
    """The job of the manifest that `output` has, if it is this very job; else of a new one, written."""
    if manifest is not None:
        check_same_job(manifest, files, receipt, config.columns, output)
        discard_leftovers(output)
        return Job(output, manifest, config)
    with progress.counted("reading footers", len(files)) as on_file:
        contents = examine(files, config.columns, config.unit_rows, on_file)
    message_json = detect_message_json(read_sample(files, contents, config.columns), config.columns)
    manifest = make_manifest(files, contents, receipt, config.columns, message_json)
    save_manifest(output, manifest)
    output.join(FOLDER, "settings.json").write_atomically(config.model_dump_json(indent=2).encode())
    return Job(output, manifest, config)


def _unfinished(job: Job) -> list[int]:
    done = finished_parts(job.output)
    return [unit.index for unit in job.manifest.units if job.manifest.part(unit.index) not in done]


def _refuse_output_among_inputs(output: Location, files: list[InputFile]) -> None:
    """An output inside the input would be input the next time."""
    inside = [
        file.url for file in files if PurePosixPath(output.path) in PurePosixPath(Location(file.url).path).parents
    ]
    if inside:
        raise OutputError(f"{output.url}: the input {inside[0]} lies in it; name a folder of its own")


def _conclude(
    job: Job, names: list[str], started: float, todo: list[int], actors: int, progress: JobProgress
) -> JobSummary:
    """Add up the reports in the output's files, write report.html, and judge the failures."""
    total = _add_up(job, progress)
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
        report.write_atomically(write_report(total, facts).encode())
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
        report=report.url,
    )


def _add_up(job: Job, progress: JobProgress) -> UnitReport:
    def read(index: int) -> UnitReport:
        report = read_report(job.output, job.manifest, index)
        if report is None:
            raise JobError(f"{job.manifest.describe(index)}: its file vanished; run the same command again")
        on_unit()
        return report

    with (
        progress.counted("adding up", len(job.manifest.units)) as on_unit,
        ThreadPoolExecutor(LISTING_THREADS) as pool,
    ):
        return combine(pool.map(read, range(len(job.manifest.units))))
