"""Reading somebody's JSON: the checks that dialects share, each with a sentence that says what to send."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from polar_ray.errors import RequestInvalid, TripleError
from polar_ray.policy_text import strip_special_end, strip_thinking
from polar_ray.triples import Rendered, Row, Text, TokenIds, Triple, join_text, parse_text

Json = Any
Query = Mapping[str, str]


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


def triple_row(prompt: Json, reference: Json, output: Json, query: Query) -> Row:
    """A row of what a policy wrote: without end tokens, and without its think block unless the query says `think=keep`.

    An error stands in its place where a field is neither a string nor messages.
    """
    try:
        texts: list[Text] = [
            parse_text(value, field)
            for value, field in ((prompt, "prompt"), (reference, "reference"), (output, "output"))
        ]
        answer = strip_special_end(join_text(texts[2], "output"))
    except TripleError as error:
        return error
    return Triple(texts[0], texts[1], answer if query.get("think") == "keep" else strip_thinking(answer))


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
