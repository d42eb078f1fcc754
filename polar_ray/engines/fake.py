"""An engine without a model: the same ids always get the same reward. For dry runs, documentation and tests."""

from __future__ import annotations

import hashlib
import math
import time
from pathlib import Path

import numpy as np

from polar_ray import __version__
from polar_ray.config import EngineConfig
from polar_ray.planning import Batch, Ids, Rewards


class FakeEngine:
    """Keeps the promises of `Engine`. Rewards lie between -12 and 1, as POLAR's do, and mean nothing."""

    def __init__(self, *, token_budget: int = 4096, seconds_per_token: float = 0.0) -> None:
        """`seconds_per_token` is slept for each computed token, to act like a model of that speed."""
        self._token_budget = token_budget
        self._seconds_per_token = seconds_per_token

    @property
    def token_budget(self) -> int:
        return self._token_budget

    @property
    def max_shared_length(self) -> int | None:
        return None

    def score(self, batch: Batch) -> Rewards:
        if self._seconds_per_token:
            time.sleep(self._seconds_per_token * batch.computed_tokens)
        return np.array([_reward(ids) for ids in batch.sequences()], dtype=np.float32)

    def close(self) -> None:
        """Nothing to release."""


def start(_: Path, engine: EngineConfig) -> FakeEngine:
    """The engine that `engine` names; it loads nothing."""
    speed = float(engine.arguments.get("tokens_per_s", math.inf))
    return FakeEngine(token_budget=engine.token_budget or 4096, seconds_per_token=1 / speed)


def engine_version(_: EngineConfig) -> str:
    return f"polar_ray {__version__}"


def _reward(ids: Ids) -> float:
    digest = hashlib.sha256(ids.astype("<i4").tobytes()).digest()
    return int.from_bytes(digest[:4], "little") / 2**32 * 13 - 12
