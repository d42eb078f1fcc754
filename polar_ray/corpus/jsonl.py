"""JSON Lines as input: one object per line, addressed by byte position, with one schema for the whole file.

A line that is not a JSON object is a row without a reward, not a failed job. Types are inferred over all lines at
once, because types inferred block by block disagree (null here, string there) and make an output nobody can read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from polar_ray.corpus.storage import Location
from polar_ray.errors import RowUnreadable, TripleError

LINE_COLUMN = "unreadable_line"
"""Output column with the raw text of lines that are not JSON objects; present only in files that have such lines."""

Row = dict[str, Any] | TripleError


@dataclass(frozen=True)
class Block:
    """Lines `start` to `stop`, between two byte positions of the file."""

    start: int
    stop: int
    offset: int
    end: int


@dataclass
class Scan:
    """A file's blocks, and the types that hold every value of it. A type of None: the values agree on none."""

    blocks: list[Block] = field(default_factory=list)
    types: dict[str, pa.DataType | None] = field(default_factory=dict)

    @property
    def schema(self) -> pa.Schema:
        """Columns in order of appearance; where the values agree on no type, their JSON text as strings."""
        return pa.schema([(name, pa.string() if kind is None else kind) for name, kind in self.types.items()])


def scan(location: Location, block_rows: int) -> Scan:
    """Cut the file into blocks of `block_rows` lines and find its schema, in one pass. Blank lines are no rows."""
    result = Scan()
    start = offset = end = 0
    lines: list[bytes] = []
    with location.filesystem.open_input_stream(location.path) as stream:
        for line in _lines(stream):
            end += len(line)
            if line.strip():
                lines.append(line)
            if len(lines) == block_rows:
                _add_block(result, lines, Block(start, start + len(lines), offset, end))
                start, offset, lines = start + len(lines), end, []
    if lines:
        _add_block(result, lines, Block(start, start + len(lines), offset, end))
    return result


def read_block(location: Location, offset: int, end: int, schema: pa.Schema) -> tuple[pa.Table, list[Row]]:
    """The rows between two byte positions, as a table of `schema` to pass through and as objects to score."""
    with location.filesystem.open_input_file(location.path) as stream:
        stream.seek(offset)
        raw = stream.read(end - offset)
    lines = [line for line in raw.split(b"\n") if line.strip()]
    rows = [parse_line(line) for line in lines]
    table = pa.table([_to_array(rows, name, schema.field(name).type) for name in schema.names], schema=schema)
    if LINE_COLUMN in schema.names:
        texts = [
            line.decode(errors="replace") if isinstance(row, TripleError) else None
            for line, row in zip(lines, rows, strict=True)
        ]
        table = table.set_column(schema.names.index(LINE_COLUMN), LINE_COLUMN, pa.array(texts, pa.string()))
    return table, rows


def parse_line(line: bytes) -> Row:
    """The line's object, or the error that says why it is none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return RowUnreadable(f"this line is not JSON ({error}); repair it")
    if not isinstance(value, dict):
        return RowUnreadable(f"expected a JSON object on this line, found {type(value).__name__}")
    return value


def _lines(stream: pa.NativeFile) -> Iterator[bytes]:
    """Lines with their line ends, from large reads."""
    rest = b""
    while chunk := stream.read(8 << 20):
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line + b"\n"
    if rest:
        yield rest


def _add_block(result: Scan, lines: Sequence[bytes], block: Block) -> None:
    result.blocks.append(block)
    rows = [parse_line(line) for line in lines]
    for name in dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row):
        inferred = _infer([row.get(name) for row in rows if isinstance(row, dict)])
        result.types[name] = _unify(result.types[name], inferred) if name in result.types else inferred
    if any(isinstance(row, TripleError) for row in rows):
        result.types.setdefault(LINE_COLUMN, pa.string())


def _infer(values: list[Any]) -> pa.DataType | None:
    try:
        return pa.array(values).type
    except (pa.ArrowException, UnicodeEncodeError, OverflowError):
        return pa.string() if all(value is None or isinstance(value, str) for value in values) else None


def _unify(one: pa.DataType | None, other: pa.DataType | None) -> pa.DataType | None:
    if one is None or other is None:
        return None
    try:
        schemas = [pa.schema([("value", kind)]) for kind in (one, other)]
        return pa.unify_schemas(schemas, promote_options="permissive").field("value").type
    except pa.ArrowException:
        return None


def _to_array(rows: Sequence[Row], name: str, kind: pa.DataType) -> pa.Array:
    values = [row.get(name) if isinstance(row, dict) else None for row in rows]
    try:
        return pa.array(values, kind)
    except (pa.ArrowException, UnicodeEncodeError, OverflowError, TypeError):
        return pa.array([_as_string(value) for value in values], pa.string())


def _as_string(value: Any) -> str | None:
    """A value as text that Arrow can hold: JSON unless it is a string; lone surrogates become `?`."""
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.encode(errors="replace").decode()
