"""polar_ray: score text with POLAR reward models on Ray. The right number, or a typed error.

    from polar_ray import Scorer, Triple

    with Scorer.open() as scorer:
        scorer.score([Triple("What is the capital of China?", "Beijing.", "Shanghai.")])

Importing this loads neither Ray nor torch; they come with the first name that needs them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from polar_ray.config import EvaluateConfig, ScoreConfig, TrainConfig
from polar_ray.errors import PolarRayError
from polar_ray.triples import PreferencePair, Scored, Triple

if TYPE_CHECKING:
    from polar_ray.client import AsyncRewardClient, RewardClient
    from polar_ray.corpus.job import JobSummary, score_parquet
    from polar_ray.evaluation.result import Evaluation
    from polar_ray.evaluation.run import evaluate
    from polar_ray.receipts import Receipt
    from polar_ray.scoring import Scorer
    from polar_ray.training.job import train
    from polar_ray.training.outcome import TrainSummary

_LATE = {
    "AsyncRewardClient": "polar_ray.client",
    "Evaluation": "polar_ray.evaluation.result",
    "JobSummary": "polar_ray.corpus.job",
    "Receipt": "polar_ray.receipts",
    "RewardClient": "polar_ray.client",
    "Scorer": "polar_ray.scoring",
    "TrainSummary": "polar_ray.training.outcome",
    "evaluate": "polar_ray.evaluation.run",
    "score_parquet": "polar_ray.corpus.job",
    "train": "polar_ray.training.job",
}

__version__ = "0.2.0"

__all__ = [
    "AsyncRewardClient",
    "EvaluateConfig",
    "Evaluation",
    "JobSummary",
    "PolarRayError",
    "PreferencePair",
    "Receipt",
    "RewardClient",
    "ScoreConfig",
    "Scored",
    "Scorer",
    "TrainConfig",
    "TrainSummary",
    "Triple",
    "evaluate",
    "score_parquet",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATE[name]), name)
