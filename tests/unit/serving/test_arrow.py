"""Arrow requests and replies: any layout that holds triples or ids, and a typed refusal for the rest."""

import json

import pyarrow as pa
import pytest

from polar_ray.config import RequestConfig
from polar_ray.errors import RequestInvalid, RequestTooLarge, RowUnreadable, TripleError
from polar_ray.serving import arrow
from polar_ray.serving.arrow import REPLY_SCHEMA, read_rows, write_reply
from polar_ray.triples import TokenIds, Triple
from polar_ray.wire import ARROW_REPLY_KEY, RewardRow, RewardsReply, TimingsReply, UsageReply

LIMITS = RequestConfig(max_rows=1000)


def stream(table, **options):
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, **options) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def test_columns_of_triples():
    message = [{"role": "user", "content": "P"}]
    table = pa.Table.from_pylist(
        [
            {"prompt": message, "reference": "R", "output": "O", "wrapper": None, "id": "a"},
            {"prompt": message, "reference": "R", "output": None, "wrapper": "pretrain", "id": None},
        ]
    )
    first, second = read_rows(stream(table), LIMITS)
    assert first == Triple(message, "R", "O", "sft", "a")
    assert isinstance(second, TripleError)


@pytest.mark.parametrize("kind", [pa.list_(pa.int32()), pa.large_list(pa.int64()), pa.list_(pa.uint16())])
def test_a_column_of_ids(kind):
    table = pa.table({"ids": pa.array([[1, 2, 3], [4]], kind)})
    assert read_rows(stream(table), LIMITS) == [TokenIds([1, 2, 3]), TokenIds([4])]


def test_no_rows_are_no_rows():
    table = pa.table({name: pa.array([], pa.string()) for name in ("prompt", "reference", "output")})
    assert read_rows(stream(table), LIMITS) == []


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"prompt": ["P"], "reference": ["R"]}, "expected the columns prompt, reference, output"),
        ({"prompt": ["P"], "reference": ["R"], "output": ["O"], "label": ["L"]}, "found label, output"),
        ({"ids": [[1]], "prompt": ["P"]}, "or ids alone"),
        ({"ids": ["1 2"]}, "lists of integers"),
        ({"ids": [["a"]]}, "lists of integers"),
        ({"ids": [[1, None]]}, "has nulls"),
        ({"ids": [[1], None]}, "has nulls"),
        ({}, "found none"),
    ],
)
def test_another_layout_is_refused_by_name(table, says):
    with pytest.raises(RequestInvalid, match=says):
        read_rows(stream(pa.table(table)), LIMITS)


def test_what_is_no_arrow_stream_is_refused():
    whole = stream(pa.table({"ids": [[1, 2, 3]] * 100}))
    for body in (b"", b"{}", b"\0" * 100, whole[: len(whole) // 2], whole[8:]):
        with pytest.raises(RequestInvalid, match="not an Arrow IPC stream"):
            read_rows(body, LIMITS)


MESSAGE = [{"role": "user", "content": "P" * 20, "weight": 1.0}]
SHAPES = {
    "strings": {"prompt": ["P" * 40], "reference": ["R"], "output": ["O"]},
    "messages": {"prompt": [MESSAGE], "reference": ["R"], "output": [None]},
    "views": {name: pa.array(["P" * 40], pa.string_view()) for name in ("prompt", "reference", "output")},
    "a dictionary": {"prompt": pa.array(["P"]).dictionary_encode(), "reference": ["R"], "output": ["O"]},
    "ids": {"ids": [[1, 2, 3]]},
}


@pytest.mark.parametrize("columns", SHAPES.values(), ids=SHAPES)
def test_every_flipped_byte_is_read_or_refused(columns):
    whole = bytearray(stream(pa.table(columns)))
    for place in range(0, len(whole), 3):
        flipped = bytearray(whole)
        flipped[place] ^= 0xFF
        try:
            rows = read_rows(bytes(flipped), LIMITS)
        except (RequestInvalid, RequestTooLarge):
            continue
        assert len(rows) <= 1


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
def test_buffers_that_are_compressed_are_refused_before_they_are_unpacked(compression):
    table = pa.table({"prompt": ["a" * 4_000_000], "reference": ["R"], "output": ["O"]})
    body = stream(table, options=pa.ipc.IpcWriteOptions(compression=compression))
    assert len(body) < 100_000
    before = pa.total_allocated_bytes()
    with pytest.raises(RequestInvalid, match="without compression"):
        read_rows(body, LIMITS)
    assert pa.total_allocated_bytes() - before < 1_000_000


TEXT = ["P", "P"]


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("output", pa.RunEndEncodedArray.from_arrays(pa.array([2], pa.int32()), pa.array(["P"]))),
        ("output", pa.array([[{"role": "user"}]] * 2)),
        ("output", pa.array([[{"content": 1}]] * 2)),
        ("output", pa.array([1, 2])),
        ("output", pa.array([["P"], ["P"]])),
        ("id", pa.array([2**62, 1], pa.timestamp("s"))),
        ("id", pa.array([1, 1], pa.timestamp("s", "Nowhere/Land"))),
        ("id", pa.array([1.5, 2.5])),
    ],
)
def test_types_that_are_larger_than_they_look_or_no_text_are_refused_by_name(name, column):
    table = pa.table({"prompt": TEXT, "reference": TEXT, "output": TEXT} | {name: column})
    with pytest.raises(RequestInvalid, match=f"{name}: expected .*cast the column"):
        read_rows(stream(table), LIMITS)


def test_views_are_texts_as_polars_writes_them():
    view = pa.string_view()
    message = pa.list_(pa.struct([("role", view), ("content", view)]))
    table = pa.table(
        {
            "prompt": pa.array([[{"role": "user", "content": "P" * 20}], None], message),
            "reference": pa.array(["R", "a reference longer than a view"], view),
            "output": pa.array([None, "O"], view),
        }
    )
    first, second = read_rows(stream(table), LIMITS)
    assert first.details["field"] == "output"
    assert second.details["field"] == "prompt"
    table = table.set_column(2, "output", pa.array(["O", "O"], view)).slice(0, 1)
    (row,) = read_rows(stream(table), LIMITS)
    assert row == Triple([{"role": "user", "content": "P" * 20}], "R", "O")


EXTRAS = {"weight": 1.0, "train": True, "index": 7, "name": None, "tool_calls": [{"id": "x", "arguments": {"a": 1}}]}


def test_what_stands_in_messages_besides_role_and_content_is_left_out():
    message = [{"role": "user", "content": "P", **EXTRAS}]
    rows = [
        {"prompt": message, "reference": "R", "output": message},
        {"prompt": message, "reference": "R", "output": []},
    ]
    first, second = read_rows(stream(pa.Table.from_pylist(rows)), LIMITS)
    bare = [{"role": "user", "content": "P"}]
    assert first == Triple(bare, "R", bare)
    assert second == Triple(bare, "R", [])


def test_categories_bytes_and_the_index_of_a_frame_are_no_trouble():
    import pandas as pd

    frame = pd.DataFrame(
        {"prompt": ["P", "P", "Q", "P"], "reference": "R", "output": [b"O", b"o", b"", b"\xff"], "wrapper": "sft"}
    )
    frame = frame.astype({"prompt": "category", "wrapper": "category"})[lambda one: one.prompt == "P"]
    table = pa.Table.from_pandas(frame)
    assert "__index_level_0__" in table.column_names
    first, _, third = read_rows(stream(table), LIMITS)
    assert first == Triple("P", "R", "O")
    assert isinstance(third, RowUnreadable)


@pytest.mark.parametrize(
    "messages", [[None, "O"], [[], []], [[None], [None]], [[{"role": "user", "content": None}]] * 2]
)
def test_columns_of_nulls_or_empty_lists_are_their_rows_affair(messages):
    table = pa.table({"prompt": TEXT, "reference": TEXT, "output": messages})
    assert len(read_rows(stream(table), LIMITS)) == 2


def test_a_message_that_is_not_utf8_is_its_own_rows_affair():
    content = pa.array([b"fine", b"a\xff", b"fine"]).view(pa.string())
    messages = pa.StructArray.from_arrays([pa.array(["user"] * 3), content], ["role", "content"])
    output = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), messages)
    table = pa.table({"prompt": ["P"] * 3, "reference": ["R"] * 3, "output": output})
    rows = read_rows(stream(table), LIMITS)
    assert [type(row) for row in rows] == [Triple, RowUnreadable, Triple]


def test_an_entry_of_a_dictionary_that_is_shown_many_times_is_refused():
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 500, pa.int8()), pa.array(["x" * 100_000]))
    body = stream(pa.table({"prompt": column, "reference": ["R"] * 500, "output": ["O"] * 500}))
    with pytest.raises(RequestTooLarge, match=r"the texts are more than requests\.max_body_bytes"):
        read_rows(body, RequestConfig(max_body_bytes=1 << 20))


@pytest.mark.parametrize("is_nested", [False, True])
def test_a_long_text_that_is_shown_many_times_is_refused(is_nested):
    text = pa.array(["x" * 100_000], pa.string_view())
    views = text.buffers()[1].to_pybytes() * 500
    column = pa.Array.from_buffers(pa.string_view(), 500, [None, pa.py_buffer(views), *text.buffers()[2:]])
    if is_nested:
        messages = pa.StructArray.from_arrays([column], ["content"])
        column = pa.ListArray.from_arrays(pa.array(range(501), pa.int32()), messages)
    body = stream(pa.table({"prompt": column, "reference": ["R"] * 500, "output": ["O"] * 500}))
    assert len(body) < 150_000
    with pytest.raises(RequestTooLarge, match=r"the texts are more than requests\.max_body_bytes"):
        read_rows(body, RequestConfig(max_body_bytes=1 << 20))


def test_rows_are_counted_before_any_is_made():
    nulls = pa.nulls(50_000_000)
    body = stream(pa.table(dict.fromkeys(("prompt", "reference", "output"), nulls)))
    assert len(body) < 1000
    with pytest.raises(RequestTooLarge, match=r"requests\.max_rows = 1000"):
        read_rows(body, LIMITS)


def test_messages_are_counted_before_any_is_made(monkeypatch):
    monkeypatch.setattr(arrow, "MOST_MESSAGES", 5)
    message = [{"role": "user", "content": "P"}] * 3
    table = pa.table({"prompt": [message], "reference": ["R"], "output": [message]})
    with pytest.raises(RequestTooLarge, match="more than 5 messages"):
        read_rows(stream(table), LIMITS)


def test_a_text_that_is_not_utf8_is_its_own_rows_affair():
    broken = pa.array([b"fine", b"a\xff"]).view(pa.string())
    for name in ("output", "id"):
        table = pa.table({"prompt": TEXT, "reference": TEXT, "output": TEXT} | {name: broken})
        first, second = read_rows(stream(table), LIMITS)
        assert isinstance(first, Triple)
        assert isinstance(second, RowUnreadable)


def test_ids_of_rows_may_be_numbers():
    table = pa.table({"prompt": TEXT, "reference": TEXT, "output": TEXT, "id": [7, None]})
    assert [row.id for row in read_rows(stream(table), LIMITS)] == ["7", None]


def test_a_reply_has_its_rows_as_columns_and_the_rest_beside_them():
    reply = RewardsReply(
        model="m",
        receipt_id="r",
        rewards=[
            RewardRow(index=0, reward=1.5, status="ok", tokens=7),
            RewardRow(index=1, id="b", reward=None, status="triple_empty", detail="output: no text"),
        ],
        usage=UsageReply(rows=2, tokens=7, computed_tokens=7),
        timings=TimingsReply(encode_s=0.1, queue_s=0.2, engine_s=0.3, total_s=0.6),
    )
    table = pa.ipc.open_stream(write_reply(reply)).read_all()
    assert table.schema.equals(REPLY_SCHEMA)
    assert table.to_pylist() == [row.model_dump() for row in reply.rewards]
    rest = json.loads(table.schema.metadata[ARROW_REPLY_KEY])
    assert RewardsReply.model_validate({**rest, "rewards": reply.rewards}) == reply
