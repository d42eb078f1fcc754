"""The columns a job reads and the columns it writes: Arrow in, triples out; outcomes in, Arrow out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from polar_ray.config import ColumnsConfig
from polar_ray.errors import RowUnreadable, SchemaError, TripleError
from polar_ray.triples import PAIR_FIELDS, TEXT_FIELDS, PreferencePair, Scored, Text, Triple, parse_text, parse_wrapper

T = TypeVar("T")
U = TypeVar("U")
V = TypeVar("V")

REWARD_TYPES = (pa.float32(), pa.string(), pa.string(), pa.int32(), pa.int32())
"""Types of reward, status, detail, tokens and cut tokens. Written out, never inferred: a file without failures must
have the same schema as one with them."""

DETECTION_ROWS = 64
"""Rows of a column that decide whether its strings are JSON text of message lists."""


class FieldColumns(Protocol):
    """Which columns hold the fields of a row, of a triple or of a pair."""

    @property
    def fields(self) -> Mapping[str, str]: ...

    @property
    def wrapper(self) -> str: ...

    @property
    def message_json(self) -> Literal["auto", "always", "never"]: ...


def check_schema(schema: pa.Schema, columns: FieldColumns, source: str, *, any_type: bool = False) -> None:
    """Raise `SchemaError` unless `schema` has the columns of all fields, of types that can hold text.

    `any_type` is for formats whose values have types of their own, row by row.
    """
    for field, column in {**columns.fields, "wrapper": columns.wrapper}.items():
        if schema.names.count(column) > 1:
            raise SchemaError(
                f"{source}: {schema.names.count(column)} columns are called {column!r}; the {field} needs one with a "
                f"name of its own",
                column=column,
            )
    for field, column in columns.fields.items():
        require_column(schema.names, column, field, source)
        kind = schema.field(column).type
        if not any_type and not holds_text(kind):
            raise SchemaError(
                f"{source}: column {column!r} is {kind}; the {field} must be strings or lists of messages",
                column=column,
            )


def require_column(names: Sequence[str], column: str, field: str, source: str) -> None:
    """Raise `SchemaError`, with the option that names another, unless `column` is among a source's `names`."""
    if column not in names:
        raise SchemaError(
            f"{source}: no column {column!r} for the {field}; it has {', '.join(names) or 'none'}. "
            f"Name the right one with --{field}-column",
            column=column,
        )


def check_room(schema: pa.Schema, columns: ColumnsConfig, source: str) -> None:
    """Raise `SchemaError` if `schema` already has a column that a job would write."""
    clash = sorted(set(columns.written) & set(schema.names))
    if clash:
        raise SchemaError(
            f"{source}: has a column {clash[0]!r} already; choose other names with --set columns.reward=NAME",
            column=clash[0],
        )


def detect_message_json(table: pa.Table, columns: FieldColumns) -> frozenset[str]:
    """The fields whose strings are JSON text of message lists, by the first rows of `table`."""
    if columns.message_json != "auto":
        return frozenset(columns.fields if columns.message_json == "always" else ())
    found = set()
    for field, column in columns.fields.items():
        values = [value for value in read_column(table, column, table.num_rows) if not isinstance(value, TripleError)]
        if holds_message_json(values):
            found.add(field)
    return frozenset(found)


def holds_message_json(values: Sequence[Any]) -> bool:
    """Whether the strings of a column are JSON text of message lists, by the first of its `values`."""
    texts = [value for value in values[:DETECTION_ROWS] if value is not None]
    messages = [_as_messages(value) if isinstance(value, str) else None for value in texts]
    return any(messages) and None not in messages  # an empty list says nothing about the column


def read_triples(table: pa.Table, columns: ColumnsConfig, message_json: frozenset[str]) -> list[Triple | TripleError]:
    """A triple for each row of `table`, or the error that says why there is none."""
    return parse_rows(read_fields(table, columns), message_json)


def read_fields(table: pa.Table, columns: FieldColumns) -> list[dict[str, Any]]:
    """Each row's fields and wrapper, by the names of the fields; an error in place of a value that is not text."""
    named = {**columns.fields, "wrapper": columns.wrapper}
    values = {field: read_column(table, column, table.num_rows) for field, column in named.items()}
    return [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]


def parse_rows(
    rows: Sequence[dict[str, Any] | TripleError], message_json: frozenset[str]
) -> list[Triple | TripleError]:
    """A triple for each mapping with the fields of a triple; errors that stand for a row, or for a value, stay."""
    return [_attempt(_parse_row, row, message_json) for row in rows]


def parse_pairs(
    rows: Sequence[dict[str, Any] | TripleError], message_json: frozenset[str]
) -> list[PreferencePair | TripleError]:
    """As `parse_rows`, for mappings with the fields of a pair."""
    return [_attempt(_parse_pair, row, message_json) for row in rows]


def reward_columns(scored: Sequence[Scored], columns: ColumnsConfig) -> list[tuple[str, pa.Array]]:
    """The five columns that a job appends, in order."""
    values = (
        [row.reward for row in scored],
        [row.status for row in scored],
        [row.detail for row in scored],
        [row.tokens for row in scored],
        [row.cut_tokens for row in scored],
    )
    return [
        (name, pa.array(column, kind)) for name, column, kind in zip(columns.written, values, REWARD_TYPES, strict=True)
    ]


def read_column(table: pa.Table, column: str, rows: int) -> list[Any]:
    """The column's values as Python objects, an error in place of each that is not text; nulls if it is absent."""
    if column not in table.column_names:
        return [None] * rows
    values = table.column(column)
    if isinstance(values.type, pa.BaseExtensionType):
        values = values.cast(values.type.storage_type)
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if _is_string(values.type) or _is_binary(values.type):
        return _decode_strings(values, column)
    try:
        return list(values.to_pylist())
    except (ValueError, OverflowError):
        return [_attempt(_decode_nested, value, column) for value in values]


def _decode_strings(values: pa.ChunkedArray, column: str) -> list[Any]:
    if _is_string(values.type):
        try:
            return list(values.to_pylist())
        except UnicodeDecodeError:
            large = pa.types.is_large_string(values.type)
            values = pc.cast(values, pa.large_binary() if large else pa.binary())
    return [_attempt(_decode, raw, column) for raw in values.to_pylist()]


def _decode(raw: bytes | None, column: str) -> str | None:
    if raw is None:
        return None
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise RowUnreadable(
            f"{column}: byte {error.start} is not UTF-8 ({error.reason}); repair the text", field=column
        ) from None


def _decode_nested(value: pa.Scalar, column: str) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        raise RowUnreadable(f"{column}: a message is not UTF-8 ({error.reason}); repair it", field=column) from None
    except (ValueError, OverflowError) as error:  # a date or duration that Python has no object for
        raise RowUnreadable(f"{column}: a message cannot be read ({error}); repair it", field=column) from None


def _parse_row(row: dict[str, Any] | TripleError, message_json: frozenset[str]) -> Triple:
    return Triple(**_parse_fields(row, TEXT_FIELDS, message_json))


def _parse_pair(row: dict[str, Any] | TripleError, message_json: frozenset[str]) -> PreferencePair:
    return PreferencePair(**_parse_fields(row, PAIR_FIELDS, message_json))


def _parse_fields(
    row: dict[str, Any] | TripleError, fields: Sequence[str], message_json: frozenset[str]
) -> dict[str, Any]:
    if isinstance(row, TripleError):
        raise row
    for value in row.values():
        if isinstance(value, TripleError):
            raise value
    texts = {field: parse_field(row.get(field), field, field in message_json) for field in fields}
    return {**texts, "wrapper": parse_wrapper(row.get("wrapper"))}


def parse_field(value: Any, field: str, is_json: bool) -> Text:
    """`value` as a field of a triple or a pair; `is_json` says that strings are JSON text of message lists.

    Raises `TripleError` for anything else.
    """
    if not is_json or not isinstance(value, str):
        return parse_text(value, field)
    messages = _as_messages(value)
    if messages is None:
        raise TripleError(
            f"{field}: the column holds JSON lists of messages, but this row's text is not one", field=field
        )
    return parse_text(messages, field)


def _as_messages(text: str) -> list[dict[str, Any]] | None:
    """The list of objects with a role or content that `text` spells in JSON, if it does; whether they are whole
    messages is for `parse_text` to say."""
    if not text.lstrip().startswith("["):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # a model that repeats itself writes thousands of brackets
        return None
    is_list = isinstance(value, list) and all(
        isinstance(message, dict) and message.keys() & {"role", "content"} for message in value
    )
    return value if is_list else None


def _attempt(parse: Callable[[T, U], V], value: T, hint: U) -> V | TripleError:
    """What `parse` makes of the value, or the error it raises about it."""
    try:
        return parse(value, hint)
    except TripleError as error:
        return error


def _is_string(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def holds_text(kind: pa.DataType) -> bool:
    """Whether values of this type can be a field: text, bytes of text, messages; an all-null column is of type null."""
    if isinstance(kind, pa.BaseExtensionType):
        return holds_text(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return holds_text(kind.value_type)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        item = kind.value_type
        return bool(pa.types.is_struct(item) and item.get_field_index("content") >= 0)
    return _is_string(kind) or _is_binary(kind) or bool(pa.types.is_null(kind))
