"""Arrow IPC in and out, for callers with many rows: no JSON to parse, and numbers stay binary.

A body can say in a few bytes what takes gigabytes to look at (a million nulls, one long string a million times, zeros
compressed), so layouts whose size in memory is not their size on the wire are refused, or measured, and rows are
counted, before anything is made of them.
"""

from __future__ import annotations

import struct

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from polar_ray.columns import read_column, read_triples
from polar_ray.config import ColumnsConfig, RequestConfig
from polar_ray.errors import RequestInvalid, RequestTooLarge, TripleError
from polar_ray.triples import Row, TokenIds, Triple
from polar_ray.wire import ARROW_REPLY_KEY, RewardsReply

COLUMNS = ColumnsConfig()
TEXTS = ("prompt", "reference", "output")
FIELDS = frozenset({*TEXTS, "wrapper", "id"})

AS_BYTES = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}
"""Types of texts (views are what polars writes), and of the same texts without the promise that they are UTF-8."""

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
            _check_layout(stream.schema)
            table = _read_table(stream, limits.max_rows)
        table = _with_strings_as_bytes(table)
        table.validate(full=True)  # offsets come from a stranger
        _refuse_swollen_views(table, limits.max_body_bytes)
    except (pa.ArrowException, OSError, ValueError, struct.error) as error:
        if isinstance(error, RequestInvalid):
            raise
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


def _check_layout(schema: pa.Schema) -> None:
    """Raise `RequestInvalid` for other columns, or for types that are not as large in memory as in the body."""
    names = set(schema.names)
    if len(names) != len(schema.names):
        raise RequestInvalid("two columns have the same name")
    if names != {"ids"} and (not {*TEXTS} <= names or names - FIELDS):
        raise RequestInvalid(
            f"expected the columns prompt, reference, output and optionally wrapper and id, or ids alone; found "
            f"{', '.join(sorted(names))[:200] or 'none'}"
        )
    for field in schema:
        wanted, is_fit = _expected(field.name, field.type)
        if not is_fit:
            raise RequestInvalid(f"{field.name}: expected {wanted}, found {str(field.type)[:100]}; cast the column")


def _expected(name: str, kind: pa.DataType) -> tuple[str, bool]:
    """What a column may be, in words, and whether `kind` is that."""
    if name == "ids":
        return "lists of integers", _is_list(kind) and pa.types.is_integer(kind.value_type)
    plain = _is_string(kind) or pa.types.is_null(kind)
    if name == "id":
        return "strings or integers", plain or pa.types.is_integer(kind)
    if name == "wrapper":
        return "strings", plain
    return "strings or lists of messages", plain or (_is_list(kind) and _is_message(kind.value_type))


def _is_message(kind: pa.DataType) -> bool:
    if not pa.types.is_struct(kind) or kind.get_field_index("content") < 0:
        return False
    is_plain = [_is_string(part.type) or pa.types.is_null(part.type) for part in kind]
    return all(is_plain) and _is_string(kind.field("content").type)


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _is_string(kind: pa.DataType) -> bool:
    return kind in AS_BYTES


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


def _with_strings_as_bytes(table: pa.Table) -> pa.Table:
    """So that a text that is not UTF-8 is its own row's affair."""
    for place, field in enumerate(table.schema):
        if (kind := AS_BYTES.get(field.type)) is not None:
            chunks = [chunk.view(kind) for chunk in table.column(place).chunks]
            table = table.set_column(place, field.name, pa.chunked_array(chunks, kind))
    return table


def _refuse_swollen_views(table: pa.Table, max_bytes: int) -> None:
    """A million views can be of one long text."""
    if sum(_bytes_of_views(chunk) for column in table.itercolumns() for chunk in column.chunks) > max_bytes:
        raise RequestTooLarge(f"the texts are more than requests.max_body_bytes = {max_bytes}", max_bytes=max_bytes)


def _bytes_of_views(array: pa.Array) -> int:
    """Bytes of all texts that stand in views, however deep; a view begins with its length in four bytes."""
    if pa.types.is_string_view(array.type) or pa.types.is_binary_view(array.type):
        views = np.frombuffer(array.buffers()[1] or b"", dtype=np.int32).reshape(-1, 4)
        return int(
            views[array.offset : array.offset + len(array), 0].sum(where=np.asarray(array.is_valid()), dtype=np.int64)
        )
    if _is_list(array.type):
        return _bytes_of_views(array.values)
    if pa.types.is_struct(array.type):
        return sum(_bytes_of_views(array.field(place)) for place in range(array.type.num_fields))
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
