"""The synthetic corpus is what it says it is, and the same every time."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from make_corpus import FAULTS, GROUP_SIZES, SCHEMA, Corpus

SCRIPT = Path(__file__).resolve().parents[3] / "jobs" / "make_corpus.py"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "in"
    faults = Corpus(5000, seed=3, fault_share=0.02, file_rows=2000).write(folder)
    return folder, faults


def test_rows_are_numbered_through_all_files(corpus):
    folder, _ = corpus
    assert [pq.read_metadata(file).num_rows for file in sorted(folder.iterdir())] == [2000, 2000, 1000]
    table = pq.read_table(folder)
    assert table.schema.equals(SCHEMA)
    assert table["row"].to_pylist() == list(range(5000))


def test_faults_are_as_many_as_told_and_are_what_they_say(corpus):
    folder, told = corpus
    rows = pq.read_table(folder).to_pylist()
    assert Counter(row["fault"] for row in rows) == told
    assert set(told) == {"", *FAULTS}
    for row in rows:
        is_as_told = {
            "": row["output"] and "<|" not in row["output"],
            "null": row["output"] is None,
            "empty": row["output"] == "",
            "spoof": "<|reward|>" in (row["output"] or ""),
            "long": len((row["output"] or "").split()) > 10_000,
        }
        assert is_as_told[row["fault"]], row["fault"]


def test_groups_share_prompt_and_reference_and_have_the_sizes_of_the_table(corpus):
    folder, _ = corpus
    groups = Counter()
    texts = {}
    for row in pq.read_table(folder).to_pylist():
        groups[row["group"]] += 1
        assert texts.setdefault(row["group"], (row["prompt"], row["reference"])) == (row["prompt"], row["reference"])
    assert len(set(texts.values())) == len(groups)
    assert sum(size not in GROUP_SIZES for size in groups.values()) <= 3, "only the last of each file may be cut"
    assert {1, 8, 64} <= set(groups.values())


def test_lengths_are_skewed(corpus):
    folder, _ = corpus
    words = sorted(len(text.split()) for text in pq.read_table(folder)["reference"].to_pylist())
    assert 18 < words[len(words) // 2] < 32
    assert words[len(words) * 99 // 100] > 3 * words[len(words) // 2]


def test_the_same_settings_make_the_same_files_and_a_larger_corpus_begins_with_them(corpus, tmp_path):
    folder, _ = corpus
    Corpus(7000, seed=3, fault_share=0.02, file_rows=2000).write(tmp_path / "larger")
    for name in ("00000.parquet", "00001.parquet"):
        assert (tmp_path / "larger" / name).read_bytes() == (folder / name).read_bytes()
    Corpus(2000, seed=4, fault_share=0.02, file_rows=2000).write(tmp_path / "other")
    assert (tmp_path / "other" / "00000.parquet").read_bytes() != (folder / "00000.parquet").read_bytes()


def test_the_command_tells_the_faults_and_refuses_a_folder_that_is_there(tmp_path):
    command = [sys.executable, str(SCRIPT), "--rows", "1000", "--output", str(tmp_path / "in")]
    told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert told["rows"] == 1000
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2
    assert "already" in again.stderr
    assert sorted(path.name for path in (tmp_path / "in").iterdir()) == ["00000.parquet"]
