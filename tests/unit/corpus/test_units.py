"""A unit reads its rows and no others, and what it writes is its input, bit for bit, with rewards and a receipt."""

import datetime
import decimal
import json
import os

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polar_ray.config import ColumnsConfig
from polar_ray.corpus.inputs import Slice, examine, list_inputs
from polar_ray.corpus.manifest import Unit
from polar_ray.corpus.storage import Location
from polar_ray.corpus.summary import UnitReport
from polar_ray.corpus.units import (
    RECEIPT_ID_KEY,
    RECEIPT_KEY,
    REPORT_KEY,
    read_report,
    read_row,
    read_sample,
    read_unit,
    write_unit,
)
from polar_ray.errors import InputError, OutputError, RowUnreadable
from polar_ray.receipts import Receipt
from polar_ray.triples import Scored, Triple
from tests.unit.corpus.conftest import PlanJob, make_table, write_corpus, write_lines

COLUMNS = ColumnsConfig()
REWARDS = list(COLUMNS.written)
CONVERSATION = [{"role": "user", "content": "hi"}]


def read_units(manifest):
    """Every unit's table and triples, in order of the units."""
    return [read_unit(manifest, unit.index) for unit in manifest.units]


def score_units(manifest, folder):
    """Write every unit with made-up rewards; gives the tables of the files."""
    output = Location(str(folder))
    output.make_folder()
    tables = []
    for unit in manifest.units:
        output.join(*manifest.part(unit.index).split("/")[:-1]).make_folder()
        table, triples = read_unit(manifest, unit.index)
        scored = [Scored(float(row), tokens=row) for row in range(len(triples))]
        write_unit(output, manifest, unit.index, table, scored, UnitReport(rows=len(triples)))
        tables.append(pq.ParquetFile(folder / manifest.part(unit.index)).read())
    return tables


def test_a_unit_is_a_table_and_a_triple_for_each_row(tmp_path, plan_job: PlanJob):
    manifest = plan_job(write_corpus(tmp_path / "a.parquet", make_table(5)), unit_rows=2)
    table, triples = read_unit(manifest, 1)
    assert table.equals(make_table(2, first=2))
    assert triples == [Triple(f"prompt {n}", f"reference {n}", f"output {n}") for n in (2, 3)]


@pytest.mark.parametrize("unit_rows", [1, 7, 40, 1000])
@pytest.mark.parametrize("row_group_size", [1, 3, 10, 100])
def test_units_hold_every_row_once_in_order_however_rows_are_grouped(tmp_path, plan_job, row_group_size, unit_rows):
    write_corpus(tmp_path / "in/a.parquet", make_table(40), row_group_size=row_group_size)
    write_corpus(tmp_path / "in/b.parquet", make_table(3, first=40))
    tables = [table for table, _ in read_units(plan_job(tmp_path / "in", unit_rows=unit_rows))]
    assert all(0 < table.num_rows <= unit_rows for table in tables)
    assert pa.concat_tables(tables).equals(make_table(43))


def test_parts_of_one_giant_row_group_are_its_rows_in_order(tmp_path, plan_job: PlanJob):
    whole = make_table(30_000, text=["long " * (n % 7) for n in range(30_000)])
    manifest = plan_job(write_corpus(tmp_path / "a.parquet", whole, row_group_size=30_000), unit_rows=4096)
    tables = [table for table, _ in read_units(manifest)]
    assert [table.num_rows for table in tables] == [4096] * 7 + [30_000 - 7 * 4096]
    assert pa.concat_tables(tables).equals(whole)


@pytest.mark.parametrize("part", [Slice(0, 1), Slice(8191, 8193), Slice(8192, 8193), Slice(16384, 17000), Slice(3, 4)])
def test_any_part_of_a_giant_row_group_is_those_rows(tmp_path, plan_job: PlanJob, part):
    whole = plan_job(write_corpus(tmp_path / "a.parquet", make_table(17_000)))
    unit = Unit(index=0, file=0, start=part.start, stop=part.stop)
    table, _ = read_unit(whole.model_copy(update={"units": (unit,)}), 0)
    assert table.equals(make_table(part.rows, first=part.start))


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(groups=st.lists(st.integers(1, 60), min_size=1, max_size=8), unit_rows=st.integers(1, 80), data=st.data())
def test_units_of_any_file_join_to_its_rows(tmp_path, plan_job, groups, unit_rows, data):
    whole = make_table(sum(groups))
    with pq.ParquetWriter(tmp_path / "a.parquet", whole.schema) as writer:
        first = 0
        for rows in groups:
            writer.write_table(whole.slice(first, rows), row_group_size=rows)
            first += rows
    manifest = plan_job(tmp_path / "a.parquet", unit_rows=unit_rows)
    index = data.draw(st.integers(0, len(manifest.units) - 1))
    unit = manifest.units[index]
    assert read_unit(manifest, index)[0].equals(whole.slice(unit.start, unit.rows))


ANY_TYPE = {
    "int8": pa.array([1, None, -128], pa.int8()),
    "uint64": pa.array([(1 << 64) - 1, None, 0], pa.uint64()),
    "float16": pa.array([np.float16(1.5), None, np.float16(-0.0)], pa.float16()),
    "float": pa.array([float("inf"), None, -0.0], pa.float32()),
    "boolean": pa.array([True, None, False]),
    "decimal": pa.array([decimal.Decimal("1.23456789012345678901"), None, decimal.Decimal("-0.00000000000000000001")]),
    "decimal256": pa.array([decimal.Decimal(10**50), None, decimal.Decimal(-1)], pa.decimal256(60, 2)),
    "date32": pa.array([datetime.date(1, 1, 1), None, datetime.date(9999, 12, 31)]),
    "date64": pa.array([datetime.date(1, 1, 1), None, datetime.date(9999, 12, 31)], pa.date64()),
    "time": pa.array([1, None, 86_399_999_999_999], pa.time64("ns")),
    "duration": pa.array([1, None, -(1 << 62)], pa.duration("ns")),
    "timestamp": pa.array([1, None, -1], pa.timestamp("ns", "Asia/Kolkata")),
    "far timestamp": pa.array([datetime.datetime(9999, 12, 31), None, datetime.datetime(1, 1, 1)], pa.timestamp("us")),
    "string": pa.array(["", None, "日本\x00語"]),
    "large string": pa.array(["", None, "x"], pa.large_string()),
    "string view": pa.array(["", None, "longer than twelve bytes"], pa.string_view()),
    "not UTF-8": pa.array([b"\xff", None, b"ok"], pa.binary()).view(pa.string()),
    "binary": pa.array([b"\xff\x00", None, b""]),
    "fixed binary": pa.array([b"\xff\x00", None, b"ab"], pa.binary(2)),
    "dictionary": pa.array(["a", None, "a"]).dictionary_encode(),
    "ordered dictionary": pa.DictionaryArray.from_arrays(pa.array([1, None, 0], pa.int8()), ["b", "a"], ordered=True),
    "null": pa.nulls(3),
    "list": pa.array([[1, None], None, []], pa.list_(pa.int64())),
    "large list": pa.array([["a", None], None, []], pa.large_list(pa.string())),
    "fixed list": pa.array([[1, None], None, [3, 4]], pa.list_(pa.float32(), 2)),
    "map": pa.array([[("a", 1), ("b", None)], None, []], pa.map_(pa.string(), pa.int64())),
    "struct": pa.array([{"a": {"b": [1]}, "c": None}, None, {"a": None, "c": "x"}]),
    "list of structs": pa.array([[{"a": None}, None], None, []], pa.list_(pa.struct([("a", pa.list_(pa.int8()))]))),
    "list of dictionaries": pa.array([["a", "b"], None, []], pa.list_(pa.dictionary(pa.int32(), pa.string()))),
    "uuid": pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"\xff" * 16, None, b"0" * 16], pa.binary(16))),
    "json": pa.ExtensionArray.from_storage(pa.json_(), pa.array(['{"a": 1}', None, "not JSON"])),
    "tensor": pa.ExtensionArray.from_storage(
        pa.fixed_shape_tensor(pa.float32(), (2, 2)), pa.array([[1.0, 2, 3, 4]] * 3, pa.list_(pa.float32(), 4))
    ),
}


@pytest.mark.parametrize("unit_rows", [10, 2, 1], ids=["whole", "two rows", "one row"])
@pytest.mark.parametrize("column", ANY_TYPE.values(), ids=ANY_TYPE)
def test_a_column_of_any_type_comes_through_bit_for_bit(tmp_path, plan_job: PlanJob, column, unit_rows):
    path = write_corpus(tmp_path / "a.parquet", make_table(9, other=pa.chunked_array([column] * 3)))
    given_table = pq.ParquetFile(path).read()
    tables = score_units(plan_job(path, unit_rows=unit_rows), tmp_path / "out")
    start = 0
    for table in tables:
        back, expected = table.drop_columns(REWARDS), given_table.slice(start, table.num_rows)
        assert back.schema.equals(expected.schema)
        assert back.equals(expected)
        start += table.num_rows
    assert start == 9


def test_a_column_of_each_type_comes_through_a_part_of_a_giant_row_group(tmp_path, plan_job: PlanJob):
    columns = {name: pa.chunked_array([column] * 6667).slice(0, 20_000) for name, column in ANY_TYPE.items()}
    path = write_corpus(tmp_path / "a.parquet", make_table(20_000, **columns), row_group_size=20_000)
    given_table = pq.ParquetFile(path).read()
    (table, *_, last) = score_units(plan_job(path, unit_rows=4000), tmp_path / "out")
    assert table.drop_columns(REWARDS).equals(given_table.slice(0, 4000))
    assert last.drop_columns(REWARDS).equals(given_table.slice(16_000))
    assert last.drop_columns(REWARDS).schema.equals(given_table.schema)


def test_nan_payloads_come_through(tmp_path, plan_job: PlanJob):
    bits = np.array([0x7FF8DEADBEEF0001, 0xFFF0000000000001, 0x7FF0000000000000], np.uint64)
    path = write_corpus(tmp_path / "a.parquet", make_table(3, other=pa.array(bits.view(np.float64))))
    (table,) = score_units(plan_job(path), tmp_path / "out")
    assert table.column("other").to_numpy().view(np.uint64).tolist() == bits.tolist()


def test_metadata_of_schema_and_fields_and_what_pandas_keeps_there_come_through(tmp_path, plan_job: PlanJob):
    frame = make_table(4).to_pandas().set_index("id").astype({"prompt": "category"})
    table = pa.Table.from_pandas(frame)
    field = table.schema.field("output").with_metadata({"unit": "words"})
    schema = table.schema.set(table.schema.get_field_index("output"), field)
    table = table.cast(schema.with_metadata({**table.schema.metadata, b"mine": b"\xff\x00"}))
    path = write_corpus(tmp_path / "a.parquet", table)
    tables = score_units(plan_job(path, unit_rows=3), tmp_path / "out")
    for back in tables:
        assert back.schema.metadata[b"mine"] == b"\xff\x00"
        assert back.schema.metadata[b"pandas"] == table.schema.metadata[b"pandas"]
        assert back.schema.field("output").metadata[b"unit"] == b"words"
    joined = pa.concat_tables(tables).to_pandas()
    pd.testing.assert_frame_equal(joined[frame.columns], frame)


def test_columns_that_may_not_be_null_stay_so(tmp_path, plan_job: PlanJob):
    table = make_table(20_000)
    table = table.cast(pa.schema([field.with_nullable(False) for field in table.schema]))
    path = write_corpus(tmp_path / "a.parquet", table, row_group_size=20_000)
    for back in score_units(plan_job(path, unit_rows=9000), tmp_path / "out"):
        assert back.drop_columns(REWARDS).schema.equals(table.schema)


def test_two_columns_of_one_name_come_through_both(tmp_path, plan_job: PlanJob):
    table = make_table(20_000).append_column("id", pa.array(range(20_000)))
    path = write_corpus(tmp_path / "a.parquet", table, row_group_size=20_000)
    first, *_ = score_units(plan_job(path, unit_rows=9000), tmp_path / "out")
    assert first.select(range(5)).equals(table.slice(0, 9000))


def test_files_of_one_job_may_differ_in_their_other_columns(tmp_path, plan_job: PlanJob):
    write_corpus(tmp_path / "in/a.parquet", make_table(2, extra=["x", "y"]))
    write_corpus(tmp_path / "in/b.parquet", make_table(2).cast(make_table(2).schema.set(3, pa.field("id", pa.int8()))))
    first, second = score_units(plan_job(tmp_path / "in"), tmp_path / "out")
    assert first.column_names == ["prompt", "reference", "output", "id", "extra", *REWARDS]
    assert second.schema.field("id").type == pa.int8()


def test_a_unit_carries_its_rewards_receipt_and_report(tmp_path, plan_job: PlanJob):
    manifest = plan_job(write_corpus(tmp_path / "in/year=2024/a.parquet", make_table(2)))
    output = Location(str(tmp_path / "out"))
    output.join("year=2024").make_folder()
    assert read_report(output, manifest, 0) is None
    report = UnitReport(
        rows=2, ok=1, by_status={"ok": 1, "triple_empty": 1}, reward_bins={-3: 1}, finished=[(1.5, 2, 3, 4)]
    )
    table, _ = read_unit(manifest, 0)
    write_unit(output, manifest, 0, table, [Scored(-0.5, tokens=9), Scored(None, "triple_empty", "no text")], report)
    assert [path.name for path in (tmp_path / "out/year=2024").iterdir()] == ["part-000000.parquet"]
    back = pq.read_table(tmp_path / "out")
    assert back.column("year").to_pylist() == [2024, 2024]
    assert back.select(REWARDS[:3]).to_pylist() == [
        {"reward": -0.5, "reward_status": "ok", "reward_detail": None},
        {"reward": None, "reward_status": "triple_empty", "reward_detail": "no text"},
    ]
    metadata = pq.read_schema(tmp_path / "out/year=2024/part-000000.parquet").metadata
    assert Receipt.model_validate_json(metadata[RECEIPT_KEY]) == manifest.receipt
    assert metadata[RECEIPT_ID_KEY].decode() == manifest.receipt.receipt_id
    assert UnitReport.model_validate_json(metadata[REPORT_KEY]) == read_report(output, manifest, 0) == report


def test_rows_that_cannot_be_read_keep_their_place_and_their_bytes(tmp_path, plan_job: PlanJob):
    prompts = pa.array([b"good", b"\xff\xfe", None, b"good"], pa.binary()).view(pa.string())
    path = write_corpus(tmp_path / "a.parquet", make_table(4).set_column(0, "prompt", prompts))
    manifest = plan_job(path)
    table, triples = read_unit(manifest, 0)
    assert [type(row).__name__ for row in triples] == ["Triple", "RowUnreadable", "TripleError", "Triple"]
    (back,) = score_units(manifest, tmp_path / "out")
    assert back.column("prompt").cast(pa.binary()).equals(table.column("prompt").cast(pa.binary()))


def test_blocks_of_a_jsonl_file_join_whatever_is_in_which(tmp_path, plan_job: PlanJob):
    rows = [
        {"prompt": "p", "reference": "r", "output": "o", **others}
        for others in (
            {"x": 1},
            {"x": 2.5, "y": {}},
            {"x": "three", "z": None},
            {"z": [{"a": (1 << 60) + 1}]},
            {"z": [{"a": 0.5}]},
        )
    ]
    path = write_lines(tmp_path / "a.jsonl", *map(json.dumps, rows), "not JSON")
    tables = score_units(plan_job(path, unit_rows=1), tmp_path / "out")
    joined = pq.read_table(tmp_path / "out")
    assert joined.drop_columns(REWARDS).equals(pa.concat_tables(tables).drop_columns(REWARDS))
    assert joined.column("x").to_pylist() == ["1", "2.5", "three", None, None, None]
    assert joined.column("y").to_pylist() == [None, "{}", None, None, None, None]
    assert joined.column("z").to_pylist()[3] == '[{"a": 1152921504606846977}]'
    assert joined.column("unreadable_line").to_pylist() == [None] * 5 + ["not JSON"]


def test_an_input_that_is_gone_is_an_input_error_that_names_the_unit(tmp_path, plan_job: PlanJob):
    lines = map(json.dumps, make_table(3).to_pylist())
    for path in (write_corpus(tmp_path / "a.parquet"), write_lines(tmp_path / "a.jsonl", *lines)):
        manifest = plan_job(path)
        path.unlink()
        with pytest.raises(InputError, match=rf"unit 0 \({path} rows 0-\d\): cannot be read"):
            read_unit(manifest, 0)


def test_an_input_that_changed_under_the_job_is_refused(tmp_path, plan_job: PlanJob):
    path = write_corpus(tmp_path / "a.parquet", make_table(100), row_group_size=10)
    manifest = plan_job(path, unit_rows=10)
    write_corpus(path, make_table(100, first=50), row_group_size=10)
    with pytest.raises(InputError, match=r"unit 3 .*: the file changed under the job"):
        read_unit(manifest, 3)


def test_an_input_that_was_cut_short_is_refused(tmp_path, plan_job: PlanJob):
    row = json.dumps({"prompt": "p", "reference": "r", "output": "o"})
    path = write_lines(tmp_path / "a.jsonl", row, row)
    manifest = plan_job(path)
    os.truncate(path, path.stat().st_size - 5)
    with pytest.raises(InputError, match="changed under the job"):
        read_unit(manifest, 0)


def test_an_input_with_other_rows_in_as_many_bytes_is_refused(tmp_path, plan_job: PlanJob):
    row = json.dumps({"prompt": "p", "reference": "r", "output": "o"})
    path = write_lines(tmp_path / "a.jsonl", row, row)
    manifest = plan_job(path)
    before = path.stat()
    path.write_bytes(b" " * len(row) + b"\n" + row.encode() + b"\n")
    with pytest.raises(InputError, match="the file changed under the job"):
        read_unit(manifest, 0)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(InputError, match="1 rows instead of 2; the file changed under the job"):
        read_unit(manifest, 0)


def test_pages_that_are_damaged_are_an_input_error_when_sampled_and_when_read(tmp_path, plan_job: PlanJob):
    path = write_corpus(tmp_path / "a.parquet", make_table(1000), compression="zstd")
    manifest, whole, before = plan_job(path), path.read_bytes(), path.stat()
    path.write_bytes(whole[:4] + b"\x00" * 2000 + whole[2004:])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    files = list_inputs([str(path)])
    contents = examine(files, COLUMNS, 4096)
    with pytest.raises(InputError, match=r"a.parquet: cannot be read"):
        read_sample(files, contents, COLUMNS)
    with pytest.raises(InputError, match=r"unit 0 .*: cannot be read"):
        read_unit(manifest, 0)
    with pytest.raises(InputError, match=r"a.parquet: cannot be read"):
        read_row(str(path), 7, COLUMNS)


def test_message_json_is_decided_once_for_all_files_by_the_first_rows(tmp_path, plan_job: PlanJob):
    text = json.dumps(CONVERSATION)
    write_corpus(tmp_path / "in/0.parquet", make_table(0))
    table = make_table(70).set_column(0, "prompt", pa.array([text] * 70))
    write_corpus(tmp_path / "in/a.parquet", table, row_group_size=1)
    write_corpus(tmp_path / "in/b.parquet", make_table(1))
    manifest = plan_job(tmp_path / "in")
    assert manifest.message_json == ("prompt",)
    (_, first), (_, second) = read_units(manifest)
    assert first[69].prompt == CONVERSATION
    assert "this row's text is not one" in str(second[0])


@pytest.mark.parametrize("row_group_size", [1, 100])
def test_a_text_column_that_begins_with_json_stays_text_however_it_is_grouped(tmp_path, plan_job, row_group_size):
    prompts = pa.array([json.dumps(CONVERSATION), "plain", json.dumps(CONVERSATION)])
    path = write_corpus(
        tmp_path / "a.parquet", make_table(3).set_column(0, "prompt", prompts), row_group_size=row_group_size
    )
    manifest = plan_job(path, unit_rows=1)
    assert manifest.message_json == ()
    assert read_unit(manifest, 0)[1][0].prompt == json.dumps(CONVERSATION)


def test_a_sample_is_of_the_first_file_with_rows_and_of_the_fields_alone(tmp_path):
    write_corpus(tmp_path / "a.parquet", make_table(0))
    write_corpus(tmp_path / "b.parquet", make_table(100))
    files = list_inputs([str(tmp_path)])
    sample = read_sample(files, examine(files, COLUMNS, 10), COLUMNS)
    assert sample.equals(make_table(64).drop_columns("id"))


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_one_row_is_read_as_a_job_would_read_it(tmp_path, name):
    text = json.dumps(CONVERSATION)
    table = make_table(9000).set_column(0, "prompt", pa.array(["plain", text] * 4500))
    path = tmp_path / name
    write_corpus(path, table) if name == "a.parquet" else write_lines(path, *map(json.dumps, table.to_pylist()))
    assert read_row(str(path), 1, COLUMNS) == Triple(text, "reference 1", "output 1")
    assert read_row(str(path), 8999, COLUMNS).output == "output 8999"
    for row in (9000, -1):
        with pytest.raises(InputError, match=f"{name}: has rows 0 to 8999; there is no row {row}"):
            read_row(str(path), row, COLUMNS)


def test_one_row_may_be_of_a_file_that_was_scored_before(tmp_path):
    path = write_corpus(tmp_path / "a.parquet", make_table(2, reward=[0.5, 1.0]))
    assert read_row(str(path), 1, COLUMNS).prompt == "prompt 1"


def test_one_row_that_cannot_be_read_is_its_error(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", json.dumps(make_table(1).to_pylist()[0]), "oops")
    assert isinstance(read_row(str(path), 1, COLUMNS), RowUnreadable)


def test_a_strangers_file_in_a_units_place_is_not_taken_for_its_result(tmp_path, plan_job):
    write_corpus(tmp_path / "in/a.parquet", make_table(3))
    manifest = plan_job(tmp_path / "in")
    output = Location(str(tmp_path / "out"))
    output.make_folder()
    write_corpus(tmp_path / "out" / manifest.part(0), make_table(3))
    with pytest.raises(OutputError, match="was not written by this job; remove it"):
        read_report(output, manifest, 0)
    (tmp_path / "out" / manifest.part(0)).write_bytes(b"PAR1 cut short")
    with pytest.raises(OutputError, match="cannot be read"):
        read_report(output, manifest, 0)
