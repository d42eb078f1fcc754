"""JSON Lines: which lines are rows, one schema for the whole file, and values that come through as they were."""

import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polar_ray.columns import parse_rows
from polar_ray.config import ColumnsConfig
from polar_ray.corpus import jsonl
from polar_ray.corpus.jsonl import LINE_COLUMN, parse_line
from polar_ray.corpus.storage import Location
from polar_ray.corpus.units import read_unit
from polar_ray.errors import RowUnreadable
from polar_ray.triples import Triple
from tests.unit.corpus.conftest import PlanJob, write_lines

LINE = '{"prompt": "p", "reference": "r", "output": "o"}'


def read_all(path, block_rows):
    """Every block's table, joined, which takes one schema; and every row."""
    found = jsonl.scan(Location(str(path)), block_rows)
    schema = found.schema
    blocks = [jsonl.read_block(Location(str(path)), block.offset, block.end, schema) for block in found.blocks]
    assert [table.num_rows for table, _ in blocks] == [block.stop - block.start for block in found.blocks]
    for table, _ in blocks:
        table.validate(full=True)
    return pa.concat_tables([table for table, _ in blocks]), [row for _, rows in blocks for row in rows]


@pytest.fixture
def read(tmp_path):
    """Read lines in blocks of one and of many rows: both must agree. Gives the table and the rows."""

    def read_lines(*lines, end=b"\n", block_rows=(1, 2, 100)):
        path = write_lines(tmp_path / "a.jsonl", *lines, end=end)
        first, *others = [read_all(path, rows) for rows in block_rows]
        for table, rows in others:
            assert table.equals(first[0], check_metadata=True)
            assert [str(row) for row in rows] == [str(row) for row in first[1]]
        pq.write_table(first[0], tmp_path / "a.parquet")  # whatever a schema is, Parquet can write it and read it
        assert pq.read_table(tmp_path / "a.parquet").equals(first[0].combine_chunks())
        return first

    return read_lines


def values_of(*values):
    return [json.dumps({"x": value}) for value in values]


def column_of(read, *values):
    return read(*values_of(*values))[0].column("x")


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\n\n", b"\n \t\r\n"], ids=["LF", "CRLF", "blank lines", "blanks"])
def test_line_ends_and_blank_lines_are_no_rows(read, end):
    table, rows = read(LINE, LINE, LINE, end=end)
    assert table.num_rows == 3
    assert rows == [json.loads(LINE)] * 3


def test_the_last_line_needs_no_line_end(tmp_path):
    (tmp_path / "a.jsonl").write_text(f"\n\n{LINE}\n{LINE}")
    table, _ = read_all(tmp_path / "a.jsonl", 1)
    assert table.num_rows == 2


def test_a_byte_order_mark_is_no_fault(read):
    _, rows = read(b"\xef\xbb\xbf" + LINE.encode(), LINE)
    assert rows == [json.loads(LINE)] * 2


def test_an_empty_file_has_no_blocks(tmp_path):
    (tmp_path / "a.jsonl").touch()
    assert jsonl.scan(Location(str(tmp_path / "a.jsonl")), 10).blocks == []


@pytest.mark.parametrize("block_rows", [1, 2, 3, 7])
def test_blocks_hold_every_line_once_in_order(tmp_path, block_rows):
    lines = [json.dumps({"n": number, "text": "é" * (number % 5)}, ensure_ascii=False) for number in range(7)]
    path = write_lines(tmp_path / "a.jsonl", *lines, end=b"\r\n\n")
    table, _ = read_all(path, block_rows)
    assert table.column("n").to_pylist() == list(range(7))
    blocks = jsonl.scan(Location(str(path)), block_rows).blocks
    assert all(block.stop - block.start <= block_rows for block in blocks)
    assert [block.start for block in blocks] == [0, *(block.stop for block in blocks[:-1])]


def test_lines_are_whole_where_reads_end_within_them(tmp_path):
    lines = [json.dumps({"n": number, "text": "x" * 3_000_001}) for number in range(8)]
    table, _ = read_all(write_lines(tmp_path / "a.jsonl", *lines), 3)
    assert table.column("n").to_pylist() == list(range(8))
    assert {len(text) for text in table.column("text").to_pylist()} == {3_000_001}


BAD_LINES = {
    "cut": '{"prompt": "p", "refer',
    "not JSON": "prompt,reference,output",
    "two objects": LINE + LINE,
    "single quotes": "{'prompt': 'p'}",
    "list": '["p", "r", "o"]',
    "string": '"text"',
    "number": "17",
    "null": "null",
    "not UTF-8": b'{"prompt": "\xff\xfe", "reference": "r", "output": "o"}',
    "control character": '{"prompt": "a\x01b"}',
    "brackets": "[" * 100_000,
    "deep": '{"x": ' + "[" * 600 + "]" * 600 + "}",
    "digits": '{"x": ' + "9" * 5000 + "}",
    "bad key": r'{"\ud800": 1}',
}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES)
def test_a_line_that_is_no_object_fails_itself_and_is_kept_as_it_is(read, line):
    table, rows = read(LINE, line, LINE)
    assert rows[0] == rows[2] == json.loads(LINE)
    assert rows[1].code == RowUnreadable.code
    text = line if isinstance(line, str) else line.decode(errors="replace")
    assert table.column(LINE_COLUMN).to_pylist() == [None, text, None]
    assert table.column("prompt").to_pylist() == ["p", None, "p"]


def test_files_without_bad_lines_have_no_column_for_them(read):
    assert LINE_COLUMN not in read(LINE)[0].column_names


def test_a_column_that_is_called_like_the_one_for_bad_lines_keeps_its_values(read):
    table, _ = read(*[json.dumps({LINE_COLUMN: value}) for value in ("mine", 3)], "oops")
    assert table.column(LINE_COLUMN).to_pylist() == ["mine", "3", "oops"]
    assert read(json.dumps({LINE_COLUMN: 7}))[0].column(LINE_COLUMN).to_pylist() == [7]


def test_what_a_line_is_does_not_hang_on_who_asks(read):
    """Python's limit of recursion counts the caller's depth; ours does not."""

    def asked_from(depth):
        return asked_from(depth - 1) if depth else [str(parse_line(line.encode())) for line in lines]

    lines = ['{"x": ' + "[" * depth + "]" * depth + "}" for depth in (400, 498, 499, 500, 501, 700)]
    assert asked_from(0) == asked_from(200)


def test_keys_that_appear_late_are_null_before(read):
    table, _ = read('{"a": 1}', '{"b": "x"}', '{"a": 2, "c": [1.5]}')
    assert table.to_pylist() == [
        {"a": 1, "b": None, "c": None}, {"a": None, "b": "x", "c": None}, {"a": 2, "b": None, "c": [1.5]},
    ]  # fmt: skip


def test_of_keys_that_are_given_twice_the_last_counts(read):
    assert read('{"x": 1, "x": "last"}')[0].to_pylist() == [{"x": "last"}]


def test_a_column_of_nulls_stays_one(read):
    assert column_of(read, None, None).type == pa.null()


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["a", None, ""], pa.string()),
        ([True, None, False], pa.bool_()),
        ([1, None, -(1 << 63), (1 << 63) - 1], pa.int64()),
        ([1.5, None, -0.0], pa.float64()),
        ([1, 2.5, (1 << 53), -(1 << 53)], pa.float64()),
        ([[1], [], None, [None, 2]], pa.list_(pa.int64())),
        ([[], [1], [2.5]], pa.list_(pa.float64())),
        ([[], []], pa.list_(pa.null())),
        ([{"a": 1}, {"b": "x"}, None, {}], pa.struct([("a", pa.int64()), ("b", pa.string())])),
        ([[{"a": {"b": [1]}}]], pa.list_(pa.struct([("a", pa.struct([("b", pa.list_(pa.int64()))]))]))),
    ],
)
def test_values_that_agree_on_a_type_have_it(read, values, kind):
    column = column_of(read, *values)
    assert column.type == kind
    for before, after in zip(values, column.to_pylist(), strict=True):
        assert before == after or all(after[key] == before.get(key) for key in after)


@pytest.mark.parametrize(
    "values",
    [
        ["a", 1],
        [1, True],
        [1.5, True],
        [[1.5], [True]],
        [1, "a", None],
        [["a"], "a"],
        [{"a": 1}, [1]],
        [{"a": 1}, {"a": "x"}],
        [[1, "a"]],
        [(1 << 53) + 1, 1.5],
        [{"id": (1 << 62) + 1}, {"id": 0.5}],
        [1 << 63],
        [1, -(10**30)],
        [{}],
        [{"a": {}}, {"a": None}],
        [[{}]],
        [json.loads("[" * 200 + "]" * 200)],
        [{"a\udc00": 1}],
    ],
)
def test_values_that_agree_on_none_are_their_json_text(read, values):
    column = column_of(read, *values)
    assert column.type == pa.string()
    for before, text in zip(values, column.to_pylist(), strict=True):
        if before is None or isinstance(before, str):
            assert text == before
        else:
            assert text == json.dumps(before, ensure_ascii=False).encode(errors="replace").decode()


@pytest.mark.parametrize("levels", [10, 31, 32, 33, 34, 47, 48, 100])
def test_nested_lists_come_through_at_any_depth(read, levels):
    value = json.loads("[" * levels + "7" + "]" * levels)
    (back,) = column_of(read, value).to_pylist()
    assert (json.loads(back) if isinstance(back, str) else back) == value


def test_objects_with_ever_new_keys_are_json_text(tmp_path):
    rows = [{"votes": {f"user {row} {n}": n for n in range(10)}} for row in range(jsonl.MOST_FIELDS)]
    table, _ = read_all(write_lines(tmp_path / "a.jsonl", *map(json.dumps, rows)), 300)
    assert [json.loads(text) for text in table.column("votes").to_pylist()] == [row["votes"] for row in rows]
    few = [{"votes": {f"user {n}": n for n in range(100)}}] * 3
    table, _ = read_all(write_lines(tmp_path / "a.jsonl", *map(json.dumps, few)), 300)
    assert table.to_pylist() == few


def test_nan_and_infinity_are_floats(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", *[f'{{"x": {x}}}' for x in ("NaN", "Infinity", "-Infinity", "1e999", "1")])
    table, _ = read_all(path, 2)
    nan, *others = table.column("x").to_pylist()
    assert math.isnan(nan)
    assert others == [math.inf, -math.inf, math.inf, 1]


def test_a_lone_surrogate_becomes_a_question_mark_on_its_way_through_and_nothing_else_does(read):
    lines = [r'{"x": "a\ud800b", "y": [{"z": "\udfff"}]}', r'{"x": "\ud83d\ude00", "y": [{"z": "ok"}]}']
    table, rows = read(*lines)
    assert table.column("x").to_pylist() == ["a?b", "😀"]
    assert table.column("y").to_pylist() == [[{"z": "?"}], [{"z": "ok"}]]
    assert rows[0]["x"] == "a\ud800b"  # to be scored it is the encoder's to refuse


def test_a_lone_surrogate_in_bytes_is_one_as_well(read):
    table, rows = read(b'{"x": "a\xed\xa0\x80b"}', '{"x": "fine"}')
    assert rows[0]["x"] == "a\ud800b"
    assert table.column("x").to_pylist() == ["a?b", "fine"]


def test_the_null_character_is_a_character(read):
    table, _ = read(r'{"a\u0000b": "c\u0000d", "": 1}')
    assert table.to_pylist() == [{"a\0b": "c\0d", "": 1}]


JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(1 << 70), 1 << 70),
        st.floats(allow_nan=False),
        st.text(st.characters(codec=None), max_size=5),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from("abc"), inner, max_size=3)),
    max_leaves=6,
)


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.dictionaries(st.sampled_from(["x", "y", "é"]), JSON, max_size=3), min_size=1, max_size=5))
def test_any_json_comes_through_with_one_schema_however_it_is_cut(read, rows):
    rows = [{"n": number, **row} for number, row in enumerate(rows)]
    table, back = read(*[json.dumps(row) for row in rows])
    assert back == [json.loads(json.dumps(row)) for row in rows]
    for name in table.column_names:
        for row, value in zip(rows, table.column(name).to_pylist(), strict=True):
            assert is_same(row.get(name), value), (row.get(name), value)


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(st.binary(max_size=12), st.sampled_from([LINE.encode(), b'{"x":', b"[1]"])), max_size=6))
def test_any_bytes_are_rows_or_blank_lines_or_lines_that_are_no_objects(read, lines):
    lines = [LINE.encode(), *(line.replace(b"\n", b"") for line in lines)]
    table, rows = read(*lines)
    whole = [line for line in lines if line.strip()]
    assert table.num_rows == len(rows) == len(whole)
    for line, row in zip(whole, rows, strict=True):
        assert (row == json.loads(LINE)) == (line == LINE.encode())


def is_same(given, found):
    """Whether a JSON value came through: as itself, in a wider type, or as its text."""
    if given is None or found is None:
        return given is found
    if isinstance(found, str):
        text = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
        return text.encode(errors="replace").decode() == found
    if isinstance(given, list):
        return len(given) == len(found) and all(map(is_same, given, found))
    if isinstance(given, dict):
        return given.keys() <= found.keys() and all(is_same(given.get(key), item) for key, item in found.items())
    return given == found and isinstance(given, bool) == isinstance(found, bool)


def test_fields_are_scored_as_they_stand_in_the_line_whatever_their_columns_type(tmp_path, plan_job: PlanJob):
    conversation = [{"role": "user", "content": "hi"}]
    values = [conversation, "plain", 3, None, [{"content": 1}], "also plain", conversation]
    rows = [{"prompt": value, "reference": "r", "output": "o"} for value in values]
    path = write_lines(tmp_path / "a.jsonl", *map(json.dumps, rows))
    manifest = plan_job(path, unit_rows=2)
    assert manifest.message_json == ()
    triples = [triple for unit in manifest.units for triple in read_unit(manifest, unit.index)[1]]
    assert [row.prompt if isinstance(row, Triple) else None for row in triples] == [
        conversation, "plain", None, None, None, "also plain", conversation,
    ]  # fmt: skip


def test_json_text_within_json_lines_is_found_by_the_first_rows_of_the_file(tmp_path, plan_job: PlanJob):
    text = json.dumps([{"role": "user", "content": "hi"}])
    row = {"prompt": text, "reference": "r", "output": "o"}
    path = write_lines(tmp_path / "a.jsonl", "oops", *map(json.dumps, [row] * 70))
    assert plan_job(path, unit_rows=1).message_json == ("prompt",)
    write_lines(path, *map(json.dumps, [row, {**row, "prompt": "plain"}, row]))
    assert plan_job(path, unit_rows=1).message_json == ()
    write_lines(path, *map(json.dumps, [row, {**row, "prompt": [{"content": "hi"}]}]))
    assert plan_job(path, unit_rows=1).message_json == ()


def test_json_text_is_parsed_where_the_column_is_json():
    text = json.dumps([{"content": "hi"}])
    rows = [{"prompt": value, "reference": "r", "output": "o"} for value in (text, "plain", [{"content": "list"}])]
    found = parse_rows(rows, frozenset({"prompt"}))
    assert found[0].prompt == [{"content": "hi"}]
    assert "this row's text is not one" in str(found[1])
    assert found[2].prompt == [{"content": "list"}]


def test_columns_config_applies_to_keys(tmp_path, plan_job: PlanJob):
    path = write_lines(
        tmp_path / "a.jsonl", '{"q": "p", "reference": "r", "output": "o", "kind": "pretrain", "wrapper": 1}'
    )
    manifest = plan_job(path, columns=ColumnsConfig(prompt="q", wrapper="kind"))
    assert read_unit(manifest, 0)[1] == [Triple("p", "r", "o", wrapper="pretrain")]
