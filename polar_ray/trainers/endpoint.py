"""What all adapters share: settings, from a trainer's fields to a triple, from a row to a reward or its error."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

from polar_ray.client.aio import reward_of
from polar_ray.errors import ConfigError, SchemaError
from polar_ray.policy_text import strip_thinking
from polar_ray.trainers.coalesce import WAIT_S
from polar_ray.trainers.connection import Connection, connection
from polar_ray.triples import Scored, Triple, is_sequence
from polar_ray.wire import Priority

Fields = tuple[Any, Any, Any]
"""Prompt, reference and output as a trainer has them: strings, lists of messages, or arrays of these."""


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

    def score(self, rows: Iterable[Fields]) -> list[Scored]:
        """Rewards, waited for in this thread."""
        future = self._connection().ask(self._triples(rows))
        try:
            return _all_ok(future.result())
        finally:
            future.cancel()  # of use when the wait was interrupted, without effect after it

    async def ascore(self, rows: Iterable[Fields]) -> list[Scored]:
        """Rewards, for a caller in an event loop, whichever."""
        scored = await asyncio.wrap_future(self._connection().ask(self._triples(rows)))
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

    def _triples(self, rows: Iterable[Fields]) -> list[Triple]:
        return [self._triple(*row) for row in rows]

    def _triple(self, prompt: Any, reference: Any, output: Any) -> Triple:
        """Raises `TripleError` for a field that is no text, so that a bad row fails its own caller alone."""
        texts = {"prompt": _plain(prompt), "reference": _plain(reference), "output": _plain(output)}
        if not self.keep_thinking:
            texts["output"] = _without_thinking(texts["output"])
        return Triple.from_dict(texts)


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


def _without_thinking(output: Any) -> Any:
    """An output, or each message of one that is a conversation, without its thinking."""
    if isinstance(output, str):
        return strip_thinking(output)
    if is_sequence(output):
        return [
            {**message, "content": strip_thinking(message["content"])}
            if isinstance(message, Mapping) and isinstance(message.get("content"), str)
            else message
            for message in output
        ]
    return output
