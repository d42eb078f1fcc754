"""Packs on their way to the workers, on Ray Data: each worker's own, in the order in which it takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray.data
import ray.train

from polar_ray.config.training import TrainConfig
from polar_ray.corpus.storage import Location
from polar_ray.training.packing import Schedule
from polar_ray.training.pairs import NO_IDS, PairStore

PACKS = "packs"
"""Name of the data set that workers read."""

BLOCK_PACKS = 16
"""Packs of one task that reads them."""


@dataclass(frozen=True)
class TrainTask:
    """What a worker needs to know; small, because it is copied to each of them."""

    output: Location
    config: TrainConfig
    """With `auto` values resolved."""


class PackFeed(ray.train.DataConfig):  # type: ignore[misc]
    """Gives every worker a data set of its own: its packs, in the order in which it takes them.

    Splitting one data set among the workers would leave to timing who gets which pack, and a run that goes on after a
    crash would not be the run that it was.
    """

    def __init__(self, files: tuple[Location, ...], schedule: Schedule) -> None:
        super().__init__(datasets_to_split=[])
        self._files, self._schedule = files, schedule

    def configure(self, datasets: Any, world_size: int, *_: Any, **__: Any) -> list[dict[str, ray.data.DataIterator]]:
        schedule = self._schedule
        pairs_of = [schedule.pairs_of_step(step) for step in range(schedule.n_steps)]
        return [
            {
                PACKS: self._read(
                    [
                        {
                            "step": step,
                            "n_steps": schedule.n_steps,
                            "pairs_in_step": pairs_of[step],
                            "pairs": pack.tolist(),
                        }
                        for step, pack in schedule.of_worker(rank, world_size)
                    ]
                )
            }
            for rank in range(world_size)
        ]

    def _read(self, packs: list[dict[str, Any]]) -> ray.data.DataIterator:
        data = ray.data.from_items(packs, override_num_blocks=-(-len(packs) // BLOCK_PACKS))
        # One process for each worker. No CPU is asked for: the workers have them all, and reading is mostly waiting.
        data = data.map(ReadPack, fn_constructor_args=(self._files,), num_cpus=0, concurrency=1)
        data.context.execution_options.preserve_order = True
        data.context.enable_progress_bars = False
        data.context.print_on_execution_start = False
        iterator: ray.data.DataIterator = data.iterator()
        return iterator


class ReadPack:
    """Puts the ids of its pairs into a pack, as one run of ids and the lengths to cut it by."""

    def __init__(self, files: Sequence[Location]) -> None:
        self._store = PairStore(files)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        chosen, rejected = self._store.read(row["pairs"])
        sequences = [*chosen, *rejected]
        return {
            **{name: row[name] for name in ("step", "n_steps", "pairs_in_step")},
            "ids": np.concatenate([NO_IDS, *sequences]),
            "lengths": np.array([len(ids) for ids in sequences], dtype=np.int64),
        }
