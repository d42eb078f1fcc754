"""From files as people have them to what is compared with what; and what is said about files that do not fit."""

import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polar_ray.config import EvaluateConfig, PairColumnsConfig, load_config
from polar_ray.errors import ConfigError, InputError, SchemaError, TripleError
from polar_ray.evaluation.inputs import MOST_VALUES, chunks, read_sample
from tests.support.comparisons import fake, pair, triple

FORMATS = ["rows.jsonl", "rows.parquet"]


def compared(sample):
    """(better, worse) of every pair, as texts."""
    texts = [row if isinstance(row, TripleError) else row.output for row in sample.rows]
    return [(texts[high], texts[low]) for high, low in zip(sample.better, sample.worse, strict=True)]


@pytest.mark.parametrize("name", FORMATS)
def test_pairs_are_told_by_their_columns(write, name):
    sample = read_sample([write([pair(0), pair(1, prompt="prompt 0")], name)], fake())
    assert sample.layout == "pairs"
    assert compared(sample) == [("chosen 0", "rejected 0"), ("chosen 1", "rejected 1")]
    assert len(set(sample.group_of.tolist())) == 1, "pairs of one prompt are drawn together"
    assert sample.shared_of[0] == sample.shared_of[1] != sample.shared_of[2], "the references differ"


@pytest.mark.parametrize("name", FORMATS)
def test_triples_of_a_group_with_different_labels_make_pairs(write, name):
    rows = [
        triple(0, "a", True),
        triple(0, "b", False),
        triple(1, "c", False),
        triple(0, "d", True),
        triple(1, "e", True),
    ]
    sample = read_sample([write(rows, name)], fake())
    assert sample.layout == "triples"
    assert sample.has_two_labels
    assert sorted(compared(sample)) == [("a", "b"), ("d", "b"), ("e", "c")]


def test_a_group_column_says_what_belongs_together(write):
    rows = [triple(0, "a", 3, group="x"), triple(1, "b", 1, group="x"), triple(0, "c", 2, group="y")]
    assert compared(read_sample([write(rows)], fake())) == [("a", "b")]
    numbered = write([{**row, "question": place // 2} for place, row in enumerate(rows)], "other.jsonl")
    assert compared(read_sample([numbered], fake(columns={"group": "question"}))) == [("a", "b")]
    pairs = write([pair(0, group=7), pair(1, group=7), pair(2)], "pairs.jsonl")
    assert len(set(read_sample([pairs], fake()).group_of.tolist())) == 2


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=2, max_size=12))
def test_every_two_labels_of_a_group_that_differ_make_one_pair(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(triple(group, f"{n}", label)) + "\n" for n, (group, label) in enumerate(rows)))
    expected = [
        (f"{high}", f"{low}")
        for high, (group, better) in enumerate(rows)
        for low, (other, worse) in enumerate(rows)
        if group == other and better > worse
    ]
    try:
        found = compared(read_sample([str(path)], fake()))
    except InputError:
        assert not expected
    else:
        assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("name", FORMATS)
def test_several_rejected_outputs_are_a_pair_each(write, name):
    rows = [pair(0, rejected=["x", "y", "z"]), pair(1, rejected=["w"])]
    sample = read_sample([write(rows, name)], fake())
    assert compared(sample) == [("chosen 0", "x"), ("chosen 0", "y"), ("chosen 0", "z"), ("chosen 1", "w")]
    assert sample.place_of[sample.worse].tolist() == [0, 1, 2, 0]
    assert sample.row_of[sample.better].tolist() == [0, 0, 0, 1]


def test_chosen_may_be_several_as_well(write):
    sample = read_sample([write([pair(0, chosen=["a", "b"], rejected=["x", "y"])])], fake())
    assert compared(sample) == [("a", "x"), ("a", "y"), ("b", "x"), ("b", "y")]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("as_json", [False, True], ids=["lists", "JSON text"])
def test_conversations_are_one_output_and_lists_of_them_are_several(write, name, as_json):
    def chat(text):
        messages = [{"role": "assistant", "content": text}, {"role": "assistant", "content": "end"}]
        return json.dumps(messages) if as_json else messages

    sample = read_sample([write([pair(0, chosen=chat("c"), rejected=[chat("x"), chat("y")])], name)], fake())
    assert [[message["content"] for message in row.output] for row in sample.rows] == [
        ["c", "end"],
        ["x", "end"],
        ["y", "end"],
    ]


def test_rewardbench_is_read_by_mapping_its_columns(write):
    rows = [{"question": "p", "ground_truth": "r", "chosen": ["c"], "rejected": ["x", "y", "z"], "subset": "Math"}]
    columns = {"prompt": "question", "reference": "ground_truth"}
    sample = read_sample([write(rows, "rb.parquet")], fake(columns=columns, by=["subset"]))
    assert compared(sample) == [("c", "x"), ("c", "y"), ("c", "z")]
    assert sample.values == {"subset": ["Math"] * 4}


def test_a_row_that_cannot_be_scored_stays_with_its_reason(write):
    rows = [pair(0), "no json\n", pair(1, reference=None), pair(2, rejected=[]), pair(3, chosen=5)]
    sample = read_sample([write(rows)], fake())
    errors = [row for row in sample.rows if isinstance(row, TripleError)]
    assert sample.input_rows == len(sample.better) == 5
    assert [error.code for error in errors] == ["row_unreadable"] * 2 + ["triple_invalid"] * 4
    assert "rejected: an empty list" in str(errors[4])
    assert "chosen: expected a string or a list of messages, found int" in str(errors[5])


def test_labels_may_be_booleans_numbers_or_missing(write):
    rows = [
        triple(0, "a", 1.5),
        triple(0, "b", None),
        triple(0, "c", 1),
        triple(0, "d", float("nan")),
        triple(0, "e", 0),
    ]
    sample = read_sample([write(rows, "rows.parquet", schema=None)], fake())
    assert sample.unlabelled_rows == 2
    assert sorted(compared(sample)) == [("a", "c"), ("a", "e"), ("c", "e")]
    assert not sample.has_two_labels


def test_a_label_that_is_no_number_is_an_error_of_its_row(write):
    sample = read_sample([write([triple(0, "a", 1), triple(0, "b", 0), triple(0, "c", "good")])], fake())
    assert isinstance(sample.rows[2], TripleError)
    assert "label: expected a boolean or a number, found str 'good'" in str(sample.rows[2])
    assert compared(sample) == [("a", "b")]
    assert sample.has_two_labels


def test_files_are_read_together_and_each_row_knows_its_own(write, tmp_path):
    write([pair(0)], "a.parquet")
    write([pair(1), pair(2)], "b.jsonl")
    sample = read_sample([str(tmp_path)], fake())
    names = [sample.inputs[file].rpartition("/")[2] for file in sample.file_of]
    assert list(zip(names, sample.row_of.tolist(), strict=True))[::2] == [
        ("a.parquet", 0),
        ("b.jsonl", 0),
        ("b.jsonl", 1),
    ]


WRONG = {
    "no reference": (
        [pair(0)],
        {"columns": {"reference": "gold"}},
        "no column 'gold'.*--reference-column ground_truth",
    ),
    "rewardbench": (
        [{"prompt": "p", "chosen": "c", "rejected": "x"}],
        {},
        r"without a reference POLAR has nothing to compare.*It has prompt, chosen, rejected\..*--reference-column",
    ),
    "no prompt": (
        [pair(0)],
        {"columns": {"prompt": "question"}},
        "no column 'question' for the prompt.*--prompt-column",
    ),
    "no layout": ([{"prompt": "p", "reference": "r", "text": "t"}], {}, "neither pairs.*nor triples.*--chosen-column"),
    "no label": ([{"prompt": "p", "reference": "r", "output": "o"}], {}, "no column 'label'.*--label-column"),
    "both layouts": ([pair(0, output="o", label=1)], {}, "choose with --layout"),
    "forced": ([pair(0)], {"layout": "triples"}, "no column 'output' for the output.*--output-column"),
    "no by": ([pair(0)], {"by": ["source"]}, "no column 'source' to tell apart by.*--by"),
    "no group": ([pair(0)], {"columns": {"group": "question"}}, "no column 'question' for the group.*--group-column"),
    "numbers": ([pair(0, chosen=3)], {}, "'chosen' is int64; the chosen must be strings.*or lists of these"),
    "text labels": ([triple(0, "o", "good")], {}, "'label' is string; the label must be booleans, or numbers"),
}


@pytest.mark.parametrize(("rows", "changes", "said"), WRONG.values(), ids=WRONG)
def test_columns_that_do_not_fit_are_named_with_the_remedy(write, rows, changes, said):
    with pytest.raises(SchemaError, match=said):
        read_sample([write(rows, "rows.parquet")], fake(**changes))


NOTHING = {
    "one label": ([triple(0, "a", True), triple(1, "b", True)], {}, "every label is 1, so no output is better"),
    "null labels": ([triple(0, "a", None)], {}, "no row has a label"),
    "apart": ([triple(0, "a", 1), triple(1, "b", 2), triple(2, "c", 3)], {}, "nothing to compare.*--group-column"),
    "values": ([pair(n, id=n) for n in range(MOST_VALUES + 1)], {"by": ["id"]}, "--by id: 65 different values"),
}


@pytest.mark.parametrize(("rows", "changes", "said"), NOTHING.values(), ids=NOTHING)
def test_what_would_give_no_figures_is_refused_before_anything_is_scored(write, rows, changes, said):
    with pytest.raises(InputError, match=said):
        read_sample([write(rows)], fake(**changes))


def test_a_group_too_large_to_compare_is_refused_at_once(write):
    rows = [triple(0, f"{place}", place % 2) for place in range(6400)]
    with pytest.raises(InputError, match=r"20,476,800 pairs within groups.*--group-column"):
        read_sample([write(rows)], fake())


def test_files_that_are_absent_empty_or_broken_are_named(write, tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_sample([str(tmp_path / "absent")], fake())
    with pytest.raises(InputError, match="nothing to evaluate"):
        read_sample([write([])], fake())
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"broken\.parquet: cannot be read"):
        read_sample([str(tmp_path / "broken.parquet")], fake())


def test_two_columns_of_one_name_are_refused(tmp_path):
    import pyarrow.parquet as pq

    text = pa.array(["t"])
    table = pa.Table.from_arrays([text] * 5, ["prompt", "reference", "chosen", "rejected", "chosen"])
    pq.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(SchemaError, match="several columns are called 'chosen'"):
        read_sample([str(tmp_path)], fake())


@pytest.mark.parametrize("kind", [EvaluateConfig, PairColumnsConfig], ids=lambda kind: kind.__name__)
def test_a_column_has_one_meaning(kind):
    assignment = "columns.reference=chosen" if kind is EvaluateConfig else "reference=chosen"
    with pytest.raises(ConfigError, match="column 'chosen' is named for two things"):
        load_config(kind, None, [assignment])


@settings(deadline=None)
@given(st.lists(st.integers(0, 8), min_size=1, max_size=60), st.integers(1, 10))
def test_chunks_hold_every_output_once_and_never_part_what_shares(tmp_path_factory, shared, size):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(pair(number)) + "\n" for number in shared))
    sample = read_sample([str(path)], fake())
    found = list(chunks(sample, size))
    assert sorted(np.concatenate(found).tolist()) == list(range(len(sample.rows)))
    owners = [set(sample.shared_of[places].tolist()) for places in found]
    assert sum(map(len, owners)) == len(set().union(*owners)), "one prompt and reference in two chunks"
    assert all(len(places) >= size for places in found[:-1])
