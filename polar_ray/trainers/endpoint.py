"""What all adapters share: settings, from a trainer's fields to a triple, from a row to a reward or its error."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

from polar_ray.client.aio import reward_of
from polar_ray.errors import ConfigError, SchemaError
from polar_ray.policy_text import triple_of
from polar_ray.trainers.coalesce import WAIT_S
from polar_ray.trainers.connection import Connection, connection
from polar_ray.triples import Scored, Triple
from polar_ray.wire import Priority

Fields = tuple[Any, Any, Any]
"""Prompt, reference and output as a trainer has them: strings, lists of messages, or arrays of these. A string prompt
may be in a chat template, an output may have end tokens and a think block."""

REMEDY = "fill it in for every row of the data set, or drop the rows that have none"

_CREDENTIALS = re.compile(r"^(\w+://)?.*@", re.DOTALL)


@dataclass(frozen=True)
class Endpoint:
    """Where an adapter asks, and how. None takes POLAR_RAY_ADDRESS and POLAR_RAY_TOKEN.

    Every call gives one `Scored` per row, in order, and all of them have a reward: a row that cannot be scored raises
    its typed error, as does a call that fails as a whole. Rows of calls that are in the air together travel together.
    """

    address: str | None = None
    token: str | None = field(default=None, repr=False)
    deadline_s: float = 300.0
    """Longest wait for rewards, retries included."""

    priority: Priority = "interactive"
    expect_receipt: str | None = None
    """Raise `ReceiptMismatch` unless rewards are made as this `receipt_id` says: pin it, and nobody can change the
    reward model under a run."""

    verify: bool | str = True
    """TLS: whether to check certificates, or a CA's file to check them by."""

    keep_thinking: bool = False
    """Score outputs with their `<think>` block."""

    coalesce_s: float = WAIT_S
    """How long a call waits for others to travel with. More makes larger groups of rollouts that end one by one."""

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Self:
        """An endpoint from keyword settings. Raises `ConfigError` for one that is unknown."""
        known = [one.name for one in fields(cls)]
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise ConfigError(f"unknown setting {unknown[0]!r}; known here: {', '.join(known)}")
        return cls(**settings)

    def __repr__(self) -> str:
        """As a dataclass has it, without the token, wherever it stands."""
        address = self.address and _CREDENTIALS.sub(r"\1", self.address)
        settings = {one.name: getattr(self, one.name) for one in fields(self) if one.repr} | {"address": address}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in settings.items())})"

    def score(self, rows: Iterable[Fields], remedy: str = REMEDY) -> list[Scored]:
        """Rewards, waited for in this thread. `remedy` is what to do about a row that has no reference."""
        future = self._connection().ask(self._triples(rows, remedy))
        try:
            return _all_ok(future.result())
        finally:
            future.cancel()  # of use when the wait was interrupted, without effect after it

    async def ascore(self, rows: Iterable[Fields], remedy: str = REMEDY) -> list[Scored]:
        """Rewards, for a caller in an event loop, whichever."""
        scored = await asyncio.wrap_future(self._connection().ask(self._triples(rows, remedy)))
        return _all_ok(scored)

    def _connection(self) -> Connection:
        return connection(
            self.address,
            self.token,
            deadline_s=self.deadline_s,
            priority=self.priority,
            expect_receipt=self.expect_receipt,
            verify=self.verify,
            coalesce_s=self.coalesce_s,
        )

    def _triples(self, rows: Iterable[Fields], remedy: str) -> list[Triple]:
        """Raises `TripleError` for a row that is none before it is sent, so that it fails its own caller alone."""
        return [
            triple_of(*(_plain(field) for field in row), remedy=remedy, keep_thinking=self.keep_thinking)
            for row in rows
        ]


def reward(row: Scored) -> float:
    """The reward of a row that is known to have one."""
    return reward_of(0, row)


def report(row: Scored) -> dict[str, float]:
    """What trainers may log of a row beside its reward."""
    return {"tokens": row.tokens, "cut_tokens": row.cut_tokens, "removed_control_tokens": row.removed_control_tokens}


def column(columns: Mapping[str, Any], name: str, where: str) -> Any:
    """`columns[name]`. Raises `SchemaError` that names it and says `where` it was looked for."""
    if name not in columns or columns[name] is None:
        raise SchemaError(
            f"{where} has no {name!r}, which POLAR needs; add it to the data set, or name the field that holds it",
            column=name,
        )
    return columns[name]


def _all_ok(rows: Sequence[Scored]) -> list[Scored]:
    for place, row in enumerate(rows):
        reward_of(place, row)
    return list(rows)


def _plain(value: Any) -> Any:
    """Arrays, as data sets read from Parquet have them, as lists."""
    return value.tolist() if hasattr(value, "tolist") else value
