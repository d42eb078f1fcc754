"""`train`: pairs in, a checkpoint out, on Ray Data and Ray Train, and on from where it was after a crash."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import ray

from polar_ray.cluster import has_gpu, is_of_this_process, ray_cluster
from polar_ray.config.training import TrainConfig
from polar_ray.corpus.inputs import input_names
from polar_ray.corpus.storage import Location
from polar_ray.errors import ConfigError
from polar_ray.model.locate import absolute_model
from polar_ray.report.wording import plural
from polar_ray.training.board import Board
from polar_ray.training.claim import claim
from polar_ray.training.fit import fit
from polar_ray.training.outcome import TrainSummary, conclude, finished
from polar_ray.training.packing import Schedule, make_schedule
from polar_ray.training.pairs import PairStore
from polar_ray.training.prepare import PreparedPairs, prepare_pairs
from polar_ray.training.progress import SilentTrainProgress, TrainProgress
from polar_ray.training.worker import TrainTask

OBJECT_STORE_BYTES = 512 << 20
"""Of a cluster started for one run: packs on their way to the workers."""


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
        manifest = claim(place, names, config, progress, held, fresh=fresh)
        if (done := finished(place)) is not None:
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
        starts, reports = fit(task, progress, board)
    return conclude(place, manifest.model_copy(update={"config": config}), pairs, reports, starts, started)


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
