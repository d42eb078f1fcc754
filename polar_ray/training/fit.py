"""One run on Ray Train: its workers in an actor, so that this process can watch, draw and be interrupted."""

from __future__ import annotations

from typing import Any

import ray
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from polar_ray.corpus.manifest import FOLDER
from polar_ray.errors import PolarRayError, TrainingError, unwrap
from polar_ray.training.board import Board
from polar_ray.training.claim import taken
from polar_ray.training.progress import TrainProgress
from polar_ray.training.tracker import StepReport, TrainingTracker
from polar_ray.training.worker import TrainTask, train_worker

NAMESPACE = "polar_ray"
"""Of names that are known throughout a cluster."""

POLL_SECONDS = 0.25

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


def fit(task: TrainTask, progress: TrainProgress, board: Board) -> tuple[int, list[StepReport]]:
    """Train to the end.

    Gives how often workers were started, and every step as it was last taken. Raises `OutputError` beside another run
    of this output on the cluster, `TrainingError` or what a worker told when the run cannot go on.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    tracker: Any = ray.remote(TrainingTracker).options(num_cpus=0, scheduling_strategy=here).remote()
    controller: Any = ray.remote(_Fit).options(
        num_cpus=0, scheduling_strategy=here, name=f"train {task.output.url}", namespace=NAMESPACE
    )
    try:
        controller = controller.remote()
    except ValueError:  # the name is taken
        raise taken(task.output) from None
    try:
        outcome = controller.run.remote(task, tracker)
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
        ray.kill(controller)
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
