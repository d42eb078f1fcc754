"""A long list of triples in requests of a bearable size, groups whole where they fit. Pure."""

from __future__ import annotations

import json
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from polar_ray.errors import TripleError
from polar_ray.triples import TEXT_FIELDS, TokenIds, Triple, join_text, parse_wrapper
from polar_ray.wire import text_to_json, triple_to_json


@dataclass(frozen=True, slots=True)
class Part:
    """One request: the rows it holds, by their place in the caller's list, and its body without the options."""

    places: list[int]
    body: dict[str, Any]

    def halves(self) -> tuple[Part, Part]:
        """The request in two, for an endpoint that finds it too large. Needs two rows."""
        (form,) = {"triples", "outputs", "ids"} & self.body.keys()
        middle, rows = len(self.places) // 2, self.body[form]
        return (
            Part(self.places[:middle], {**self.body, form: rows[:middle]}),
            Part(self.places[middle:], {**self.body, form: rows[middle:]}),
        )


def split_triples(triples: Sequence[Triple], rows_per_request: int) -> Iterator[Part]:
    """Requests that hold every triple once.

    Triples with one prompt, reference and wrapper travel together, whichever others stood between them; a group is
    torn only where it is larger than a request. A request that is one group sends its prompt and reference once.
    """
    groups: dict[str, list[int]] = {}
    for place, triple in enumerate(triples):
        groups.setdefault(_group_key(triple), []).append(place)
    taken: list[int] = []
    for places in groups.values():
        for start in range(0, len(places), rows_per_request):
            piece = places[start : start + rows_per_request]
            if taken and len(taken) + len(piece) > rows_per_request:
                yield _part(triples, taken)
                taken = []
            taken = taken + piece
    if taken:
        yield _part(triples, taken)


TOKENS_PER_REQUEST = 32768
"""Of encoded sequences: some engine calls' worth, so that several requests are under way whatever the rows' length."""


def split_ids(sequences: Sequence[TokenIds], rows_per_request: int) -> Iterator[Part]:
    """Requests that hold every sequence once, in order; by rows and by tokens."""
    places: list[int] = []
    tokens = 0
    for place, sequence in enumerate(sequences):
        if places and (len(places) == rows_per_request or tokens + len(sequence.ids) > TOKENS_PER_REQUEST):
            yield _ids_part(sequences, places)
            places, tokens = [], 0
        places = [*places, place]
        tokens += len(sequence.ids)
    if places:
        yield _ids_part(sequences, places)


def _ids_part(sequences: Sequence[TokenIds], places: list[int]) -> Part:
    return Part(places, {"ids": [list(sequences[place].ids) for place in places]})


def _group_key(triple: Triple) -> str:
    return json.dumps([triple.wrapper, text_to_json(triple.prompt), text_to_json(triple.reference)])


def _part(triples: Sequence[Triple], places: list[int]) -> Part:
    rows = [triples[place] for place in places]
    first = rows[0]
    has_ids = any(row.id is not None for row in rows)
    if len(rows) > 1 and not has_ids and len({_group_key(row) for row in rows}) == 1:
        return Part(places, _group_to_json(first, rows))
    return Part(places, {"triples": [triple_to_json(row) for row in rows]})


def _group_to_json(first: Triple, rows: Sequence[Triple]) -> dict[str, Any]:
    """A request's group form."""
    body = triple_to_json(first)
    del body["output"]
    return {**body, "outputs": [text_to_json(row.output) for row in rows]}


def fault_of(triple: Triple) -> TripleError | None:
    """Why a triple cannot be sent at all: a field of another type, or text that no UTF-8 can hold."""
    try:
        for field in TEXT_FIELDS:
            join_text(getattr(triple, field), field)
        parse_wrapper(triple.wrapper)
        for where, label in _labels(triple):
            join_text(label, where)
    except TripleError as error:
        return error
    return None


def _labels(triple: Triple) -> Iterator[tuple[str, str]]:
    """What travels with the texts and is not read: the id and the roles, as they are sent."""
    if triple.id is not None:
        yield "id", str(triple.id)
    for field in TEXT_FIELDS:
        text = text_to_json(getattr(triple, field))
        if not isinstance(text, str):
            yield from ((f"{field}[{place}].role", message["role"]) for place, message in enumerate(text))


def sendable_ids(sequence: TokenIds) -> TokenIds | TripleError:
    """The ids as Python's own numbers, or why they cannot be sent at all: one is no whole number, of any library."""
    try:
        return TokenIds(list(map(operator.index, sequence.ids)))
    except TypeError as error:
        return TripleError(f"ids: expected whole numbers ({error})", field="ids")
