"""What each worker of a run does: packs in, steps, checkpoints, and at the end the trained weights out.

A worker reads its own packs, in the order of the schedule, where the encoded pairs lie. Splitting one stream among the
workers would leave to timing who gets which pack, and a run that goes on after a crash would not be the run it was.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.train import Checkpoint
from safetensors.torch import load_file, save_file

from polar_ray.config.training import TrainConfig
from polar_ray.corpus.storage import Location
from polar_ray.engines.torch.engine import DTYPES
from polar_ray.errors import CheckpointError, ConfigError, TrainingError
from polar_ray.model.locate import locate_model
from polar_ray.model.polar import load_polar
from polar_ray.training.adapters import add_adapters
from polar_ray.training.export import gather_weights, write_weights
from polar_ray.training.learner import Learner, PackedPairs, StepSums, idle_pairs, pack_pairs
from polar_ray.training.packing import Ints
from polar_ray.training.pairs import PairStore
from polar_ray.training.schedule import rate_at
from polar_ray.training.tracker import StepReport

HISTORY_FILE = "steps.jsonl"
"""In a checkpoint: the reports of all steps that led to it."""


@dataclass(frozen=True)
class TrainTask:
    """What a worker needs to know; small, because it is copied to each of them."""

    output: Location
    config: TrainConfig
    """With `auto` values resolved."""

    files: Sequence[Location]
    """Of encoded pairs."""

    schedule: Any
    """Ray's reference to the `Schedule`."""


def train_worker(task: TrainTask, tracker: Any) -> None:
    """Run on every worker by Ray Train. It tells the tracker what another try would not mend, and waits to be ended."""
    try:
        _train(task, tracker)
    except (CheckpointError, ConfigError, TrainingError) as error:
        ray.get(tracker.fail.remote(error))
        # The driver ends the run. Raised here, the error would have Ray Train start other workers just then, and what
        # these get nobody would know of and give back.
        while True:
            time.sleep(1)


def _train(task: TrainTask, tracker: Any) -> None:
    config, context = task.config, ray.train.get_context()
    if context.get_world_rank() == 0:
        ray.get(tracker.placed.remote(ray.util.get_current_placement_group()))
    device = ray.train.torch.get_device()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    folder = locate_model(config.model, config.revision)
    is_spread = config.parallel == "fsdp" and config.workers > 1
    model = load_polar(folder, dtype=torch.float32, device="cpu" if is_spread else device)
    if config.lora.rank:
        add_adapters(model, config.lora)
    learner = Learner(model, config, device)
    history = _restore(learner, config)
    first_step = history[-1].step if history else 0
    rank, workers = context.get_world_rank(), context.get_world_size()
    if rank == 0:
        ray.get(tracker.started.remote(history))
    store, schedule = PairStore(task.files), ray.get(task.schedule)
    n_steps = schedule.n_steps
    for step in range(first_step, n_steps):
        started = time.perf_counter()
        packs = [
            _pack(store, places, learner, model.checkpoint_config.reward_token_id, config)
            for places in schedule.packs_of_worker(step, rank, workers)
        ]
        rate = rate_at(step, n_steps, config.optimizer)
        sums, norm = learner.step(packs, schedule.pairs_of_step(step), rate)
        total = sums.over_all_workers(device)
        if not math.isfinite(total.loss):
            raise TrainingError(f"step {step + 1}: the loss is {total.loss}; lower optimizer.learning_rate")
        seconds = time.perf_counter() - started
        history.append(_report(step, n_steps, total, norm, rate * config.optimizer.learning_rate, seconds))
        if rank == 0:
            tracker.step.remote(history[-1])
        if (step + 1) % config.checkpoint_every_steps == 0 or step + 1 == n_steps:
            _save(learner, config, history)
    weights = gather_weights(learner.model, DTYPES[config.save_dtype])
    if rank == 0:
        write_weights(weights, model.checkpoint_config, folder, task.output)
    if dist.is_initialized():
        dist.barrier()
    if rank == 0:
        ray.get(tracker.finish.remote())


def _pack(store: PairStore, places: Ints, learner: Learner, score_id: int, config: TrainConfig) -> PackedPairs:
    if not len(places):
        return idle_pairs(score_id)
    chosen, rejected = store.read(places)
    return pack_pairs(
        chosen,
        rejected,
        share_prefixes=config.share_prefixes,
        max_shared_length=learner.max_shared_length,
    )


def _report(step: int, n_steps: int, sums: StepSums, norm: float, rate: float, seconds: float) -> StepReport:
    pairs = max(sums.pairs, 1)
    return StepReport(
        step=step + 1,
        n_steps=n_steps,
        pairs=int(sums.pairs),
        loss=sums.loss / pairs,
        accuracy=sums.correct / pairs,
        margin=sums.margin / pairs,
        chosen_reward=sums.chosen / pairs,
        rejected_reward=sums.rejected / pairs,
        gradient_norm=norm if math.isfinite(norm) else None,
        learning_rate=rate,
        tokens=int(sums.tokens),
        computed_tokens=int(sums.computed_tokens),
        seconds=seconds,
    )


def _save(learner: Learner, config: TrainConfig, history: list[StepReport]) -> None:
    """A checkpoint: with FSDP every worker's part, else what the first one has, which all have."""
    rank, metrics = ray.train.get_context().get_world_rank(), {"step": history[-1].step}
    if rank and config.parallel == "ddp":
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        save_file(learner.state(), Path(folder) / f"rank-{rank:05d}.safetensors")
        if rank == 0:
            lines = "".join(f"{report.model_dump_json()}\n" for report in history)
            (Path(folder) / HISTORY_FILE).write_text(lines)
        ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder))


def _restore(learner: Learner, config: TrainConfig) -> list[StepReport]:
    """Take up the newest checkpoint, if there is one; gives the steps that led to it."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return []
    rank = ray.train.get_context().get_world_rank() if config.parallel == "fsdp" else 0
    with checkpoint.as_directory() as folder:
        learner.restore(load_file(Path(folder) / f"rank-{rank:05d}.safetensors"))
        lines = (Path(folder) / HISTORY_FILE).read_text().splitlines()
    return [StepReport.model_validate_json(line) for line in lines]
