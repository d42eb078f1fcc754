"""Whose an output folder is: what makes two jobs the same one, what is refused, and what is removed."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polar_ray.config import ColumnsConfig
from polar_ray.corpus.inputs import list_inputs
from polar_ray.corpus.manifest import (
    Manifest,
    ManifestFile,
    Unit,
    check_same_job,
    discard_job,
    discard_leftovers,
    finished_parts,
    load_manifest,
    manifest_location,
    save_manifest,
    unfinished_units,
)
from polar_ray.corpus.storage import Location
from polar_ray.errors import ManifestConflict, OutputError
from tests.unit.corpus.conftest import PlanJob, make_table, write_corpus, write_lines

LINE = json.dumps({"prompt": "p", "reference": "r", "output": "o", "n": [{"a": 1}]})
LEFTOVER = f".part-000000.parquet.{'0a' * 16}.tmp"


@pytest.fixture
def output(tmp_path):
    return Location(str(tmp_path / "out"))


@pytest.fixture
def job(tmp_path, plan_job: PlanJob, output):
    """The manifest of a job over three files, one of them in a hive folder and one JSONL; saved."""
    write_corpus(tmp_path / "in/a.parquet", make_table(5))
    write_corpus(tmp_path / "in/b/year=2024/b.parquet", make_table(5))
    write_lines(tmp_path / "in/c.jsonl", LINE, LINE)
    manifest = plan_job(tmp_path / "in", unit_rows=2)
    save_manifest(output, manifest)
    return manifest


def relist(tmp_path, *names):
    return list_inputs([str(tmp_path / name) for name in names or ("in",)])


def conflict_of(*arguments):
    with pytest.raises(ManifestConflict) as conflict:
        check_same_job(*arguments)
    return conflict.value


def finish(output, manifest):
    for unit in manifest.units:
        output.join(*manifest.part(unit.index).split("/")).write_atomically(b"rewards")


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_manifest_comes_back_as_it_was_saved(output, job):
    assert load_manifest(output) == job
    assert job.rows == 12
    assert [unit.index for unit in job.units] == list(range(7))
    assert job.files[2].schema_of_rows.names == ["prompt", "reference", "output", "n"]
    assert job.files[0].schema_of_rows is None


def test_units_are_described_to_people_by_file_and_rows(tmp_path, job):
    assert job.describe(2) == f"unit 2 ({tmp_path}/in/a.parquet rows 4-4)"


def test_a_new_output_has_no_manifest_and_asking_makes_nothing(tmp_path, output):
    assert load_manifest(output) is None
    (tmp_path / "out").mkdir()
    assert load_manifest(output) is None
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_with_hidden_files_alone_counts_as_empty(tmp_path, output):
    write_corpus(tmp_path / "out/.git/a")
    write_corpus(tmp_path / "out/_polar_ray/history.json")
    assert load_manifest(output) is None


def test_the_same_job_over_the_same_files_is_no_conflict(tmp_path, output, job, receipt):
    check_same_job(job, relist(tmp_path), receipt, ColumnsConfig(), output)
    check_same_job(job, relist(tmp_path, "in/**"), receipt, ColumnsConfig(), output)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"weights_digest": "c" * 64}, "weights_digest: was 'aaa"),
        ({"tokenizer_digest": "c" * 64}, "tokenizer_digest: was"),
        ({"encoding_version": 2}, "encoding_version: was 1, is 2"),
        ({"max_tokens": 8192}, "max_tokens: was 16384, is 8192"),
        ({"cut_side": "left"}, "cut_side: was 'right', is 'left'"),
        ({"on_too_long": "error"}, "on_too_long: was 'cut', is 'error'"),
        (
            {"dtype": "bfloat16", "device": "cuda"},
            "dtype: was 'float32', is 'bfloat16'\n  device: was 'cpu', is 'cuda'",
        ),
        ({"engine_version": "polar_ray 1"}, "engine_version: was 'polar_ray 0', is 'polar_ray 1'"),
    ],
)
def test_another_receipt_is_another_job_and_the_field_is_named(tmp_path, output, job, receipt, change, named):
    conflict = conflict_of(job, relist(tmp_path), receipt.model_copy(update=change), ColumnsConfig(), output)
    assert named in str(conflict)
    assert len(conflict.details["differences"]) == len(change)
    assert output.url in str(conflict)
    assert "--fresh" in str(conflict)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"prompt": "question"}, "columns.prompt: was 'prompt', is 'question'"),
        ({"reward": "polar"}, "columns.reward: was 'reward', is 'polar'"),
        ({"message_json": "never"}, "columns.message_json: was 'auto', is 'never'"),
    ],
)
def test_other_columns_are_another_job(tmp_path, output, job, receipt, change, named):
    assert named in str(conflict_of(job, relist(tmp_path), receipt, ColumnsConfig(**change), output))


def test_a_file_that_grew_is_another_job(tmp_path, output, job, receipt):
    before = (tmp_path / "in/c.jsonl").stat().st_size
    write_lines(tmp_path / "in/c.jsonl", LINE, LINE, LINE)
    conflict = conflict_of(job, relist(tmp_path), receipt, ColumnsConfig(), output)
    assert conflict.details["differences"] == [f"{tmp_path}/in/c.jsonl: had {before} bytes, has {before // 2 * 3}"]


def test_a_file_that_was_written_again_is_another_job(tmp_path, output, job, receipt):
    os.utime(tmp_path / "in/a.parquet", ns=(0, 1_700_000_000_123_000_000))
    (difference,) = conflict_of(job, relist(tmp_path), receipt, ColumnsConfig(), output).details["differences"]
    assert difference.startswith(f"{tmp_path}/in/a.parquet: was modified 20")
    assert difference.endswith("then again 2023-11-14T22:13:20.123+00:00")


def test_files_that_came_and_went_are_named(tmp_path, output, job, receipt):
    (tmp_path / "in/a.parquet").rename(tmp_path / "in/z.parquet")
    conflict = conflict_of(job, relist(tmp_path), receipt, ColumnsConfig(), output)
    assert conflict.details["differences"] == [
        f"{tmp_path}/in/a.parquet: is no longer among the inputs",
        f"{tmp_path}/in/z.parquet: is new among the inputs",
    ]


def test_the_same_files_in_another_order_are_another_job(tmp_path, output, job, receipt):
    files = relist(tmp_path, "in/c.jsonl", "in/a.parquet", "in/b")
    conflict = conflict_of(job, files, receipt, ColumnsConfig(), output)
    assert conflict.details["differences"] == ["the inputs are named in another order"]


def test_every_difference_is_in_the_details_and_the_message_shows_the_first_ten(tmp_path, output, job, receipt):
    for number in range(20):
        write_corpus(tmp_path / f"in/new{number:02}.parquet")
    changed = receipt.model_copy(update={"max_tokens": 64})
    conflict = conflict_of(job, relist(tmp_path), changed, ColumnsConfig(prompt="p"), output)
    assert len(conflict.details["differences"]) == 22
    assert "max_tokens: was 16384, is 64" in str(conflict)
    assert "columns.prompt" in str(conflict)
    assert "and 12 more" in str(conflict)


@pytest.mark.parametrize("name", ["data.parquet", "year=2024/data.csv", "report.html"])
def test_a_folder_with_files_of_somebody_else_is_refused(tmp_path, output, name):
    write_corpus(tmp_path / "out" / name)
    for ask in (load_manifest, discard_job):
        with pytest.raises(OutputError, match=r"holds '.*', which no job of polar_ray wrote; name an empty folder"):
            ask(output)
    assert files_below(tmp_path / "out") == [name]


def test_an_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("precious")
    for ask in (load_manifest, discard_job):
        with pytest.raises(OutputError, match=r"file: is a file; name a folder"):
            ask(Location(str(tmp_path / "file")))
    assert (tmp_path / "file").read_text() == "precious"


def test_an_output_that_cannot_be_written_is_an_output_error(tmp_path, job):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        save_manifest(Location(str(tmp_path / "file/out")), job)
    with pytest.raises(OutputError, match="cannot be written"):
        save_manifest(Location("/proc/out"), job)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[]", b"{}", b'{"version": 1}'],
    ids=["empty", "cut", "bytes", "list", "{}", "part"],
)
def test_a_manifest_that_cannot_be_read_is_refused_and_nothing_is_removed(tmp_path, output, content):
    (tmp_path / "out/_polar_ray").mkdir(parents=True)
    (tmp_path / "out/_polar_ray/manifest.json").write_bytes(content)
    (tmp_path / "out/part-000000.parquet").touch()
    for ask in (load_manifest, discard_job):
        with pytest.raises(OutputError, match=r"manifest.json: not a manifest of this version"):
            ask(output)
    assert len(files_below(tmp_path / "out")) == 2


def test_a_manifest_of_a_later_version_is_refused(output, job):
    content = {**job.model_dump(mode="json"), "version": 2}
    manifest_location(output).write_atomically(json.dumps(content).encode())
    with pytest.raises(OutputError, match="not a manifest of this version"):
        load_manifest(output)


def test_parts_mirror_partitions_and_sort_in_input_order_within_a_folder(job):
    parts = [job.part(unit.index) for unit in job.units]
    assert parts == [
        "part-000000.parquet",
        "part-000001.parquet",
        "part-000002.parquet",
        "year=2024/part-000003.parquet",
        "year=2024/part-000004.parquet",
        "year=2024/part-000005.parquet",
        "part-000006.parquet",
    ]


@pytest.mark.parametrize("n_units", [1, 10, 1_000_000, 1_000_001, 12_345_678])
def test_part_names_sort_in_input_order_however_many_there_are(receipt, n_units):
    class Many(tuple):
        """A tuple that claims its length: millions of units would take a minute to make."""

        def __len__(self):
            return n_units

        def __getitem__(self, index):
            return Unit(index=index, file=0, start=0, stop=1)

    file = ManifestFile(url="x", format="parquet", size=1, modified_ns=1, partition="")
    manifest = Manifest.model_construct(
        receipt=receipt, columns=ColumnsConfig(), message_json=(), files=(file,), units=Many()
    )
    places = {0, 9, 10, 99_999, 100_000, 999_999, 1_000_000, n_units - 1}
    names = [manifest.part(index) for index in sorted(places) if index < n_units]
    assert names == sorted(names)
    assert manifest.part(0).startswith("part-000000")


def test_the_largest_units_are_done_first(output, job):
    sizes = (5, 40, 40, 7, 1, 1, 90)
    units = tuple(replace(unit, size=size) for unit, size in zip(job.units, sizes, strict=True))
    sized = job.model_copy(update={"units": units})
    assert unfinished_units(output, sized) == [6, 1, 2, 3, 0, 4, 5]
    output.join(*sized.part(2).split("/")).write_atomically(b"rewards")
    assert unfinished_units(output, sized) == [6, 1, 3, 0, 4, 5]


def test_finished_parts_are_the_files_that_are_there(tmp_path, output, job):
    assert finished_parts(output) == set()
    for index in (0, 3):
        output.join(*job.part(index).split("/")).write_atomically(b"rewards")
    (tmp_path / "out/notes.txt").touch()
    assert finished_parts(output) == {"part-000000.parquet", "year=2024/part-000003.parquet"}


def test_a_part_that_was_being_written_is_not_finished(tmp_path, output, job):
    (tmp_path / "out" / LEFTOVER).touch()
    assert finished_parts(output) == set()


@pytest.mark.parametrize("partition", ["city=New York/at=10%3A30", "k=数据", "year=__HIVE_DEFAULT_PARTITION__"])
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_parts_in_folders_of_any_name_are_found_again(tmp_path, plan_job, scheme, partition):
    write_corpus(tmp_path / "in" / partition / "a.parquet")
    manifest, output = plan_job(tmp_path / "in"), Location(f"{scheme}{tmp_path}/out")
    save_manifest(output, manifest)
    finish(output, manifest)
    assert finished_parts(output) == {manifest.part(0)} == {f"{partition}/part-000000.parquet"}
    assert (tmp_path / "out" / partition / "part-000000.parquet").exists()
    discard_job(output)
    assert files_below(tmp_path / "out") == []


def test_discarding_removes_what_the_job_wrote_and_nothing_else(tmp_path, output, job):
    finish(output, job)
    mine = [
        "notes.txt",
        "part-000099.parquet",
        "year=2024/mine.parquet",
        "_other/x",
        ".hidden.tmp",
        "year=2023/part-000000.parquet",
    ]
    for name in mine:
        write_corpus(tmp_path / "out" / name)
    (tmp_path / "out/_polar_ray/settings.json").touch()
    (tmp_path / "out/year=2024" / LEFTOVER).touch()
    discard_job(output)
    assert files_below(tmp_path / "out") == sorted(mine)
    assert len(files_below(tmp_path / "in")) == 3


def test_discarding_nothing_is_fine(tmp_path, output):
    discard_job(output)
    assert not (tmp_path / "out").exists()


def test_a_discarded_output_is_new_again(output, job):
    finish(output, job)
    discard_job(output)
    assert load_manifest(output) is None


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(tmp_path, output, job):
    finish(output, job)
    before = files_below(tmp_path / "out")
    kept = [".mine.tmp", "part.tmp", ".git/x.tmp", f"visible.{'0a' * 16}.tmp"]
    for name in [*kept, LEFTOVER, f"year=2024/{LEFTOVER}", f"_polar_ray/.manifest.json.{'f' * 32}.tmp"]:
        write_corpus(tmp_path / "out" / name)
    discard_leftovers(output)
    assert files_below(tmp_path / "out") == sorted([*before, *kept])


def test_what_a_killed_writer_leaves_is_what_is_called_a_leftover(tmp_path, output, job):
    """The names are made in one module and known in another."""
    code = """if True:
        import os, sys
        from polar_ray.corpus.storage import Location
        os.fsync = lambda _: os._exit(9)
        Location(sys.argv[1]).join("part-000000.parquet").write_atomically(b"rewards")
    """
    assert subprocess.run([sys.executable, "-c", code, output.url], check=False).returncode == 9
    assert len(files_below(tmp_path / "out")) == 2
    assert finished_parts(output) == set()
    discard_leftovers(output)
    assert files_below(tmp_path / "out") == ["_polar_ray/manifest.json"]


FILES = st.builds(
    ManifestFile,
    url=st.text(),
    format=st.sampled_from(["parquet", "jsonl"]),
    size=st.integers(0),
    modified_ns=st.integers(0),
    partition=st.text(max_size=8),
)


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(FILES, max_size=5), st.sets(st.sampled_from(["prompt", "output"])))
def test_any_manifest_survives_json(receipt, files, fields):
    manifest = Manifest(
        job_id="a",
        receipt=receipt,
        columns=ColumnsConfig(),
        message_json=tuple(fields),
        files=tuple(files),
        units=tuple(Unit(index=n, file=n, start=0, stop=n + 1) for n in range(len(files))),
    )
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest
