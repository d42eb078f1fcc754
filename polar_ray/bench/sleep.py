"""An engine that takes as long as one of a stated speed would, and computes nothing: what is left is the road to it."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from polar_ray.config import LimitsConfig, ScoreConfig
from polar_ray.encoding.encode import Encoder
from polar_ray.encoding.tokenizer import PolarTokenizer
from polar_ray.engines.fake import FakeEngine
from polar_ray.model.locate import EMBEDDED_FOLDER
from polar_ray.planning import Batch, Rewards
from polar_ray.scoring import Scorer

TOKEN_BUDGET = 32_768
"""What an engine on a GPU takes by default."""


@dataclass
class SleepEngine(FakeEngine):
    tokens_per_s: float

    def __post_init__(self) -> None:
        super().__init__(token_budget=TOKEN_BUDGET)

    def score(self, batch: Batch) -> Rewards:
        time.sleep(batch.computed_tokens / self.tokens_per_s)
        return np.zeros(len(batch), dtype=np.float32)


def open_sleeping_scorer(_: ScoreConfig | None, *, tokens_per_s: float, not_before: float = 0.0) -> Scorer:
    """A scorer with such an engine, once the clock (`time.time`) says `not_before`."""
    time.sleep(max(0.0, not_before - time.time()))
    return Scorer(Encoder(PolarTokenizer(EMBEDDED_FOLDER), LimitsConfig()), SleepEngine(tokens_per_s))
