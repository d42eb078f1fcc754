"""Pairs on disk: each row of the input has its place, and what is usable reads back as it was encoded."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from polar_ray.config import LimitsConfig, PairColumnsConfig, TrainConfig
from polar_ray.corpus.inputs import Contents, Slice, examine, list_inputs
from polar_ray.corpus.manifest import describe_files
from polar_ray.corpus.storage import Location
from polar_ray.encoding.encode import Encoder
from polar_ray.errors import InputError, OutputError, SchemaError
from polar_ray.training.pairs import SCHEMA, PairSlice, PairStore, count_statuses, encode_slice, write_pairs
from polar_ray.triples import PreferencePair, Triple

GOOD = {
    "prompt": "Which city is the capital of China, and how long has it been the capital?",
    "reference": "Beijing, for most of the last seven centuries.",
    "chosen": "Beijing.",
    "rejected": "Shanghai.",
}


def rows_with_every_problem() -> list[dict[str, object]]:
    return [
        GOOD,
        {**GOOD, "rejected": None},
        {**GOOD, "reference": ""},
        {**GOOD, "rejected": "Beijing."},
        {**GOOD, "wrapper": "none of these"},
        {**GOOD, "chosen": "Peking, as it was called. " * 60},
        {**GOOD, "chosen": "It is Beijing.", "wrapper": "pretrain"},
        {**GOOD, "chosen": [{"role": "assistant", "content": "Beijing."}]},
    ]


def part_of(file, part, schema=None) -> PairSlice:
    (described,) = describe_files(list_inputs([str(file)]), [Contents((part,), schema)])
    return PairSlice(described, part)


@pytest.fixture
def encoded(tmp_path, small_tokenizer):
    """The rows as JSON Lines, encoded, and the folder they came from."""
    config = TrainConfig(max_packed_tokens=400, columns=PairColumnsConfig())
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows_with_every_problem()))
    (contents,) = examine(list_inputs([str(file)]), config.columns, 100, will_write=False)
    encoder = Encoder(small_tokenizer, config.limits)
    return encode_slice(part_of(file, contents.slices[0], contents.schema), encoder, config, frozenset())


def test_every_row_has_its_place_and_says_what_is_wrong_with_it(encoded):
    assert encoded.schema == SCHEMA
    assert encoded["row"].to_pylist() == list(range(8))
    expected = [
        "ok",
        "triple_invalid",
        "triple_empty",
        "triple_invalid",
        "triple_invalid",
        "triple_too_long",
        "ok",
        "ok",
    ]
    assert encoded["status"].to_pylist() == expected
    details = encoded["detail"].to_pylist()
    assert details[1].startswith("rejected: expected a string")
    assert details[2].startswith("reference: no text")
    assert "same to the model" in details[3]
    assert details[4].startswith("wrapper: expected one of")
    assert "max_packed_tokens = 400" in details[5]
    assert count_statuses(encoded) == {"ok": 3, "triple_invalid": 3, "triple_empty": 1, "triple_too_long": 1}


def test_what_is_usable_reads_back_as_scoring_encodes_it(encoded, tmp_path, small_tokenizer):
    place = Location(str(tmp_path / "part-000000.arrow"))
    write_pairs(place, encoded)
    store = PairStore([place, place])
    assert len(store) == 6
    encoder = Encoder(small_tokenizer, LimitsConfig())
    triples = [
        Triple(GOOD["prompt"], GOOD["reference"], output, wrapper=wrapper)
        for output, wrapper in (("Beijing.", "sft"), ("It is Beijing.", "pretrain"), ("Beijing.", "sft"))
    ]
    expected = [encoder.encode(triple) for triple in triples]
    chosen, rejected = store.read([0, 1, 2, 5])
    for ids, triple in zip(chosen, [*expected, expected[2]], strict=True):
        assert np.array_equal(ids, triple.ids)
    sizes = store.sizes()
    assert sizes.chosen_tokens.tolist() == 2 * [len(triple.ids) for triple in expected]
    assert sizes.rejected_tokens.tolist()[0] == len(rejected[0])
    assert sizes.group[0] == sizes.group[2] != sizes.group[1]
    assert sizes.chosen[0] == sizes.chosen[2] != sizes.rejected[0]
    assert sizes.shared_tokens[0] == expected[0].shareable


def test_parquet_reads_like_json_lines(encoded, tmp_path, small_tokenizer):
    rows = [
        {**row, "chosen": row["chosen"] if isinstance(row["chosen"], str) else "Beijing."}
        for row in rows_with_every_problem()
    ]
    pq.write_table(pa.Table.from_pylist([{"wrapper": None, **row} for row in rows]), tmp_path / "pairs.parquet")
    part = part_of(tmp_path / "pairs.parquet", Slice(0, 8))
    config = TrainConfig(max_packed_tokens=400)
    assert encode_slice(part, Encoder(small_tokenizer, config.limits), config, frozenset()).equals(encoded)


def test_a_pair_that_is_too_long_for_the_limits_is_cut_and_counted(small_tokenizer, tmp_path):
    pq.write_table(
        pa.Table.from_pylist([{**GOOD, "rejected": "Shanghai or Nanjing. " * 40}]), tmp_path / "pairs.parquet"
    )
    config = TrainConfig(limits=LimitsConfig(max_response_tokens=50))
    part = part_of(tmp_path / "pairs.parquet", Slice(0, 1))
    table = encode_slice(part, Encoder(small_tokenizer, config.limits), config, frozenset())
    assert table["status"].to_pylist() == ["ok"]
    assert table["cut_tokens"].to_pylist()[0] > 50


def test_both_outputs_are_asked_with_the_same_prompt(small_tokenizer):
    """Where the prompt must be cut, it is cut to what the longer output leaves."""
    limits = LimitsConfig(max_tokens=120, max_response_tokens=40)
    pair = PreferencePair("one two three four five six " * 20, "seven", "eight", "nine ten eleven " * 10)
    ((chosen, rejected),) = Encoder(small_tokenizer, limits).encode_pairs([pair])
    assert chosen.shareable == rejected.shareable
    assert np.array_equal(chosen.ids[: chosen.shareable], rejected.ids[: rejected.shareable])
    alone = Encoder(small_tokenizer, limits).encode(Triple(pair.prompt, pair.reference, pair.chosen))
    assert alone.prompt_cut_tokens < chosen.prompt_cut_tokens == rejected.prompt_cut_tokens


def test_a_file_that_is_gone_or_broken_is_named(tmp_path):
    with pytest.raises(OutputError, match=r"absent\.arrow: cannot be read"):
        PairStore([Location(str(tmp_path / "absent.arrow"))])
    (tmp_path / "broken.arrow").write_bytes(b"no arrow")
    with pytest.raises(OutputError, match=r"broken\.arrow: cannot be read"):
        PairStore([Location(str(tmp_path / "broken.arrow"))])


def test_columns_that_are_not_there_are_named_before_anything_starts(tmp_path):
    pq.write_table(pa.Table.from_pylist([{**GOOD, "better": "x"}]).drop_columns(["chosen"]), tmp_path / "pairs.parquet")
    files = list_inputs([str(tmp_path / "pairs.parquet")])
    with pytest.raises(SchemaError, match=r"no column 'chosen' for the chosen.*--chosen-column"):
        examine(files, PairColumnsConfig(), 100, will_write=False)
    assert examine(files, PairColumnsConfig(chosen="better"), 100, will_write=False)


def test_an_input_that_vanished_or_changed_under_the_run_is_named(tmp_path, small_tokenizer):
    file = tmp_path / "pairs.parquet"
    pq.write_table(pa.Table.from_pylist([GOOD, GOOD]), file)
    part, encoder = part_of(file, Slice(0, 2)), Encoder(small_tokenizer, LimitsConfig())
    pq.write_table(pa.Table.from_pylist([GOOD]), file)
    with pytest.raises(InputError, match=r"pairs\.parquet, rows from 0: the file changed under the run"):
        encode_slice(part, encoder, TrainConfig(), frozenset())
    with pytest.raises(InputError, match=r"1 rows instead of 2"):
        encode_slice(part_of(file, Slice(0, 2)), encoder, TrainConfig(), frozenset())
    file.unlink()
    with pytest.raises(InputError, match=r"pairs\.parquet, rows from 0: cannot be read"):
        encode_slice(part, encoder, TrainConfig(), frozenset())
