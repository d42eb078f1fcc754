"""Arrow IPC in and out, for callers with many rows: no JSON to parse, and numbers stay binary.

A body can say in a few bytes what takes gigabytes to look at (a million nulls, one long string a million times, zeros
compressed), so layouts whose size in memory is not their size on the wire are refused, or measured, and rows are
counted, before anything is made of them.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from polar_ray.columns import read_column, read_triples
from polar_ray.config import ColumnsConfig, RequestConfig
from polar_ray.errors import RequestInvalid, RequestTooLarge, TripleError
from polar_ray.triples import TEXT_FIELDS, Row, TokenIds, Triple
from polar_ray.wire import ARROW_REPLY_KEY, RewardsReply

COLUMNS = ColumnsConfig()
FIELDS = frozenset({*TEXT_FIELDS, "wrapper", "id"})

AS_BYTES = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}
"""Types of texts (views are what polars writes), and of the same texts without the promise that they are UTF-8."""

MESSAGE_FIELDS = ("role", "content")

PANDAS_INDEX = re.compile(r"__index_level_\d+__")
"""Columns that pandas adds of itself to a frame that was filtered or sorted."""

MOST_MESSAGES = 1 << 20
"""Of one request: a message is a dict in memory, whatever it takes on the wire."""

REPLY_SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("id", pa.string()),
        ("reward", pa.float32()),
        ("status", pa.string()),
        ("detail", pa.string()),
        ("tokens", pa.int32()),
        ("cut_tokens", pa.int32()),
        ("removed_control_tokens", pa.int32()),
    ]
)


def read_rows(body: bytes, limits: RequestConfig) -> list[Row]:
    """The rows of an Arrow IPC stream: columns `prompt`, `reference`, `output` and optionally `wrapper` and `id`, or
    one column `ids` of integer lists.

    Raises `RequestInvalid` for another layout, `RequestTooLarge` for more rows than `limits` allow.
    """
    try:
        _refuse_compression(body)
        with pa.ipc.open_stream(pa.py_buffer(body)) as stream:
            names = _check_layout(stream.schema)
            table = _read_table(stream, limits.max_rows).select(names)
        table.validate()
        table = _map(table, _without_extras)
        # Offsets come from a stranger; whether texts are UTF-8 is their rows' affair.
        _map(table, _as_bytes).validate(full=True)
        _refuse_swollen(table, limits.max_body_bytes)
    except RequestInvalid:
        raise
    except (pa.ArrowException, OSError, ValueError, struct.error) as error:
        raise RequestInvalid(f"the body is not an Arrow IPC stream ({type(error).__name__})") from None
    return _read_ids(table.column("ids")) if table.column_names == ["ids"] else _read_triples(table)


def write_reply(reply: RewardsReply) -> bytes:
    """The reply as an Arrow IPC stream: its rows as columns, all the rest as JSON in the schema's metadata."""
    rows = [row.model_dump() for row in reply.rewards]
    rest = reply.model_copy(update={"rewards": []}).model_dump_json()
    table = pa.Table.from_pylist(rows, REPLY_SCHEMA.with_metadata({ARROW_REPLY_KEY: rest}))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def _refuse_compression(body: bytes) -> None:
    for message in pa.ipc.MessageReader.open_stream(pa.py_buffer(body)):
        if _is_compressed(message.metadata.to_pybytes()):
            raise RequestInvalid("the body's buffers are compressed; write the stream without compression")


def _is_compressed(metadata: bytes) -> bool:
    """Whether an IPC message is a batch with compressed buffers; pyarrow tells only after it has unpacked them.

    Reads the flatbuffer by its layout in Arrow's `format/Message.fbs`: a table's fields are found through its vtable.
    """

    def read(form: str, at: int) -> int:
        value: int = struct.unpack_from(form, metadata, at)[0]
        return value

    def field(table: int, number: int) -> int | None:
        vtable = table - read("<i", table)
        slot = 4 + 2 * number
        offset = read("<H", vtable + slot) if slot < read("<H", vtable) else 0
        return table + offset if offset else None

    def follow(at: int | None) -> int:
        if at is None:
            raise ValueError("a table is missing")
        return at + read("<I", at)

    message = read("<I", 0)
    kind = field(message, 1)
    header = 0 if kind is None else read("<B", kind)
    if header not in (2, 3):  # DictionaryBatch, RecordBatch
        return False
    batch = follow(field(message, 2))
    return field(batch if header == 3 else follow(field(batch, 1)), 3) is not None


def _check_layout(schema: pa.Schema) -> list[str]:
    """The columns to read. Raises `RequestInvalid` for others, and for types that cannot be what they are to hold."""
    given = [name for name in schema.names if not PANDAS_INDEX.fullmatch(name)]
    names = set(given)
    if len(names) != len(given):
        raise RequestInvalid("two columns have the same name")
    if names != {"ids"} and (not {*TEXT_FIELDS} <= names or names - FIELDS):
        raise RequestInvalid(
            f"expected the columns prompt, reference, output and optionally wrapper and id, or ids alone; found "
            f"{', '.join(sorted(names))[:200] or 'none'}"
        )
    for name in given:
        kind = schema.field(name).type
        wanted, is_fit = _expected(name, kind)
        if not is_fit:
            raise RequestInvalid(f"{name}: expected {wanted}, found {str(kind)[:100]}; cast the column")
    return given


def _expected(name: str, kind: pa.DataType) -> tuple[str, bool]:
    """What a column may be, in words, and whether `kind` is that."""
    if name == "ids":
        return "lists of integers", _is_list(kind) and pa.types.is_integer(kind.value_type)
    if name == "id":
        return "strings or integers", _is_text(kind) or pa.types.is_integer(kind)
    if name == "wrapper":
        return "strings", _is_text(kind)
    return "strings or lists of messages", _is_text(kind) or (_is_list(kind) and _is_message(kind.value_type))


def _is_text(kind: pa.DataType) -> bool:
    """Texts, or nothing but nulls; pandas' categories are dictionaries."""
    if pa.types.is_dictionary(kind):
        return kind.value_type in (pa.string(), pa.large_string())
    return kind in AS_BYTES or kind in AS_BYTES.values() or pa.types.is_null(kind)


def _is_message(kind: pa.DataType) -> bool:
    """Whether items of a list can be messages; what stands in them besides role and content is not looked at."""
    if pa.types.is_null(kind):
        return True
    if not pa.types.is_struct(kind) or kind.get_field_index("content") < 0:
        return False
    return all(_is_text(part.type) for part in kind if part.name in MESSAGE_FIELDS)


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _read_table(stream: pa.ipc.RecordBatchStreamReader, max_rows: int) -> pa.Table:
    batches, rows = [], 0
    for batch in stream:
        rows += batch.num_rows
        if rows > max_rows:
            raise RequestTooLarge(
                f"more rows than requests.max_rows = {max_rows}; send them in parts", max_rows=max_rows
            )
        batches.append(batch)
    return pa.Table.from_batches(batches, stream.schema)


def _map(table: pa.Table, change: Callable[[pa.Array], pa.Array]) -> pa.Table:
    columns = [[change(chunk) for chunk in column.chunks] for column in table.itercolumns()]
    return pa.table(
        {
            field.name: pa.chunked_array(chunks) if chunks else pa.chunked_array([], field.type)
            for field, chunks in zip(table.schema, columns, strict=True)
        }
    )


def _without_extras(array: pa.Array) -> pa.Array:
    """Messages with their role and content only."""
    if not _is_list(array.type) or not pa.types.is_struct(array.type.value_type):
        return array
    messages = array.values
    kept = [name for name in MESSAGE_FIELDS if messages.type.get_field_index(name) >= 0]
    return _list_of(array, _struct_of(messages, {name: messages.field(name) for name in kept}))


def _as_bytes(array: pa.Array) -> pa.Array:
    """The same with texts as bytes, however deep."""
    if array.type in AS_BYTES:
        return array.view(AS_BYTES[array.type])
    if pa.types.is_dictionary(array.type):
        return pa.DictionaryArray.from_arrays(array.indices, _as_bytes(array.dictionary))
    if _is_list(array.type):
        return _list_of(array, _as_bytes(array.values))
    if pa.types.is_struct(array.type):
        return _struct_of(array, {field.name: _as_bytes(array.field(field.name)) for field in array.type})
    return array


def _list_of(array: pa.Array, values: pa.Array) -> pa.Array:
    return type(array).from_arrays(array.offsets, values, mask=array.is_null())


def _struct_of(array: pa.StructArray, fields: Mapping[str, pa.Array]) -> pa.StructArray:
    return pa.StructArray.from_arrays(list(fields.values()), list(fields), mask=array.is_null())


def _refuse_swollen(table: pa.Table, max_bytes: int) -> None:
    """A million views, or a million entries of a dictionary, can be of one long text."""
    if sum(_bytes_shown(chunk) for column in table.itercolumns() for chunk in column.chunks) > max_bytes:
        raise RequestTooLarge(f"the texts are more than requests.max_body_bytes = {max_bytes}", max_bytes=max_bytes)


def _bytes_shown(array: pa.Array) -> int:
    """Bytes of all texts that stand somewhere once and are shown more often, however deep."""
    if array.type in (pa.string_view(), pa.binary_view()):
        views = np.frombuffer(array.buffers()[1] or b"", dtype=np.int32).reshape(-1, 4)  # the first is the length
        lengths = views[array.offset : array.offset + len(array), 0]
        return int(lengths.sum(where=np.asarray(array.is_valid()), dtype=np.int64))
    if pa.types.is_dictionary(array.type):
        lengths = pc.binary_length(array.dictionary).cast(pa.int64())
        return int(pc.sum(lengths.take(array.indices)).as_py() or 0)
    if _is_list(array.type):
        return _bytes_shown(array.values)
    if pa.types.is_struct(array.type):
        return sum(_bytes_shown(array.field(place)) for place in range(array.type.num_fields))
    return 0


def _read_ids(column: pa.ChunkedArray) -> list[Row]:
    if column.null_count or column.combine_chunks().flatten().null_count:
        raise RequestInvalid("ids: has nulls")
    return [TokenIds(ids) for ids in column.to_pylist()]


def _read_triples(table: pa.Table) -> list[Row]:
    lists = [column for column in table.itercolumns() if _is_list(column.type)]
    if sum(pc.sum(pc.list_value_length(column)).as_py() or 0 for column in lists) > MOST_MESSAGES:
        raise RequestTooLarge(f"more than {MOST_MESSAGES} messages; send them in parts")
    given_ids = read_column(table, "id", table.num_rows)
    triples = read_triples(table, COLUMNS, frozenset())
    return [_with_id(row, given) for row, given in zip(triples, given_ids, strict=True)]


def _with_id(row: Triple | TripleError, given: str | int | TripleError | None) -> Row:
    if isinstance(row, TripleError) or given is None:
        return row
    if isinstance(given, TripleError):
        return given
    return Triple(row.prompt, row.reference, row.output, row.wrapper, str(given))
