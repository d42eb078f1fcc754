"""How the learning rate moves: a linear rise, then half a cosine down to a share of the highest."""

from __future__ import annotations

import math

from polar_ray.config.training import OptimizerConfig

WARMUP_START = 0.1
"""Where the rise begins, as a share of the highest: upstream begins at `lr * 0.1` of `lr`, so all but 0; a tenth keeps
a run of few steps from wasting its first ones."""


def rate_at(step: int, n_steps: int, config: OptimizerConfig) -> float:
    """Share of the highest learning rate in step `step` of `n_steps`, counted from 0."""
    warmup = round(config.warmup_fraction * n_steps)
    if step < warmup:
        return WARMUP_START + (1 - WARMUP_START) * step / warmup
    done = (step - warmup) / max(1, n_steps - warmup)
    return config.final_fraction + (1 - config.final_fraction) * (1 + math.cos(math.pi * done)) / 2
