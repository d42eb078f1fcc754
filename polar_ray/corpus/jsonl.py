"""JSON Lines as input: one object per line, addressed by byte position, with one schema for all files of a job.

A line that is not a JSON object is a row without a reward, not a failed job. Types are inferred over all lines at
once, because types inferred block by block disagree (null here, string there) and make an output nobody can read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from polar_ray.corpus.storage import Location
from polar_ray.errors import RowUnreadable, TripleError

LINE_COLUMN = "unreadable_line"
"""Output column with the raw text of lines that are not JSON objects; present only in files that have such lines."""

MOST_LEVELS = 32
"""Lists and objects within one another in a column's type. Parquet readers refuse types of more than about 48."""

MOST_FIELDS = 1000
"""Keys of the objects in a column's type. Objects with ever new keys are maps; as structs they would fill memory."""

MOST_NESTED = 500
"""Deeper lines are refused, before Python's own limit, which depends on the caller, ends a process."""

EXACT = 1 << 53
"""Integers up to here are exact as floats."""

Row = dict[str, Any] | TripleError


@dataclass(frozen=True)
class Block:
    """Lines `start` to `stop`, between two byte positions of the file."""

    start: int
    stop: int
    offset: int
    end: int


@dataclass
class Seen:
    """What kinds of value a column has, and so its type; the same however its rows are cut into blocks."""

    kinds: set[str] = field(default_factory=set)
    items: Seen | None = None
    fields: dict[str, Seen] = field(default_factory=dict)

    def add(self, value: Any, level: int = 0) -> None:
        if value is None:
            return
        kind = type(value).__name__
        if kind == "int" and not -EXACT <= value <= EXACT:
            kind = "long" if -(1 << 63) <= value < 1 << 63 else "huge"
        if level > MOST_LEVELS or (kind == "dict" and not all(map(_is_text, value))):
            kind = "odd"
        self.kinds.add(kind)
        if kind == "list":
            self.items = self.items or Seen()
            for item in value:
                self.items.add(item, level + 1)
        elif kind == "dict":
            for key, item in value.items():
                self.fields.setdefault(key, Seen()).add(item, level + 1)
            if len(self.fields) > MOST_FIELDS:
                self.kinds.add("odd")
                self.fields.clear()

    def merge(self, other: Seen) -> None:
        """Take in what was seen elsewhere."""
        self.kinds |= other.kinds
        if other.items is not None:
            self.items = self.items or Seen()
            self.items.merge(other.items)
        for key, seen in other.fields.items():
            self.fields.setdefault(key, Seen()).merge(seen)

    @property
    def type(self) -> pa.DataType | None:
        """The type that holds every value unchanged, and that Parquet can hold; None if there is none."""
        if not self.kinds:
            return pa.null()
        if self.kinds == {"list"}:
            item = self.items.type if self.items else None
            return None if item is None else pa.list_(item)
        if self.kinds == {"dict"}:
            types = {name: seen.type for name, seen in self.fields.items()}
            return pa.struct(types) if types and None not in types.values() else None
        return next((kind for kinds, kind in SCALARS if self.kinds <= kinds), None)


SCALARS = (
    (frozenset({"bool"}), pa.bool_()),
    (frozenset({"int", "long"}), pa.int64()),
    (frozenset({"int", "float"}), pa.float64()),
    (frozenset({"str"}), pa.string()),
)


@dataclass
class Scan:
    """A file's blocks, and what was seen in its columns."""

    blocks: list[Block] = field(default_factory=list)
    columns: dict[str, Seen] = field(default_factory=dict)

    @property
    def schema(self) -> pa.Schema:
        """Columns in order of appearance; where no type holds every value, their JSON text as strings."""
        return schema_of([self])


def schema_of(scans: Iterable[Scan]) -> pa.Schema:
    """The schema that the rows of several files fit, so that what is made of them can be read as one data set."""
    columns: dict[str, Seen] = {}
    for scanned in scans:
        for name, seen in scanned.columns.items():
            columns.setdefault(name, Seen()).merge(seen)
    types = {name: seen.type for name, seen in columns.items()}
    return pa.schema({name: pa.string() if kind is None else kind for name, kind in types.items()})


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
    whole = [_with_line(row, line) for row, line in zip(rows, lines, strict=True)]
    arrays = [_to_array([row.get(name) for row in whole], schema.field(name).type) for name in schema.names]
    return pa.table(arrays, schema=schema), rows


def parse_line(line: bytes) -> Row:
    """The line's object, or the error that says why it is none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return RowUnreadable(f"this line is not JSON ({error}); repair it")
    if not isinstance(value, dict):
        return RowUnreadable(f"expected a JSON object on this line, found {type(value).__name__}")
    if line.count(b"[") + line.count(b"{") > MOST_NESTED and _is_deep(value):
        return RowUnreadable(f"more than {MOST_NESTED} lists and objects within one another; flatten them")
    if not all(map(_is_text, value)):
        return RowUnreadable("a key of this object holds a lone surrogate; repair it")
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
    for line in lines:
        for name, value in _with_line(parse_line(line), line).items():
            result.columns.setdefault(name, Seen()).add(value)


def _with_line(row: Row, line: bytes) -> dict[str, Any]:
    """A row's columns: its own, or the line that is no object."""
    return {LINE_COLUMN: line.decode(errors="replace").strip()} if isinstance(row, TripleError) else row


def _to_array(values: list[Any], kind: pa.DataType) -> pa.Array:
    try:
        return pa.array(values, kind)
    except (pa.ArrowException, UnicodeEncodeError):
        is_string = pa.types.is_string(kind)
        return pa.array([as_text(value) if is_string else _repaired(value) for value in values], kind)


def as_text(value: Any) -> str | None:
    """A value as text that Arrow can hold: JSON unless it is a string; lone surrogates become `?`."""
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.encode(errors="replace").decode()


def _repaired(value: Any) -> Any:
    """The value with `?` for every lone surrogate in it."""
    if isinstance(value, list):
        return [_repaired(item) for item in value]
    if isinstance(value, dict):
        return {key: _repaired(item) for key, item in value.items()}
    return as_text(value) if isinstance(value, str) else value


def _is_text(text: str) -> bool:
    """Whether there is no lone surrogate in it."""
    return text.isascii() or text == text.encode(errors="replace").decode()


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MOST_NESTED):
        inner = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, (dict, list))]
        level = [item for items in inner for item in items]
    return bool(level)
