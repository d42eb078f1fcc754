"""How a run takes an output: it is new, or this very run's, and nobody else's while the run lasts."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from filelock import FileLock, Timeout

from polar_ray.columns import detect_message_json
from polar_ray.config.training import TrainConfig
from polar_ray.corpus.inputs import examine, list_inputs
from polar_ray.corpus.manifest import FOLDER, check_writable
from polar_ray.corpus.storage import Location
from polar_ray.corpus.units import read_sample
from polar_ray.encoding.encode import RENDERED_SLACK_TOKENS
from polar_ray.encoding.tokenizer import PolarTokenizer
from polar_ray.errors import ConfigError, OutputError
from polar_ray.model.checkpoint import Checkpoint, weights_digest
from polar_ray.model.locate import locate_model
from polar_ray.model.rope import Rope
from polar_ray.training.manifest import (
    FILE,
    TrainingManifest,
    check_same_run,
    load_manifest,
    make_manifest,
    save_manifest,
)
from polar_ray.training.outcome import METRICS_FILE, RECEIPT_FILE
from polar_ray.training.prepare import SKIPPED_FILE
from polar_ray.training.progress import TrainProgress

SLICE_PAIRS = 4096
"""Pairs of one file of encoded pairs."""

LOCK_FILE = "lock"


def claim(
    output: Location, names: list[str], config: TrainConfig, progress: TrainProgress, held: ExitStack, *, fresh: bool
) -> TrainingManifest:
    """The run's manifest: the one that `output` has, if it is of this very run, else a new one, written.

    From before anything is written until `held` is closed, a local output is this process's. Raises as `train` says.
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
            raise taken(output) from None


def taken(output: Location) -> OutputError:
    """What a run is told whose output is another's."""
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
