"""Reading somebody's JSON: the checks that dialects share, each with a sentence that says what to send."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from polar_ray.errors import RequestInvalid, TripleError
from polar_ray.policy_text import triple_of
from polar_ray.triples import Rendered, Row, TokenIds

Json = Any
Query = Mapping[str, str]

THINKING: dict[str, Json] = {
    "think": {
        "enum": ["strip", "keep"],
        "default": "strip",
        "type": "string",
        "description": "Whether an output is scored without its think block, or with it.",
    }
}
"""The query parameter of dialects whose outputs are what a policy wrote, with its JSON schema."""


def need(body: Mapping[str, Json], name: str, remedy: str) -> Json:
    """`body[name]`. Raises `RequestInvalid` with the remedy where it is absent or null."""
    if body.get(name) is None:
        raise RequestInvalid(f"{name} is missing; {remedy}")
    return body[name]


def strings(value: Json, name: str) -> list[str]:
    """A list of strings, or one string as a list of one. Raises `RequestInvalid`."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return value
    raise RequestInvalid(f"{name}: expected a string or a list of strings")


def is_ids(value: Json) -> bool:
    """Whether this is one sequence of token ids."""
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def rendered_rows(value: Json, name: str) -> list[Row]:
    """Rows of the forms in which engines take them: a text, texts, one sequence of ids, sequences of ids."""
    if is_ids(value):
        return [TokenIds(value)]
    if isinstance(value, list) and value and all(is_ids(item) for item in value):
        return [TokenIds(item) for item in value]
    if isinstance(value, list) and not value:
        return []
    try:
        return [Rendered(text) for text in strings(value, name)]
    except RequestInvalid:
        raise RequestInvalid(f"{name}: expected a text, a list of texts, token ids, or a list of token ids") from None


def triple_row(prompt: Json, reference: Json, output: Json, query: Query, remedy: str) -> Row:
    """A trainer's sample as `triple_of` reads it, with its think block if the query says `think=keep`.

    An error stands in its place where a field cannot be scored. Raises `RequestInvalid` for another `think`.
    """
    keeps_thinking = _keeps_thinking(query)
    try:
        return triple_of(prompt, reference, output, remedy=remedy, keep_thinking=keeps_thinking)
    except TripleError as error:
        return error


def _keeps_thinking(query: Query) -> bool:
    schema = THINKING["think"]
    asked = query.get("think", schema["default"])
    if asked not in schema["enum"]:
        raise RequestInvalid(f"think: expected one of {schema['enum']}; left out, think blocks are not scored")
    return bool(asked == "keep")


def first_of(body: Mapping[str, Json], names: Sequence[str], what: str, where: str) -> Json:
    """The first of `names` that `body` has. Raises `RequestInvalid` that names them all."""
    for name in names:
        if body.get(name) is not None:
            return body[name]
    raise RequestInvalid(f"{where} has no {what}, which POLAR needs; send it as {' or '.join(names)}")


def check_can_be_echoed(value: Json, name: str) -> None:
    """Raise `RequestInvalid` for what JSON lets in and not out: lone surrogates, NaN, numbers beyond a float."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        raise RequestInvalid(
            f"{name} is sent back and holds what JSON cannot: a lone surrogate, or a number that is not finite"
        ) from None


def sigmoid(reward: float) -> float:
    """Without overflow on either side."""
    if reward >= 0:
        return 1 / (1 + math.exp(-reward))
    return math.exp(reward) / (1 + math.exp(reward))
