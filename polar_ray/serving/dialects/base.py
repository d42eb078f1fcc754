"""What a dialect is: two pure functions between somebody's JSON and our rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from polar_ray.triples import Row, Scored

Json = Any
"""A parsed JSON value."""


@dataclass(frozen=True)
class Answer:
    """What became of a call's rows. `rewards` are all there: a call with a failed row is answered with its error."""

    scored: Sequence[Scored]
    model: str
    receipt_id: str
    tokens: int
    computed_tokens: int
    seconds: float
    """From the request's arrival to its rewards."""

    @property
    def rewards(self) -> list[float]:
        return [row.reward for row in self.scored if row.reward is not None]


@dataclass(frozen=True)
class Dialect:
    """One trainer's or engine's way to ask for rewards. Translates, and nothing else."""

    name: str
    """Label in metrics and documentation."""

    paths: tuple[str, ...]
    """Where it is served, POST only."""

    summary: str
    """One line for the OpenAPI page."""

    read: Callable[[dict[str, Json], Mapping[str, str]], list[Row]]
    """Body (a JSON object) and query parameters to rows, in order. Raises `RequestInvalid` with a sentence that says
    what to send; a fault of one row may stand in its place as a `TripleError`."""

    write: Callable[[dict[str, Json], Answer], Json]
    """Body and answer to what the caller parses."""

    example: dict[str, Json] = field(default_factory=dict)
    """A real request body, for the OpenAPI page and for tests."""

    parameters: Mapping[str, dict[str, Json]] = field(default_factory=dict)
    """Query parameters of its own beside a call's options, each with its JSON schema."""
