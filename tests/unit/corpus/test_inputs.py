"""Which files an input stands for, what is refused before anything starts, and how files are cut into slices."""

import threading
import time
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polar_ray.config import ColumnsConfig
from polar_ray.corpus.inputs import Slice, cut_rows, examine, list_inputs
from polar_ray.corpus.storage import Location
from polar_ray.errors import InputError, SchemaError
from tests.unit.corpus.conftest import make_table, write_corpus, write_lines

COLUMNS = ColumnsConfig()
LINE = '{"prompt": "p", "reference": "r", "output": "o"}'


def listed(*inputs):
    """Names of the files that inputs stand for."""
    return [PurePosixPath(file.url).name for file in list_inputs([str(name) for name in inputs])]


@pytest.fixture
def tree(tmp_path):
    """A folder of empty files, two levels deep."""
    for name in ["a.parquet", "b1.pq", "b2.pq", "B3.PARQUET", "one/c.jsonl", "one/two/d.ndjson", "one/two/e.parquet"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_a_file_is_an_input(tree):
    (file,) = list_inputs([str(tree / "a.parquet")])
    assert (file.url, file.format, file.size, file.partition) == (str(tree / "a.parquet"), "parquet", 0, "")
    assert file.modified_ns == (tree / "a.parquet").stat().st_mtime_ns


def test_the_ending_tells_the_format(tree):
    formats = {file.url.rpartition("/")[2]: file.format for file in list_inputs([str(tree)])}
    assert {formats[name] for name in ("a.parquet", "b1.pq", "B3.PARQUET", "e.parquet")} == {"parquet"}
    assert {formats[name] for name in ("c.jsonl", "d.ndjson")} == {"jsonl"}


def test_a_folder_stands_for_every_corpus_file_below_it_in_order_of_path(tree):
    (tree / "README.md").touch()
    assert listed(tree) == ["B3.PARQUET", "a.parquet", "b1.pq", "b2.pq", "c.jsonl", "d.ndjson", "e.parquet"]


def test_inputs_keep_the_order_in_which_they_are_named(tree):
    assert listed(tree / "b2.pq", tree / "one", tree / "a.parquet") == [
        "b2.pq", "c.jsonl", "d.ndjson", "e.parquet", "a.parquet",
    ]  # fmt: skip


def test_hidden_files_and_folders_are_passed_over(tree):
    for name in ["_temporary/x.parquet", ".ipynb_checkpoints/x.parquet", "_metadata.parquet", ".a.parquet.crc"]:
        write_corpus(tree / name)
    assert len(listed(tree)) == 7
    assert len(listed(tree / "**")) == 7


def test_a_hidden_file_that_is_named_is_meant(tmp_path):
    assert listed(write_corpus(tmp_path / "_a.parquet")) == ["_a.parquet"]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.pq", ["b1.pq", "b2.pq"]),
        ("b?.pq", ["b1.pq", "b2.pq"]),
        ("b[2-9].*", ["b2.pq"]),
        ("b[!1].*", ["b2.pq"]),
        ("*.parquet", ["a.parquet"]),
        ("*/*.jsonl", ["c.jsonl"]),
        ("**/*.parquet", ["a.parquet", "e.parquet"]),
        ("one/**/*", ["c.jsonl", "d.ndjson", "e.parquet"]),
        ("one/**", ["c.jsonl", "d.ndjson", "e.parquet"]),
        ("**/two/*.parquet", ["e.parquet"]),
        ("**/one/**/e.*", ["e.parquet"]),
        ("o*/t[v-x]o/?.parquet", ["e.parquet"]),
    ],
)
def test_a_glob_stands_for_the_files_it_matches(tree, pattern, names):
    assert listed(tree / pattern) == names


@pytest.mark.parametrize("pattern", ["*.jsonl", "one?c.jsonl", "one[/]c.jsonl", "*two*", "one/*/*.jsonl", "a.p*t/x"])
def test_a_wildcard_stays_within_one_name(tree, pattern):
    with pytest.raises(InputError, match="matches no file; quote the pattern"):
        listed(tree / pattern)


def test_a_glob_may_be_relative(tree, monkeypatch):
    monkeypatch.chdir(tree)
    (file,) = list_inputs(["one/*.jsonl"])
    assert file.url == str(tree / "one/c.jsonl")
    assert listed("*.pq") == ["b1.pq", "b2.pq"]


def test_a_name_with_wildcards_in_it_may_be_given_as_it_is(tmp_path):
    write_corpus(tmp_path / "run[1]/what?.parquet")
    assert listed(tmp_path / "run[1]") == ["what?.parquet"]
    assert listed(tmp_path / "run[1]/what?.parquet") == ["what?.parquet"]
    assert listed(tmp_path / "*/*.parquet") == ["what?.parquet"]


def test_a_glob_matches_urls_too_and_their_query_is_none_of_the_pattern(monkeypatch, tmp_path):
    write_corpus(tmp_path / "a b/1.parquet")
    (file,) = list_inputs([f"file://{tmp_path}/a%20b/*.parquet"])
    assert file.url == f"{tmp_path}/a b/1.parquet"


def test_files_of_a_url_are_found_again_by_the_url_they_get():
    Location("memory://in/year=2024").make_folder()
    Location("memory://in/year=2024/a.jsonl").write_atomically(LINE.encode())
    for name in ("memory://in", "memory://in/*/*.jsonl", "memory://in/**"):
        (file,) = list_inputs([name])
        assert (file.url, file.partition) == ("memory://in/year=2024/a.jsonl", "year=2024")
    assert examine([file], COLUMNS, 10)[0].slices == (Slice(0, 1, 0, len(LINE), len(LINE)),)
    Location("memory://in").delete()


def test_hive_folders_are_kept_as_partitions(tmp_path):
    for place in ["year=2024/city=New York/a", "year=2024/city=a%2Fb/a", "year=__HIVE_DEFAULT_PARTITION__/a", "b"]:
        write_corpus(tmp_path / f"{place}.parquet")
    partitions = ["", "year=2024/city=New York", "year=2024/city=a%2Fb", "year=__HIVE_DEFAULT_PARTITION__"]
    assert [file.partition for file in list_inputs([str(tmp_path)])] == partitions
    assert [file.partition for file in list_inputs([f"{tmp_path}/year=*/**/*.parquet"])] == partitions[1:]


def test_a_named_file_keeps_the_hive_folders_it_lies_in(tmp_path):
    (file,) = list_inputs([str(write_corpus(tmp_path / "plain/year=2024/a.parquet"))])
    assert file.partition == "year=2024"


def test_only_folders_right_above_the_file_are_partitions(tmp_path):
    write_corpus(tmp_path / "in/year=2024/plain/a.parquet")
    write_corpus(tmp_path / "in/=/a.parquet")
    assert {file.partition for file in list_inputs([str(tmp_path / "in")])} == {""}


def test_a_partition_never_hides_the_output(tmp_path):
    (file,) = list_inputs([str(write_corpus(tmp_path / "a=1/_tmp=2/b=3/c.parquet"))])
    assert file.partition == "b=3"


def test_spark_writes_folders_that_end_like_files(tmp_path):
    write_corpus(tmp_path / "table.parquet/part-0.parquet")
    (tmp_path / "table.parquet/_SUCCESS").touch()
    assert listed(tmp_path / "table.parquet") == ["part-0.parquet"]


def test_symbolic_links_are_followed(tmp_path):
    write_corpus(tmp_path / "blobs/0123")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot/a.parquet").symlink_to("../blobs/0123")
    (file,) = list_inputs([str(tmp_path / "snapshot")])
    assert file.size == (tmp_path / "blobs/0123").stat().st_size


@pytest.mark.parametrize("inputs", [[], [""], ["a.parquet", ""]])
def test_an_input_without_a_name_is_not_the_working_folder(inputs):
    with pytest.raises(InputError, match="no input given"):
        list_inputs(inputs)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("absent.parquet", "absent.parquet: no such file or folder"),
        ("notes.txt", r"notes.txt: unknown format; the name must end in .jsonl, .ndjson, .parquet, .pq"),
        ("*.txt", r"notes.txt: unknown format"),
        ("texts", "texts: no .jsonl or .ndjson or .parquet or .pq file in this folder"),
        ("empty", "empty: no .jsonl or"),
        ("absent/*.parquet", "matches no file"),
        ("notes.txt/*.parquet", "notes.txt/.*: cannot be listed"),
    ],
)
def test_an_input_that_stands_for_nothing_is_refused_by_name(tmp_path, name, says):
    (tmp_path / "notes.txt").touch()
    for folder in ("texts", "empty"):
        (tmp_path / folder).mkdir()
    (tmp_path / "texts/notes.txt").touch()
    with pytest.raises(InputError, match=says):
        list_inputs([str(tmp_path / name)])


@pytest.mark.parametrize("again", ["a.parquet", "./one/../a.parquet", "*.parquet", "**/a.*", ".", "file://"])
def test_a_file_named_twice_is_refused_however_it_is_named(tree, again, monkeypatch):
    monkeypatch.chdir(tree)
    again = f"file://{tree}/a.parquet" if again == "file://" else again
    with pytest.raises(InputError, match=r"a.parquet: named twice"):
        list_inputs(["a.parquet", again])


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1....PAR1", b"not Parquet at all, but rather long"])
def test_a_file_that_is_no_parquet_is_refused_by_name(tmp_path, content):
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(InputError, match=r"a.parquet: not a readable Parquet file"):
        examine(list_inputs([str(tmp_path)]), COLUMNS, 10)


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.99])
def test_a_truncated_file_is_refused(tmp_path, kept):
    whole = write_corpus(tmp_path / "a.parquet", make_table(200)).read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(InputError, match=r"a.parquet: not a readable Parquet file"):
        examine(list_inputs([str(tmp_path)]), COLUMNS, 10)


def test_a_file_whose_columns_have_names_that_are_no_text_is_refused(tmp_path):
    whole = write_corpus(tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole.replace(b"reference", b"refer\xff\xfece"))
    with pytest.raises(InputError, match=r"a.parquet: not a readable Parquet file .*utf-8"):
        examine(list_inputs([str(tmp_path)]), COLUMNS, 10)


def test_a_file_that_goes_away_between_listing_and_reading_is_an_input_error(tmp_path):
    parquet, lines = write_corpus(tmp_path / "a.parquet"), write_lines(tmp_path / "b.jsonl", LINE)
    for path in (parquet, lines):
        files = list_inputs([str(path)])
        path.unlink()
        with pytest.raises(InputError, match=path.name):
            examine(files, COLUMNS, 10)


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_an_input_without_rows_is_refused(tmp_path, name):
    path = tmp_path / name
    write_corpus(path, make_table(0)) if name == "a.parquet" else write_lines(path, "", "  ")
    with pytest.raises(InputError, match=f"{name}: no rows; there is nothing to score"):
        examine(list_inputs([str(path)]), COLUMNS, 10)


def test_files_without_rows_are_fine_beside_one_with_rows_whatever_their_columns(tmp_path):
    write_corpus(tmp_path / "a.parquet", pa.table({"x": pa.array([], pa.int64())}))
    write_corpus(tmp_path / "b.parquet")
    (tmp_path / "c.jsonl").touch()
    found = examine(list_inputs([str(tmp_path)]), COLUMNS, 10)
    assert [len(contents.slices) for contents in found] == [0, 1, 0]


def test_a_missing_column_is_refused_with_the_columns_there_are_and_the_flag(tmp_path):
    write_corpus(tmp_path / "a.parquet", make_table(1).rename_columns(["question", "reference", "output", "id"]))
    with pytest.raises(
        SchemaError, match=r"a.parquet: no column 'prompt' .* question, reference, output, id.*--prompt"
    ):
        examine(list_inputs([str(tmp_path)]), COLUMNS, 10)
    examine(list_inputs([str(tmp_path)]), ColumnsConfig(prompt="question"), 10)


def test_a_column_missing_from_one_file_of_many_is_refused(tmp_path):
    write_corpus(tmp_path / "a.parquet")
    write_corpus(tmp_path / "b.parquet", make_table(1).drop_columns("output"))
    with pytest.raises(SchemaError, match=r"b.parquet: no column 'output'.*--output-column"):
        examine(list_inputs([str(tmp_path)]), COLUMNS, 10)


def test_a_key_missing_from_all_of_a_jsonl_file_is_refused(tmp_path):
    write_lines(tmp_path / "a.jsonl", '{"prompt": "p", "output": "o"}')
    with pytest.raises(SchemaError, match=r"a.jsonl: no column 'reference'.*--reference-column"):
        examine(list_inputs([str(tmp_path)]), COLUMNS, 10)


@pytest.mark.parametrize(
    "values",
    [[1], [1.5], [True], [["a"]], [[1]], [{"content": "a"}], [[{"role": "user"}]]],
    ids=["integer", "float", "boolean", "strings", "integers", "struct", "contentless"],
)
def test_a_column_that_cannot_hold_text_is_refused_with_its_type(tmp_path, values):
    column = pa.array(values)
    table = make_table(1).set_column(1, "reference", column)
    write_corpus(tmp_path / "a.parquet", table)
    with pytest.raises(SchemaError, match=r"column 'reference' is .*; the reference must be strings or lists of"):
        examine(list_inputs([str(tmp_path)]), COLUMNS, 10)


@pytest.mark.parametrize("name", ["prompt", "wrapper"])
def test_two_columns_of_one_name_are_refused_where_the_name_matters(tmp_path, name):
    table = make_table(1, wrapper=["sft"]).append_column(name, pa.array(["sft"]))
    write_corpus(tmp_path / "a.parquet", table)
    with pytest.raises(SchemaError, match=f"a.parquet: 2 columns are called '{name}'"):
        examine(list_inputs([str(tmp_path)]), COLUMNS, 10)


@pytest.mark.parametrize("name", ["reward", "reward_status", "reward_cut_tokens"])
def test_a_column_that_the_job_would_write_is_refused(tmp_path, name):
    write_corpus(tmp_path / "a.parquet", make_table(1, **{name: [0.5]}))
    files = list_inputs([str(tmp_path)])
    with pytest.raises(SchemaError, match=f"'{name}' already; .*columns.reward"):
        examine(files, COLUMNS, 10)
    examine(files, COLUMNS, 10, will_write=False)
    examine(files, ColumnsConfig(reward="polar"), 10)


def test_every_file_is_reported_as_it_is_done(tmp_path):
    for number in range(5):
        write_corpus(tmp_path / f"{number}.parquet")
    done = []
    examine(list_inputs([str(tmp_path)]), COLUMNS, 10, lambda: done.append(1))
    assert len(done) == 5


def test_contents_are_in_the_order_of_the_files_whichever_is_read_first(tmp_path):
    for number in range(20):
        write_corpus(tmp_path / f"{number:02}.parquet", make_table(number + 1))
    wait = threading.Event()

    def stall_the_first() -> None:
        if not wait.is_set():
            wait.set()
            time.sleep(0.05)

    found = examine(list_inputs([str(tmp_path)]), COLUMNS, 100, stall_the_first)
    assert [contents.slices[-1].stop for contents in found] == list(range(1, 21))


def test_slices_follow_row_groups_where_these_are_small(tmp_path):
    write_corpus(tmp_path / "a.parquet", make_table(10), row_group_size=3)
    (contents,) = examine(list_inputs([str(tmp_path)]), COLUMNS, 7)
    assert [(part.start, part.stop) for part in contents.slices] == [(0, 6), (6, 10)]
    assert pq.ParquetFile(tmp_path / "a.parquet").num_row_groups == 4


@pytest.mark.parametrize("row_group_size", [100, 25, 400])
def test_slices_are_known_by_the_size_of_their_fields(tmp_path, row_group_size):
    texts = [chr(65 + n % 26) * (10 if n < 200 else 90) + str(n) for n in range(400)]
    others = ["x" * 5000 + str(n) for n in range(400)]
    rows = {"prompt": texts, "reference": texts[::-1], "output": texts, "other": others}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet", row_group_size=row_group_size, use_dictionary=False)
    (contents,) = examine(list_inputs([str(tmp_path)]), COLUMNS, 100)
    sizes = [part.size for part in contents.slices]
    assert [part.rows for part in contents.slices] == [100] * 4
    assert sum(sizes) == pytest.approx(3 * sum(map(len, texts)), rel=0.2)
    assert sum(sizes[2:]) == pytest.approx(sum(sizes[:2]) * (1 if row_group_size == 400 else 210 / 130), rel=0.1)


def test_equal_texts_count_once_where_a_dictionary_holds_them(tmp_path):
    for name, prompts in (("equal", ["What? " * 50] * 300), ("other", [f"What? {n} " * 40 for n in range(300)])):
        table = pa.table({"prompt": prompts, "reference": ["a"] * 300, "output": ["b"] * 300})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    equal, other = (contents.slices[0].size for contents in examine(list_inputs([str(tmp_path)]), COLUMNS, 1000))
    assert equal < other / 20


@pytest.mark.parametrize(
    ("row_groups", "unit_rows", "stops"),
    [
        ([10], 10, [10]),
        ([11], 10, [10, 11]),
        ([35], 10, [10, 20, 30, 35]),
        ([3, 3, 3, 3], 6, [6, 12]),
        ([3, 3, 3, 3], 7, [6, 12]),
        ([3, 35, 3], 10, [3, 13, 23, 33, 41]),
        ([0, 0, 4, 0], 10, [4]),
        ([1] * 5, 1, [1, 2, 3, 4, 5]),
        ([], 10, []),
        ([0, 0], 10, []),
    ],
)
def test_rows_are_cut_at_group_edges_where_groups_are_small_and_within_them_where_large(row_groups, unit_rows, stops):
    assert [part.stop for part in cut_rows(row_groups, unit_rows)] == stops


@settings(deadline=None)
@given(st.lists(st.integers(0, 100), max_size=40), st.integers(1, 60))
def test_slices_hold_every_row_once_in_order_and_no_more_than_a_unit_may(row_groups, unit_rows):
    slices = cut_rows(row_groups, unit_rows)
    rows = [row for part in slices for row in range(part.start, part.stop)]
    assert rows == list(range(sum(row_groups)))
    assert all(0 < part.rows <= unit_rows for part in slices)


@settings(deadline=None)
@given(st.lists(st.integers(1, 10), min_size=1, max_size=40))
def test_small_row_groups_are_never_torn(row_groups):
    edges, total = {0}, 0
    for rows in row_groups:
        edges.add(total := total + rows)
    assert {part.stop for part in cut_rows(row_groups, 10)} <= edges
