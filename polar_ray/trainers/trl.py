"""TRL: a reward function for `GRPOTrainer`, `RLOOTrainer`, `AsyncGRPOTrainer` and their kin.

    trainer = GRPOTrainer(model, reward_funcs=polar_reward("127.0.0.1:8000"), train_dataset=data, args=args)

The data set needs a column of references beside its prompts: strings or conversations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from polar_ray.trainers.endpoint import Endpoint, Fields, column, report, reward
from polar_ray.triples import Scored

Column = Sequence[Any]
"""One value per completion."""


@dataclass(frozen=True)
class PolarReward:
    """A reward function as TRL calls it. Pickles, as trainers that score in another process demand."""

    endpoint: Endpoint
    reference_column: str
    __name__: str
    """What TRL logs it as: `rewards/<name>/mean`."""

    def __call__(self, prompts: Column, completions: Column, **columns: Any) -> list[float]:
        """One float per completion, in order; counts of tokens are logged where TRL takes them.

        Raises `SchemaError` where the column is missing, a row's error, or what a client raises.
        """
        rows = self.endpoint.score(_fields(prompts, completions, columns, self.reference_column))
        return _rewards(rows, columns)


@dataclass(frozen=True)
class AsyncPolarReward:
    """`PolarReward` for TRL to run beside its other asynchronous reward functions."""

    endpoint: Endpoint
    reference_column: str
    __name__: str

    async def __call__(self, prompts: Column, completions: Column, **columns: Any) -> list[float]:
        """As `PolarReward`."""
        rows = await self.endpoint.ascore(_fields(prompts, completions, columns, self.reference_column))
        return _rewards(rows, columns)


def polar_reward(
    address: str | None = None, *, reference_column: str = "reference", name: str = "polar", **settings: Any
) -> PolarReward:
    """A reward function that asks the endpoint at `address`. `settings` are those of `Endpoint`."""
    return PolarReward(Endpoint.of({"address": address, **settings}), reference_column, name)


def async_polar_reward(
    address: str | None = None, *, reference_column: str = "reference", name: str = "polar", **settings: Any
) -> AsyncPolarReward:
    """As `polar_reward`, asynchronous."""
    return AsyncPolarReward(Endpoint.of({"address": address, **settings}), reference_column, name)


def _fields(prompts: Column, completions: Column, columns: Mapping[str, Any], reference_column: str) -> list[Fields]:
    references = column(columns, reference_column, "the data set")
    return list(zip(prompts, references, completions, strict=True))


def _rewards(rows: Sequence[Scored], columns: Mapping[str, Any]) -> list[float]:
    log_extra, log_metric = columns.get("log_extra"), columns.get("log_metric")
    reports = [report(row) for row in rows]
    for name in reports[0] if reports else ():
        counts = [each[name] for each in reports]
        if log_extra is not None:
            log_extra(f"polar_{name}", counts)
        if log_metric is not None:
            log_metric(f"polar/{name}", fmean(counts))
    return [reward(row) for row in rows]
