"""What a job did: counts and small histograms per unit, and their sum.

A unit's report travels in its output file's schema metadata, so the sum over a finished folder needs no ledger and is
the same whether one run made it or ten.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from pydantic import BaseModel, Field

from polar_ray.errors import TripleError
from polar_ray.health import RewardHealth, Spread, examine, reward_bin
from polar_ray.scoring import Usage
from polar_ray.triples import Scored, Triple

Key = TypeVar("Key")

LENGTH_BINS_PER_OCTAVE = 4
"""Bins of the length histogram for each doubling of tokens."""


class UnitReport(BaseModel):
    """One unit's account, and through `combine` a whole job's."""

    rows: int = 0
    ok: int = 0
    by_status: dict[str, int] = Field(default_factory=dict)
    tokens: int = 0
    """Tokens of all rows that could be encoded."""

    computed_tokens: int = 0
    """Tokens that went through the model: shared prefixes and duplicates once."""

    duplicates: int = 0
    cut_rows: int = 0
    cut_tokens: int = 0
    control_token_rows: int = 0
    """Rows whose texts held control tokens, which were removed."""

    removed_control_tokens: int = 0

    seconds: float = 0.0
    """Time of actors on units, summed over actors; not the job's wall time."""

    engine_seconds: float = 0.0
    engine_calls: int = 0
    budget_tokens: int = 0
    """Computed tokens that the engine calls had room for."""

    flops: float = 0.0
    peak_flops: float = 0.0
    """As in `Usage`; both 0 where the peak is not known."""

    reward_sum: float = 0.0
    reward_square_sum: float = 0.0
    lowest_reward: float | None = None
    highest_reward: float | None = None
    reward_bins: dict[int, int] = Field(default_factory=dict)
    """Bin `b` holds rewards from `b * REWARD_BIN` to the next."""

    length_bins: dict[int, int] = Field(default_factory=dict)
    """Bin `b` holds rows of `2 ** (b / LENGTH_BINS_PER_OCTAVE)` tokens to the next."""

    spread: Spread = Field(default_factory=Spread)
    health: RewardHealth = Field(default_factory=RewardHealth)
    """Of units that a version without it scored: nothing."""

    finished: list[tuple[float, int, int, int]] = Field(default_factory=list)
    """(Unix time, rows, tokens, computed tokens) of each unit, by when it was finished."""

    @property
    def failed(self) -> int:
        return self.rows - self.ok

    @property
    def reward_mean(self) -> float | None:
        return self.reward_sum / self.ok if self.ok else None

    @property
    def reward_std(self) -> float | None:
        """Standard deviation over the rows that have a reward."""
        if not self.ok:
            return None
        return math.sqrt(max(0.0, self.reward_square_sum / self.ok - (self.reward_sum / self.ok) ** 2))


SUMS = tuple(name for name, field in UnitReport.model_fields.items() if field.annotation in (int, float))
"""Fields that add up as they are."""


def report_unit(
    triples: Sequence[Triple | TripleError], scored: Sequence[Scored], usage: Usage, seconds: float
) -> UnitReport:
    """The account of one unit; `usage` is the scorer's work on it."""
    rewards = [row.reward for row in scored if row.reward is not None]
    health, spread = examine(triples, scored)
    return UnitReport(
        rows=len(scored),
        ok=len(rewards),
        by_status=dict(Counter(row.status for row in scored)),
        tokens=sum(row.tokens for row in scored),
        computed_tokens=usage.computed_tokens,
        duplicates=usage.duplicates,
        cut_rows=sum(row.cut_tokens > 0 for row in scored),
        cut_tokens=sum(row.cut_tokens for row in scored),
        control_token_rows=sum(row.removed_control_tokens > 0 for row in scored),
        removed_control_tokens=sum(row.removed_control_tokens for row in scored),
        seconds=seconds,
        engine_seconds=usage.engine_seconds,
        engine_calls=usage.engine_calls,
        budget_tokens=usage.budget_tokens,
        flops=usage.flops,
        peak_flops=usage.peak_flops,
        reward_sum=math.fsum(rewards),
        reward_square_sum=math.fsum(reward * reward for reward in rewards),
        lowest_reward=min(rewards, default=None),
        highest_reward=max(rewards, default=None),
        reward_bins=dict(Counter(map(reward_bin, rewards))),
        length_bins=dict(Counter(length_bin(row.tokens) for row in scored if row.tokens)),
        spread=spread,
        health=health,
        finished=[(time.time(), len(scored), sum(row.tokens for row in scored), usage.computed_tokens)],
    )


def combine(reports: Iterable[UnitReport]) -> UnitReport:
    """The sum of reports; its `finished` is in order of time."""
    total = UnitReport()
    for report in reports:
        add_to(total, report)
    total.finished.sort()
    return total


def add_to(total: UnitReport, report: UnitReport) -> None:
    """Make `total` the sum of both; its `finished` is in the order of what was added."""
    for name in SUMS:
        setattr(total, name, getattr(total, name) + getattr(report, name))
    _add(total.by_status, report.by_status)
    _add(total.reward_bins, report.reward_bins)
    _add(total.length_bins, report.length_bins)
    _add(total.spread.bins, report.spread.bins)
    total.spread.groups += report.spread.groups
    total.spread.zero_groups += report.spread.zero_groups
    total.health += report.health
    total.finished += report.finished
    lowest = [value for value in (total.lowest_reward, report.lowest_reward) if value is not None]
    highest = [value for value in (total.highest_reward, report.highest_reward) if value is not None]
    total.lowest_reward = min(lowest, default=None)
    total.highest_reward = max(highest, default=None)


def length_bin(tokens: int) -> int:
    """The bin of `UnitReport.length_bins` that `tokens` (at least 1) falls into."""
    return math.floor(math.log2(tokens) * LENGTH_BINS_PER_OCTAVE)


def _add(mine: dict[Key, int], theirs: Mapping[Key, int]) -> None:
    for key, count in theirs.items():
        mine[key] = mine.get(key, 0) + count
