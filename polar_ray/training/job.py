"""`train`: pairs in, a checkpoint out, on Ray Data and Ray Train, and on from where it was after a crash."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray
from filelock import FileLock, Timeout
from pydantic import BaseModel
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from polar_ray.cluster import has_gpu, is_of_this_process, ray_cluster
from polar_ray.columns import detect_message_json
from polar_ray.config.training import TrainConfig
from polar_ray.corpus.inputs import examine, input_names, list_inputs
from polar_ray.corpus.manifest import FOLDER, check_writable
from polar_ray.corpus.storage import Location
from polar_ray.corpus.units import read_sample
from polar_ray.encoding.encode import RENDERED_SLACK_TOKENS
from polar_ray.encoding.tokenizer import PolarTokenizer
from polar_ray.errors import ConfigError, OutputError, PolarRayError, TrainingError, unwrap
from polar_ray.model.checkpoint import Checkpoint, weights_digest
from polar_ray.model.locate import absolute_model, locate_model
from polar_ray.model.rope import Rope
from polar_ray.report.wording import plural
from polar_ray.training.board import Board
from polar_ray.training.manifest import (
    FILE,
    TrainingManifest,
    check_same_run,
    load_manifest,
    make_manifest,
    save_manifest,
)
from polar_ray.training.packing import Schedule, make_schedule
from polar_ray.training.pairs import PairStore
from polar_ray.training.prepare import SKIPPED_FILE, PreparedPairs, prepare_pairs
from polar_ray.training.progress import SilentTrainProgress, TrainProgress
from polar_ray.training.tracker import StepReport, TrainingTracker
from polar_ray.training.worker import TrainTask, train_worker
from polar_ray.triples import STATUS_OK

SLICE_PAIRS = 4096
"""Pairs of one file of encoded pairs."""

NAMESPACE = "polar_ray"
"""Of names that are known throughout a cluster."""

OBJECT_STORE_BYTES = 512 << 20
"""Of a cluster started for one run: packs on their way to the workers."""

POLL_SECONDS = 0.25

LOCK_FILE = "lock"

KEPT_CHECKPOINTS = 2

MOST_STARTS_WITHOUT_ROOM = 30
"""Each waits a minute for the nodes of a cluster that grows; then it will not."""

KEEP_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(64 << 20),
}
"""For workers on CPUs. Their C library (glibc) would otherwise give every large activation back to the system and ask
for it again: without this a run spends most of its time in the kernel, clearing pages, at a quarter of its speed."""

RECEIPT_FILE = "receipt.json"
METRICS_FILE = "metrics.json"

LAST_SHARE = 0.1
"""Of the steps, over which the summary's loss and accuracy are taken."""


class TrainReceipt(BaseModel):
    """What made a checkpoint: enough to make it again, and to know it again."""

    weights_digest: str
    """Of the weights that were written."""

    base_model: str
    base_weights_digest: str
    tokenizer_digest: str
    encoding_version: int
    config: TrainConfig
    inputs: list[dict[str, Any]]
    """Address, size and time of change of each file of pairs."""

    versions: dict[str, str]


class TrainSummary(BaseModel):
    """A finished run in numbers."""

    pairs: int
    """Usable ones, each counted once whatever the epochs."""

    skipped: dict[str, int]
    cut_pairs: int
    steps: int
    tokens: int
    computed_tokens: int
    loss: float
    """Mean over the pairs of the last tenth of the steps; so is `accuracy`. Each pair was measured before it was learnt
    from, so with one epoch these are pairs that the model had not seen."""

    accuracy: float
    seconds: float
    """Wall time of this start of the run."""

    starts: int
    """Times that workers were started: one, and one more for each failure."""

    output: str
    weights_digest: str


def train(
    inputs: str | Path | Sequence[str | Path],
    output: str | Path,
    config: TrainConfig | None = None,
    *,
    fresh: bool = False,
    progress: TrainProgress | None = None,
) -> TrainSummary:
    """Fine-tune a POLAR checkpoint on preference pairs and write the result, a checkpoint folder, to `output`.

    Inputs are Parquet or JSONL files, folders, globs or URLs with `prompt`, `reference`, `chosen`, `rejected` and
    optionally `wrapper`. Run again after a crash, it goes on from the newest checkpoint, with the same pairs in the
    same order; run again after success, it changes nothing. `fresh` discards what an earlier run left in `output`.
    Uses the Ray cluster this process is connected to, else the one at RAY_ADDRESS, else one on this machine.

    An output has one run at a time: beside another start of it, on this machine or on the same cluster, this one ends
    with `OutputError`. Whatever ends the call, Ctrl-C in a notebook too, ends the workers.

    Raises `InputError`, `SchemaError`, `OutputError`, `ManifestConflict`, `ConfigError`, `CheckpointError` or
    `TooManyFailures` before any worker starts, and `TrainingError` from a run that cannot go on.
    """
    started = time.time()
    config, progress = config or TrainConfig(), progress or SilentTrainProgress()
    config = config.model_copy(update={"model": absolute_model(config.model)})
    names = input_names(inputs)
    place = Location(str(output)).absolute()
    with ExitStack() as held:
        manifest = _begin(place, names, config, progress, held, fresh=fresh)
        if (done := _finished(place)) is not None:
            return done
        board = Board(place)
        with progress.stage("connecting to Ray"):
            held.enter_context(ray_cluster(OBJECT_STORE_BYTES))
        config = _resolve(config)
        with progress.counted("encoding pairs", len(manifest.slices)) as on_file:
            pairs = prepare_pairs(place, manifest, on_file)
        schedule = make_schedule(PairStore(pairs.files).sizes(), config)
        with progress.stage(_describe(pairs, schedule)):
            task = TrainTask(place, config, pairs.files, ray.put(schedule))
        starts, reports = _run(task, progress, board)
    return _conclude(place, manifest.model_copy(update={"config": config}), pairs, reports, starts, started)


def _begin(
    output: Location, names: list[str], config: TrainConfig, progress: TrainProgress, held: ExitStack, *, fresh: bool
) -> TrainingManifest:
    """The run's manifest: the one that `output` has, if it is of this very run, else a new one, written.

    From before anything is written until `held` is closed, a local output is this process's.
    """
    folder = locate_model(config.model, config.revision)
    if output.is_local and Path(output.path).resolve() == folder.resolve():
        raise OutputError(f"{output.url}: is the model to start from; choose another output")
    with progress.stage("checking the pairs"):
        files = list_inputs(names, besides=output)
        contents = examine(files, config.columns, SLICE_PAIRS, will_write=False)
        message_json = detect_message_json(read_sample(files, contents, config.columns), config.columns)
    tokenizer = PolarTokenizer(folder)
    _check_lengths(Checkpoint.open(folder), config)
    with progress.stage("reading the weights"):
        digest = weights_digest(folder)
    now = make_manifest(config, files, contents, message_json, digest, tokenizer.digest)
    is_ours = output.join(FOLDER, FILE).exists()
    if is_ours and not fresh:
        before = load_manifest(output)
        check_same_run(before, now, output)
        if not output.join(METRICS_FILE).exists():
            check_writable(output)
            _lock(output, held)
        return before.model_copy(update={"config": config})
    if not is_ours and output.join("config.json").exists():
        raise OutputError(f"{output.url}: holds a checkpoint that no run of ours left there; choose another output")
    check_writable(output)
    _lock(output, held)
    if is_ours:
        _discard(output)
    save_manifest(output, now)
    return now


def _lock(output: Location, held: ExitStack) -> None:
    """Keep other processes of this machine out of a local output; the system gives it back when this one ends."""
    if output.is_local:
        try:
            held.enter_context(FileLock(Path(output.path, FOLDER, LOCK_FILE), timeout=0))
        except Timeout:
            raise _taken(output) from None


def _taken(output: Location) -> OutputError:
    return OutputError(f"{output.url}: another run is training into it; wait for it, or choose another output")


def _check_lengths(checkpoint: Checkpoint, config: TrainConfig) -> None:
    longest = Rope.of(checkpoint.config).longest_with_one_base
    if longest is not None and config.limits.max_tokens + RENDERED_SLACK_TOKENS > longest:
        raise ConfigError(
            f"limits.max_tokens = {config.limits.max_tokens}: near and beyond {longest} this model's rotary base "
            "depends on the length, and training does not follow it there; set limits.max_tokens lower"
        )


def _discard(output: Location) -> None:
    """Remove what an earlier run left, and nothing else; its manifest last, by which the rest is known as its own."""
    for info in output.walk():
        name = info.base_name
        is_weights = name.endswith(".safetensors") or name == "model.safetensors.index.json"
        if info.path == output.join(name).path and (is_weights or name in ("config.json", RECEIPT_FILE, METRICS_FILE)):
            output.join(name).delete()
    for name in ("pairs", "checkpoints", "tensorboard", SKIPPED_FILE, FILE):
        output.join(FOLDER, name).delete()


def _finished(output: Location) -> TrainSummary | None:
    """The summary of a run that has nothing left to do."""
    place = output.join(METRICS_FILE)
    if not place.exists():
        return None
    return TrainSummary.model_validate(json.loads(place.read_bytes())["summary"])


def _resolve(config: TrainConfig) -> TrainConfig:
    """`auto` values replaced by what they mean on this cluster. Raises `ConfigError` for what can never start."""
    device = config.device if config.device != "auto" else ("cuda" if has_gpu() else "cpu")
    if device == "cpu" and config.precision == "float16":
        raise ConfigError("precision = 'float16': CPUs have no float16 matrix units; take bfloat16 or float32")
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    has = [int(node.get("GPU" if device == "cuda" else "CPU", 0)) for node in nodes]
    threads = config.threads
    if device == "cpu" and threads is None:
        fitting = [size for size in range(1, max(has) + 1) if sum(n // size for n in has) >= config.workers]
        threads = max(fitting, default=1)
    places = sum(has) if device == "cuda" else sum(n // (threads or 1) for n in has)
    if places < config.workers and is_of_this_process():
        what = "GPUs" if device == "cuda" else f"places of {threads} CPUs"
        raise ConfigError(f"workers = {config.workers}: this machine has {places} {what}; lower workers or threads")
    return config.model_copy(update={"device": device, "threads": threads})


def _describe(pairs: PreparedPairs, schedule: Schedule) -> str:
    """What lies ahead, in one line."""
    steps, computed = schedule.n_steps, schedule.computed_tokens
    return f"{plural(pairs.usable, 'pair')}, {plural(steps, 'step')}, {plural(computed, 'token')} to compute"


def _run(task: TrainTask, progress: TrainProgress, board: Board) -> tuple[int, list[StepReport]]:
    """Train, with `fit` in an actor so that this process can watch and draw.

    Gives how often workers were started, and every step as it was last taken.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    tracker: Any = ray.remote(TrainingTracker).options(num_cpus=0, scheduling_strategy=here).remote()
    fit: Any = ray.remote(_Fit).options(
        num_cpus=0, scheduling_strategy=here, name=f"train {task.output.url}", namespace=NAMESPACE
    )
    try:
        fit = fit.remote()
    except ValueError:  # the name is taken
        raise _taken(task.output) from None
    try:
        outcome = fit.run.remote(task, tracker)
        with progress.training() as show:
            while True:
                ended, _ = ray.wait([outcome], timeout=POLL_SECONDS)
                reports, starts, finished, failure = ray.get(tracker.poll.remote(board.last_step))
                if failure is not None:
                    raise failure
                board.add(reports)
                show(reports)
                if ended:
                    break
        board.close()
        if (failure := ray.get(outcome)) is not None or not finished:
            raise failure or _explain(None)
    finally:
        ray.kill(fit)
        # Ray Train leaves this to an actor of its own, which needs the dashboard; without, what the workers had would
        # stay taken for as long as this process is connected.
        for placement in ray.get(tracker.placements.remote()):
            ray.util.remove_placement_group(placement)
    return starts, ray.get(tracker.poll.remote(0))[0]


class _Fit:
    """Ray Train's controller and workers, which end when this actor does: they are its own."""

    def run(self, task: TrainTask, tracker: Any) -> PolarRayError | None:
        """Train to the end; gives the reason if that was not it."""
        try:
            _trainer(task, tracker).fit()
        except Exception as error:
            return _explain(error)
        return None


def _trainer(task: TrainTask, tracker: Any) -> TorchTrainer:
    config = task.config
    store = task.output.join(FOLDER, "checkpoints")
    on_gpu = config.device == "cuda"
    return TorchTrainer(
        lambda: train_worker(task, tracker),
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=config.workers,
            use_gpu=on_gpu,
            resources_per_worker={"GPU": 1, "CPU": 1} if on_gpu else {"CPU": config.threads},
        ),
        run_config=RunConfig(
            name="run",
            storage_path=store.path,
            storage_filesystem=store.filesystem,
            failure_config=FailureConfig(
                max_failures=config.max_failures, controller_failure_limit=MOST_STARTS_WITHOUT_ROOM
            ),
            checkpoint_config=CheckpointConfig(num_to_keep=KEPT_CHECKPOINTS),
            worker_runtime_env={} if on_gpu else {"env_vars": KEEP_MEMORY},
        ),
    )


def _explain(error: BaseException | None) -> PolarRayError:
    """The reason that a run failed, in one sentence."""
    failures = getattr(error, "worker_failures", None) or {}
    for cause in [*failures.values(), error]:
        known = unwrap(cause) if isinstance(cause, BaseException) else None
        if isinstance(known, PolarRayError):
            return known
    lines = str(error or "").strip().splitlines() or ["its workers ended before their last step"]
    return TrainingError(f"training failed: {lines[-1]}. Run the same command again to go on from the last checkpoint")


def _conclude(
    output: Location,
    manifest: TrainingManifest,
    pairs: PreparedPairs,
    reports: list[StepReport],
    starts: int,
    started: float,
) -> TrainSummary:
    """Write what the run was and how it went, beside the weights."""
    config = manifest.config
    digest = _digest_of(output)
    receipt = TrainReceipt(
        weights_digest=digest,
        base_model=config.model,
        base_weights_digest=manifest.base_weights,
        tokenizer_digest=manifest.tokenizer,
        encoding_version=manifest.encoding_version,
        config=config,
        inputs=[source.file.model_dump(include={"url", "size", "modified_ns"}) for source in manifest.sources],
        versions={name: version(name) for name in ("polar_ray", "torch", "transformers", "ray")},
    )
    summary = TrainSummary(
        pairs=pairs.usable,
        skipped={status: count for status, count in pairs.by_status.items() if status != STATUS_OK},
        cut_pairs=pairs.cut_pairs,
        steps=reports[-1].step if reports else 0,
        tokens=sum(report.tokens for report in reports),
        computed_tokens=sum(report.computed_tokens for report in reports),
        seconds=time.time() - started,
        starts=starts,
        output=output.url,
        weights_digest=digest,
        **_over_the_last(reports),
    )
    output.join(RECEIPT_FILE).write_atomically(receipt.model_dump_json(indent=2).encode())
    metrics = {
        "summary": summary.model_dump(mode="json"),
        "steps": [report.model_dump(mode="json") for report in reports],
    }
    output.join(METRICS_FILE).write_atomically(json.dumps(metrics, indent=1).encode())
    return summary


def _over_the_last(reports: list[StepReport]) -> dict[str, float]:
    last = reports[-max(1, round(LAST_SHARE * len(reports))) :]
    pairs = sum(report.pairs for report in last)
    return {
        name: sum(getattr(report, name) * report.pairs for report in last) / max(1, pairs)
        for name in ("loss", "accuracy")
    }


def _digest_of(output: Location) -> str:
    if output.is_local:
        return weights_digest(output.path)
    import tempfile

    from pyarrow import fs

    with tempfile.TemporaryDirectory() as scratch:
        for info in output.walk():
            if info.base_name.endswith((".safetensors", ".json")):
                fs.copy_files(
                    info.path,
                    f"{scratch}/{info.base_name}",
                    source_filesystem=output.filesystem,
                    destination_filesystem=fs.LocalFileSystem(),
                )
        return weights_digest(scratch)
