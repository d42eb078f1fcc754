"""The columns of a file of pairs, or of triples with labels: read, told apart, and checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from polar_ray.columns import holds_text, read_column, require_column
from polar_ray.config import EvaluateColumnsConfig, EvaluateConfig, Layout
from polar_ray.corpus import jsonl
from polar_ray.corpus.inputs import InputFile
from polar_ray.corpus.storage import Location
from polar_ray.errors import InputError, SchemaError, TripleError


@dataclass(frozen=True)
class InputColumns:
    """The wanted columns of one file."""

    url: str
    n_rows: int
    names: list[str]
    """Of all its columns."""

    columns: dict[str, list[Any]]
    kinds: Mapping[str, pa.DataType]
    """Of the wanted columns, where a format has types."""

    broken: dict[int, TripleError] = field(default_factory=dict)
    """Rows that are none."""


def wanted_columns(columns: EvaluateColumnsConfig, by: Sequence[str]) -> list[str]:
    """Every column that may be of use, each once."""
    return list(dict.fromkeys([*columns.columns, *by]))


def read_file(file: InputFile, wanted: Sequence[str]) -> InputColumns:
    """The `wanted` columns of a file, those that it has. Raises `InputError` or `SchemaError`."""
    location = Location(file.url)
    try:
        return _read_jsonl(location, wanted) if file.format == "jsonl" else _read_parquet(location, wanted)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{file.url}: cannot be read ({error})") from None


def _read_parquet(location: Location, wanted: Sequence[str]) -> InputColumns:
    with location.filesystem.open_input_file(location.path) as stream:
        parquet = pq.ParquetFile(stream)
        schema = parquet.schema_arrow
        twice = [name for name in wanted if schema.names.count(name) > 1]
        if twice:
            raise SchemaError(f"{location.url}: several columns are called {twice[0]!r}; rename all but one")
        present = [name for name in wanted if name in schema.names]
        rows = parquet.metadata.num_rows
        table = parquet.read(columns=present)
    columns = {name: read_column(table, name, rows) for name in present}
    kinds = {name: schema.field(name).type for name in present}
    return InputColumns(location.url, rows, list(schema.names), columns, kinds)


def _read_jsonl(location: Location, wanted: Sequence[str]) -> InputColumns:
    lines = [line for line in location.read_bytes().split(b"\n") if line.strip()]
    parsed = [jsonl.parse_line(line) for line in lines]
    broken = {place: row for place, row in enumerate(parsed) if isinstance(row, TripleError)}
    rows = [{} if isinstance(row, TripleError) else row for row in parsed]
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: [row.get(name) for row in rows] for name in wanted if name in names}
    return InputColumns(location.url, len(rows), names, columns, {}, broken)


def find_layout(file: InputColumns, config: EvaluateConfig) -> Layout:
    """As `config` forces it, else by the columns that are there. Raises `SchemaError` where they do not decide."""
    if config.layout != "auto":
        return config.layout
    columns, names = config.columns, file.names
    is_pairs = columns.chosen in names and columns.rejected in names
    is_triples = columns.output in names and columns.label in names
    if is_pairs and is_triples:
        raise SchemaError(f"{file.url}: has the columns of pairs and those of triples; choose with --layout")
    if is_pairs or is_triples:
        return "pairs" if is_pairs else "triples"
    if columns.output in names:
        raise SchemaError(
            f"{file.url}: outputs, but no column {columns.label!r} that says how good they are; it has "
            f"{_listed(names)}. Name one of booleans or numbers with --label-column",
            column=columns.label,
        )
    raise SchemaError(
        f"{file.url}: neither pairs (columns {columns.chosen!r} and {columns.rejected!r}) nor triples with labels "
        f"({columns.output!r} and {columns.label!r}); it has {_listed(names)}. Name the right ones with "
        "--chosen-column and --rejected-column, or with --output-column and --label-column",
    )


def check_columns(file: InputColumns, layout: Layout, config: EvaluateConfig) -> None:
    """Raise `SchemaError` unless the file has what `layout` and `config` need, of types that can hold it."""
    columns = config.columns
    if columns.reference not in file.names:
        raise SchemaError(
            f"{file.url}: no column {columns.reference!r}, and without a reference POLAR has nothing to compare an "
            f"output with. It has {_listed(file.names)}. Name the column of reference answers, as in "
            "--reference-column ground_truth, or add one",
            column=columns.reference,
        )
    fields = columns.fields if layout == "pairs" else {**columns.triple_fields, "label": columns.label}
    for name, column in fields.items():
        require_column(file.names, column, name, file.url)
        if column in file.kinds:
            _check_type(file.url, name, column, file.kinds[column])
    for column in config.by:
        if column not in file.names:
            raise SchemaError(
                f"{file.url}: no column {column!r} to tell apart by; it has {_listed(file.names)}. "
                "Name one of these with --by",
                column=column,
            )
    default = EvaluateColumnsConfig.model_fields["group"].default
    if columns.group != default and columns.group not in file.names:
        raise SchemaError(
            f"{file.url}: no column {columns.group!r} for the group; it has {_listed(file.names)}. Name the right one "
            "with --group-column, or none",
            column=columns.group,
        )


def _check_type(url: str, name: str, column: str, kind: pa.DataType) -> None:
    if name == "label":
        if not _holds_numbers(kind):
            raise SchemaError(
                f"{url}: column {column!r} is {kind}; the label must be booleans, or numbers of which the higher is "
                "the better",
                column=column,
            )
        return
    several = name in ("chosen", "rejected") and _is_list(kind) and holds_text(kind.value_type)
    if not several and not holds_text(kind):
        raise SchemaError(
            f"{url}: column {column!r} is {kind}; the {name} must be strings or lists of messages"
            + (", or lists of these" if name in ("chosen", "rejected") else ""),
            column=column,
        )


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _holds_numbers(kind: pa.DataType) -> bool:
    tests = (pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_null)
    return any(test(kind) for test in tests)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"
