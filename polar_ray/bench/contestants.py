"""What engines are compared with: each a way from token ids to rewards, loaded in a process of its own.

`readme` is what POLAR's own examples do, `sorted` what a careful user makes of it; the others are engines, started as a
job would start them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

from polar_ray.bench.padded import padded_rewards, padded_widths, readme_batches, sorted_batches
from polar_ray.config import EngineConfig
from polar_ray.engines.base import Engine
from polar_ray.engines.build import DEFAULT_TOKEN_BUDGET, build_engine, engine_module
from polar_ray.engines.torch.engine import DTYPES
from polar_ray.model.architecture import CheckpointConfig
from polar_ray.model.checkpoint import read_config
from polar_ray.model.cost import flops_of_batches, flops_of_lengths
from polar_ray.model.polar import PolarForReward, load_polar
from polar_ray.planning import Ids, Rewards, plan

Batches = Callable[[Sequence[Ids]], list[list[int]]]


@dataclass(frozen=True)
class Turn:
    """One pass over all sequences of a workload."""

    rewards: Rewards
    wall_s: float
    plan_cpu_s: float
    """CPU seconds of planning, which is part of a turn as it is of a job."""

    computed_tokens: int
    """With padding, or with what the planner shares counted once; what other engines share is up to their caches."""

    flops: float | None
    """Floating point operations on those tokens, by `model/cost.py`; None where another engine's cache decides."""


@dataclass(frozen=True)
class Runner:
    """A contestant that is loaded."""

    version: str
    turn: Callable[[Sequence[Ids]], Turn]


@dataclass(frozen=True)
class EngineContestant:
    """An engine, by its resolved settings."""

    method: str
    engine: EngineConfig

    @property
    def arithmetic(self) -> str:
        """Its quantization, or else its dtype."""
        return self.engine.quantization or self.engine.dtype

    @property
    def shares(self) -> bool:
        return self.engine.share_prefixes

    @property
    def device(self) -> str:
        return self.engine.device

    @contextmanager
    def loaded(self, folder: Path) -> Iterator[Runner]:
        """For as long as the context lasts. Raises what `build_engine` raises."""
        settings, config = self.engine, read_config(folder)
        built = build_engine(settings, folder)
        try:
            named = engine_module(settings.kind).engine_version(settings)
            yield Runner(named, partial(_engine_turn, built, settings, config))
        finally:
            built.close()


@dataclass(frozen=True)
class PaddedContestant:
    """Padded batches through transformers."""

    method: str
    """`readme` or `sorted`."""

    dtype: str

    @property
    def arithmetic(self) -> str:
        return self.dtype

    @property
    def shares(self) -> bool:
        return False

    @property
    def device(self) -> str:
        return "cpu"

    @contextmanager
    def loaded(self, folder: Path) -> Iterator[Runner]:
        """For as long as the context lasts."""
        model = load_polar(folder, dtype=DTYPES[self.dtype])
        by_length = partial(sorted_batches, token_budget=DEFAULT_TOKEN_BUDGET["cpu"])
        batches = readme_batches if self.method == "readme" else by_length
        named = f"transformers {version('transformers')}, torch {version('torch')}"
        yield Runner(named, partial(_padded_turn, model, batches))


def _engine_turn(engine: Engine, settings: EngineConfig, config: CheckpointConfig, sequences: Sequence[Ids]) -> Turn:
    wall, cpu = time.perf_counter(), time.process_time()
    planned = plan(
        sequences,
        token_budget=engine.token_budget,
        share_prefixes=settings.share_prefixes,
        max_shared_length=engine.max_shared_length,
    )
    plan_cpu_s = time.process_time() - cpu
    rewards = planned.rewards(engine.score)
    wall_s = time.perf_counter() - wall
    operations: float | None = None
    if settings.kind == "torch":
        operations = flops_of_batches(config, planned.batches)
    elif not settings.share_prefixes:
        operations = flops_of_lengths(config, list(map(len, sequences)))
    return Turn(rewards, wall_s, plan_cpu_s, planned.computed_tokens, operations)


def _padded_turn(model: PolarForReward, batches: Batches, sequences: Sequence[Ids]) -> Turn:
    wall = time.perf_counter()
    chosen = batches(sequences)
    rewards = padded_rewards(model, sequences, chosen)
    wall_s = time.perf_counter() - wall
    widths = [width for batch in padded_widths(sequences, chosen) for width in batch]
    return Turn(rewards, wall_s, 0.0, sum(widths), flops_of_lengths(model.checkpoint_config, widths))
