"""Arrow IPC in and out, for callers with many rows: no JSON to parse, and numbers stay binary."""

from __future__ import annotations

import pyarrow as pa

from polar_ray.columns import read_triples
from polar_ray.config import ColumnsConfig
from polar_ray.errors import RequestInvalid, RequestTooLarge
from polar_ray.triples import Row, TokenIds, Triple
from polar_ray.wire import ARROW_REPLY_KEY, RewardsReply

COLUMNS = ColumnsConfig()
FIELDS = frozenset({"prompt", "reference", "output", "wrapper", "id"})

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


def read_rows(body: bytes, max_bytes: int) -> list[Row]:
    """The rows of an Arrow IPC stream: columns `prompt`, `reference`, `output` and optionally `wrapper` and `id`, or
    one column `ids` of integer lists.

    Raises `RequestInvalid` for another layout, `RequestTooLarge` when it unpacks to more than `max_bytes`.
    """
    try:
        table = _read_table(body, max_bytes)
        table.validate(full=True)  # offsets come from a stranger
    except (pa.ArrowException, OSError, ValueError) as error:
        raise RequestInvalid(f"the body is not an Arrow IPC stream ({type(error).__name__})") from None
    names = set(table.column_names)
    if len(names) != table.num_columns:
        raise RequestInvalid("two columns have the same name")
    if names == {"ids"}:
        return _read_ids(table.column("ids"))
    if not {"prompt", "reference", "output"} <= names or names - FIELDS:
        raise RequestInvalid(
            f"expected the columns prompt, reference, output and optionally wrapper and id, or ids alone; found "
            f"{', '.join(sorted(names))[:200] or 'none'}"
        )
    return _read_triples(table)


def write_reply(reply: RewardsReply) -> bytes:
    """The reply as an Arrow IPC stream: its rows as columns, all the rest as JSON in the schema's metadata."""
    rows = [row.model_dump() for row in reply.rewards]
    rest = reply.model_copy(update={"rewards": []}).model_dump_json()
    table = pa.Table.from_pylist(rows, REPLY_SCHEMA.with_metadata({ARROW_REPLY_KEY: rest}))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def _read_table(body: bytes, max_bytes: int) -> pa.Table:
    with pa.ipc.open_stream(pa.py_buffer(body)) as stream:
        batches, unpacked = [], 0
        for batch in stream:
            unpacked += batch.nbytes
            if unpacked > max_bytes:
                raise RequestTooLarge(f"the body unpacks to more than requests.max_body_bytes = {max_bytes}")
            batches.append(batch)
        return pa.Table.from_batches(batches, stream.schema)


def _read_ids(column: pa.ChunkedArray) -> list[Row]:
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        raise RequestInvalid("ids: expected a column of lists of integers")
    if not pa.types.is_integer(column.type.value_type):
        raise RequestInvalid("ids: expected lists of integers")
    if column.null_count or column.combine_chunks().flatten().null_count:
        raise RequestInvalid("ids: has nulls")
    return [TokenIds(ids) for ids in column.to_pylist()]


def _read_triples(table: pa.Table) -> list[Row]:
    given_ids = table.column("id").to_pylist() if "id" in table.column_names else [None] * table.num_rows
    triples = read_triples(table, COLUMNS, frozenset())
    return [
        Triple(row.prompt, row.reference, row.output, row.wrapper, None if given is None else str(given))
        if isinstance(row, Triple)
        else row
        for row, given in zip(triples, given_ids, strict=True)
    ]
