"""From files of pairs, or of triples with labels, to one sample of outputs and of pairs among them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polar_ray.columns import holds_message_json, parse_field
from polar_ray.config import EvaluateColumnsConfig, EvaluateConfig, Layout
from polar_ray.corpus.inputs import list_inputs
from polar_ray.errors import InputError, TripleError
from polar_ray.evaluation.files import InputColumns, check_columns, find_layout, read_file, wanted_columns
from polar_ray.triples import Text, Triple, Wrapper, is_sequence, parse_wrapper

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

MOST_PAIRS = 20_000_000
"""Pairs within groups are held in memory, some hundred bytes each."""

MOST_VALUES = 64
"""Of a column in `by`; with more the table is no table, and most values have too few pairs to say anything."""

NO_VALUE = "(none)"
"""In place of a null in a column of `by`."""


@dataclass(frozen=True)
class Sample:
    """What is scored and what is compared. Arrays over outputs have one entry for each of `rows`, in order."""

    layout: Layout
    inputs: tuple[str, ...]
    input_rows: int
    unlabelled_rows: int
    rows: list[Triple | TripleError]
    file_of: Ints
    """Place in `inputs`, of each output."""

    row_of: Ints
    """Row of that file."""

    place_of: Ints
    """Of pairs: place among the row's chosen, or among its rejected outputs."""

    shared_of: Ints
    """Equal for outputs to one prompt and reference, which the Scorer should get together."""

    group_of: Ints
    """Equal for outputs that are not independent: of one prompt, or of one group."""

    labels: Floats
    """Of triples; NaN for a row that is none. Empty for pairs."""

    values: dict[str, list[str]]
    """Column of `by` to its value at each output."""

    better: Ints
    """Of each pair, the place of the better output in `rows`."""

    worse: Ints

    @property
    def has_two_labels(self) -> bool:
        """Whether labels only tell good from bad."""
        return len(self.known_labels) == 2

    @property
    def known_labels(self) -> Floats:
        """Every different label, the lowest first."""
        return np.unique(self.labels[np.isfinite(self.labels)])


def read_sample(inputs: Sequence[str], config: EvaluateConfig) -> Sample:
    """The sample that `inputs` (files, folders, globs, URLs of Parquet or JSONL) hold.

    A row that cannot be scored is in it, as the error that says why. Raises `InputError` for what cannot be read or
    holds nothing to compare, and `SchemaError` for columns that do not fit, each naming the remedy.
    """
    columns = config.columns
    files = [read_file(file, wanted_columns(columns, config.by)) for file in list_inputs(inputs)]
    files = [file for file in files if file.n_rows]
    if not files:
        raise InputError(f"{inputs[0]}: no rows; there is nothing to evaluate")
    layout = find_layout(files[0], config)
    for file in files:
        check_columns(file, layout, config)
    message_json = _message_json(files, layout, columns)
    reader = _Reader(layout, message_json, columns, config.by)
    for place, file in enumerate(files):
        reader.add(place, file)
    return reader.finish(tuple(file.url for file in files))


def _message_json(files: Sequence[InputColumns], layout: Layout, columns: EvaluateColumnsConfig) -> frozenset[str]:
    """The fields whose strings are JSON text of message lists, by the first rows of the first file."""
    fields = columns.fields if layout == "pairs" else columns.triple_fields
    if columns.message_json != "auto":
        return frozenset(fields if columns.message_json == "always" else ())
    found = set()
    for name, column in fields.items():
        values = [value for value in files[0].columns[column] if not isinstance(value, TripleError)]
        outputs = [output for value in values for output in (_several(value) if value is not None else [])]
        if holds_message_json(outputs if name in ("chosen", "rejected") else values):
            found.add(name)
    return frozenset(found)


def _several(value: Any) -> list[Any]:
    """The outputs in a value of a chosen or rejected column: what it lists, or itself. A list of messages is one."""
    if is_sequence(value) and not any(isinstance(item, Mapping) for item in value):
        return list(value)
    return [value]


class _Reader:
    """Takes in files row by row."""

    def __init__(
        self, layout: Layout, message_json: frozenset[str], columns: EvaluateColumnsConfig, by: Sequence[str]
    ) -> None:
        self._layout, self._message_json, self._columns, self._by = layout, message_json, columns, by
        self._rows: list[Triple | TripleError] = []
        self._places: list[tuple[int, int, int]] = []
        self._shared: dict[Any, int] = {}
        self._groups: dict[Any, int] = {}
        self._shared_of: list[int] = []
        self._group_of: list[int] = []
        self._labels: list[float] = []
        self._values: dict[str, list[str]] = {column: [] for column in by}
        self._pairs: list[tuple[int, int]] = []
        self._input_rows = self._unlabelled = 0

    def add(self, place: int, file: InputColumns) -> None:
        """The rows of a file."""
        absent = [None] * file.n_rows
        named = {**self._columns.fields, **self._columns.triple_fields, "wrapper": self._columns.wrapper}
        named |= {"label": self._columns.label, "group": self._columns.group}
        columns = {name: file.columns.get(column, absent) for name, column in named.items()}
        by = {column: file.columns.get(column, absent) for column in self._by}
        take = self._take_pair if self._layout == "pairs" else self._take_triple
        for row in range(file.n_rows):
            self._input_rows += 1
            found = {name: values[row] for name, values in columns.items()}
            error = file.broken.get(row) or _first_error(found)
            before = len(self._rows)
            take((place, row), found, error)
            for column, values in by.items():
                self._values[column] += [_worded(values[row])] * (len(self._rows) - before)

    def finish(self, inputs: tuple[str, ...]) -> Sample:
        """The sample of all files."""
        if self._layout == "triples":
            better, worse = _pairs_within(np.array(self._group_of, np.int64), np.array(self._labels))
        else:
            better, worse = np.array(self._pairs, np.int64).reshape(-1, 2).T
        places = np.array(self._places, np.int64).reshape(-1, 3)
        sample = Sample(
            layout=self._layout,
            inputs=inputs,
            input_rows=self._input_rows,
            unlabelled_rows=self._unlabelled,
            rows=self._rows,
            file_of=places[:, 0],
            row_of=places[:, 1],
            place_of=places[:, 2],
            shared_of=np.array(self._shared_of, np.int64),
            group_of=np.array(self._group_of, np.int64),
            labels=np.array(self._labels),
            values=self._values,
            better=better,
            worse=worse,
        )
        self._refuse_nothing(sample)
        return sample

    def _refuse_nothing(self, sample: Sample) -> None:
        for column, values in sample.values.items():
            if len(set(values)) > MOST_VALUES:
                raise InputError(
                    f"--by {column}: {len(set(values)):,} different values, more than {MOST_VALUES}; name a column "
                    "that sorts the rows into fewer kinds"
                )
        if sample.layout != "triples":
            return
        label = self._columns.label
        labels = sample.known_labels
        if not len(labels):
            raise InputError(f"column {label!r}: no row has a label; name another with --label-column")
        if len(labels) < 2:
            raise InputError(
                f"column {label!r}: every label is {labels[0]:g}, so no output is better than another; name "
                "another with --label-column"
            )
        if not len(sample.better) and not sample.has_two_labels:
            raise InputError(
                "no group has outputs with different labels, so there is nothing to compare; name the column that says "
                "which outputs belong together with --group-column"
            )

    def _take_pair(self, at: tuple[int, int], found: Mapping[str, Any], error: TripleError | None) -> None:
        outputs = {name: _several(found[name]) for name in ("chosen", "rejected")}
        triples: dict[str, list[Triple | TripleError]] = {}
        for name, values in outputs.items():
            triples[name] = [self._triple(found, name, value, error) for value in values]
            if not values:
                reason = TripleError(f"{name}: an empty list; there is nothing to compare", field=name)
                triples[name] = [error or reason]
        prompt, reference = _key(found["prompt"]), _key(found["reference"])
        group = ("", at) if error else found["group"] if found["group"] is not None else (prompt,)
        places = {
            name: [self._append(at, place, triple, (prompt, reference), group) for place, triple in enumerate(some)]
            for name, some in triples.items()
        }
        self._pairs += product(places["chosen"], places["rejected"])

    def _take_triple(self, at: tuple[int, int], found: Mapping[str, Any], error: TripleError | None) -> None:
        try:
            label = _parse_label(found["label"])
        except TripleError as wrong:
            label, error = None, error or wrong
        if label is None and not error:
            self._unlabelled += 1
            return
        triple = self._triple(found, "output", found["output"], error)
        shared = (_key(found["prompt"]), _key(found["reference"]))
        group = found["group"] if found["group"] is not None else shared
        self._append(at, 0, triple, shared, ("", at) if label is None else group)
        self._labels.append(math.nan if label is None else label)

    def _append(self, at: tuple[int, int], place: int, triple: Triple | TripleError, shared: Any, group: Any) -> int:
        self._rows.append(triple)
        self._places.append((*at, place))
        self._shared_of.append(self._shared.setdefault(shared, len(self._shared)))
        self._group_of.append(self._groups.setdefault(_key(group), len(self._groups)))
        return len(self._rows) - 1

    def _triple(
        self, found: Mapping[str, Any], name: str, output: Any, error: TripleError | None
    ) -> Triple | TripleError:
        if error is not None:
            return error
        try:
            prompt, reference = (self._text(found[part], part) for part in ("prompt", "reference"))
            wrapper: Wrapper = parse_wrapper(found["wrapper"])
            return Triple(prompt, reference, self._text(output, name), wrapper=wrapper)
        except TripleError as wrong:
            return wrong

    def _text(self, value: Any, name: str) -> Text:
        return parse_field(value, name, name in self._message_json)


def _first_error(found: Mapping[str, Any]) -> TripleError | None:
    return next((value for value in found.values() if isinstance(value, TripleError)), None)


def _parse_label(value: Any) -> float | None:
    """A label as a number; None for null and NaN, which pandas writes for null."""
    if value is None:
        return None
    try:
        number = float(value) if not isinstance(value, str) else None
    except (TypeError, ValueError):
        number = None
    if number is None or math.isinf(number):
        raise TripleError(
            f"label: expected a boolean or a number, found {type(value).__name__} {str(value)[:20]!r}", field="label"
        )
    return None if math.isnan(number) else number


def _key(value: Any) -> Any:
    """Something that can be looked up: equal for equal values."""
    return value if isinstance(value, (str, int, float, bool, tuple)) or value is None else repr(value)


def _worded(value: Any) -> str:
    """A value of a column of `by`, as it is shown."""
    if value is None or isinstance(value, TripleError):
        return NO_VALUE
    if isinstance(value, str):
        return value or '""'
    return json.dumps(value, ensure_ascii=False, default=str)


def _pairs_within(groups: Ints, labels: Floats) -> tuple[Ints, Ints]:
    """Every (better, worse) within a group whose labels differ."""
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    members = np.split(order, starts[1:])
    most = sum(len(some) * (len(some) - 1) // 2 for some in members)
    if most > MOST_PAIRS:
        raise InputError(
            f"up to {most:,} pairs within groups, more than {MOST_PAIRS:,}; name the column that says which outputs "
            "belong together with --group-column, or evaluate a part"
        )
    found = [np.nonzero(labels[some][:, None] > labels[some][None, :]) for some in members]
    better = [some[high] for some, (high, _) in zip(members, found, strict=True)]
    worse = [some[low] for some, (_, low) in zip(members, found, strict=True)]
    empty = np.zeros(0, np.int64)
    return np.concatenate([empty, *better]), np.concatenate([empty, *worse])


def chunks(sample: Sample, rows: int) -> Iterator[Ints]:
    """The outputs' places in parts of about `rows`, those of one prompt and reference never apart."""
    order = np.argsort(sample.shared_of, kind="stable")
    shared = sample.shared_of[order]
    ends = np.append(np.flatnonzero(np.diff(shared)) + 1, len(order))
    start = 0
    for end in ends.tolist():
        if end - start >= rows or end == len(order):
            if end > start:
                yield order[start:end]
            start = end
