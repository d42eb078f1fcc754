"""Corpus jobs on a real cluster: what goes in comes out, with rewards, once."""

import json
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from polar_ray import Scorer, Triple, score_parquet
from polar_ray.config import EngineConfig, ScoreConfig
from polar_ray.corpus.progress import SilentProgress
from polar_ray.errors import (
    CheckpointError,
    EngineError,
    EngineStartError,
    JobStalled,
    ManifestConflict,
    OutputError,
    ProcessCrashed,
    SchemaError,
    TooManyFailures,
)
from tests.ray.conftest import make_table, read_scored
from tests.support.engines import deadly_scorer, faulty_scorer
from tests.support.scrape import job_label, total, wait_for
from tests.support.slow_job import open_slow_scorer

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]

FAKE = ScoreConfig.model_validate({"engine": {"kind": "fake"}, "unit_rows": 16, "actors": 2})


def fake(**changes):
    return FAKE.model_copy(update=changes)


@pytest.fixture
def corpus(tmp_path):
    """Three files, 72 rows."""
    folder = tmp_path / "in"
    folder.mkdir()
    for part in range(3):
        pq.write_table(make_table(6, first=100 * part), folder / f"{part}.parquet", row_group_size=7)
    return folder


class StagesSeen(SilentProgress):
    """Keeps what the start of an engine was busy with."""

    def __init__(self):
        self.seen = []

    @contextmanager
    def scoring(self, rows, rows_before, actors):
        yield lambda snapshot: self.seen.append(snapshot.stage)


def test_the_torch_engine_scores_a_folder_as_the_scorer_scores_its_rows(corpus, tmp_path):
    engine, stages = EngineConfig(deterministic=True), StagesSeen()
    config = ScoreConfig(engine=engine, unit_rows=16, actors=2)
    summary = score_parquet(corpus, tmp_path / "out", config, progress=stages)
    assert any(stage.startswith(("loading torch", "holding torch to float32 of the weights")) for stage in stages.seen)
    source, scored = pq.read_table(corpus), read_scored(tmp_path / "out")
    assert scored.select(source.column_names).equals(source)
    assert scored.schema.field("reward").type == pa.float32()
    assert scored["reward_status"].unique().to_pylist() == ["ok"]
    with Scorer.open(engine=engine) as scorer:
        triples = [Triple(row["prompt"], row["reference"], row["output"]) for row in source.to_pylist()]
        expected = scorer.score(triples)
    assert scored["reward"].to_pylist() == [row.reward for row in expected]
    assert scored["reward_tokens"].to_pylist() == [row.tokens for row in expected]
    assert summary.rows == summary.ok == 72
    assert summary.computed_tokens < 0.7 * summary.tokens
    assert (tmp_path / "out" / "_polar_ray" / "report.html").is_file()


def test_every_file_carries_the_receipt(corpus, tmp_path):
    summary = score_parquet(corpus, tmp_path / "out", FAKE)
    for file in (tmp_path / "out").glob("*.parquet"):
        metadata = pq.read_schema(file).metadata
        assert metadata[b"polar_ray.receipt_id"].decode() == summary.receipt_id
        assert json.loads(metadata[b"polar_ray.receipt"])["encoding_version"] == 1
    settings = json.loads((tmp_path / "out" / "_polar_ray" / "settings.json").read_text())
    assert settings["engine"]["device"] == "cpu"


def test_a_finished_job_is_left_alone(corpus, tmp_path):
    first = score_parquet(corpus, tmp_path / "out", FAKE)
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*") if file.is_file()}
    second = score_parquet(corpus, tmp_path / "out", FAKE)
    assert second.resumed_units == second.units == first.units
    assert first.model_dump(include={"rows", "tokens"}) == second.model_dump(include={"rows", "tokens"})
    assert times == {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*") if file.is_file()}


def test_only_what_is_missing_is_done_again(corpus, tmp_path):
    score_parquet(corpus, tmp_path / "out", FAKE)
    before = read_scored(tmp_path / "out")
    files = sorted((tmp_path / "out").glob("part-*.parquet"))
    files[1].unlink()
    kept = files[0].stat().st_mtime_ns
    summary = score_parquet(corpus, tmp_path / "out", FAKE)
    assert summary.resumed_units == summary.units - 1
    assert files[0].stat().st_mtime_ns == kept
    assert read_scored(tmp_path / "out").equals(before)


def test_another_job_is_refused_with_the_difference_named(corpus, tmp_path):
    score_parquet(corpus, tmp_path / "out", FAKE)
    shorter = FAKE.limits.model_copy(update={"max_tokens": 99})
    with pytest.raises(ManifestConflict, match="max_tokens: was 16384, is 99"):
        score_parquet(corpus, tmp_path / "out", fake(limits=shorter))
    with pytest.raises(ManifestConflict, match="engine: was 'fake', is 'torch'"):
        score_parquet(corpus, tmp_path / "out", ScoreConfig(unit_rows=16))
    pq.write_table(make_table(6, first=500), corpus / "1.parquet")
    with pytest.raises(ManifestConflict, match=r"1\.parquet: had \d+ bytes, has \d+|was modified"):
        score_parquet(corpus, tmp_path / "out", FAKE)
    assert score_parquet(corpus, tmp_path / "out", FAKE, fresh=True).resumed_units == 0


def test_bad_rows_keep_their_place_and_leave_their_neighbours_alone(tmp_path):
    good = make_table(4).select(["prompt", "reference", "output"])
    rows = good.to_pylist()
    spoiled = [dict(row) for row in rows]
    spoiled[1]["output"] = None
    spoiled[5]["reference"] = ""
    spoiled[9]["output"] = "words " * 3000
    limits = FAKE.limits.model_copy(update={"on_too_long": "error", "max_response_tokens": 256})
    config = fake(limits=limits, max_failed_fraction=0.5)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "good.parquet")
    pq.write_table(pa.Table.from_pylist(spoiled), tmp_path / "spoiled.parquet")
    score_parquet(tmp_path / "good.parquet", tmp_path / "a", config)
    summary = score_parquet(tmp_path / "spoiled.parquet", tmp_path / "b", config)
    expected, scored = read_scored(tmp_path / "a").to_pylist(), read_scored(tmp_path / "b").to_pylist()
    failures = {1: "triple_invalid", 5: "triple_empty", 9: "triple_too_long"}
    for place, (was, now) in enumerate(zip(expected, scored, strict=True)):
        assert now["reward_status"] == failures.get(place, "ok")
        assert now["reward"] == (None if place in failures else was["reward"])
        assert (now["reward_detail"] is not None) == (place in failures)
    assert summary.by_status == {"ok": 13, "triple_invalid": 1, "triple_empty": 1, "triple_too_long": 1}


def test_too_many_failures_fail_the_job_and_say_which(tmp_path):
    rows = make_table(4).to_pylist()
    for row in rows[::2]:
        row["output"] = ""
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    with pytest.raises(TooManyFailures, match="8 of"):
        score_parquet(tmp_path / "in.parquet", tmp_path / "out", FAKE)


def test_a_row_that_kills_its_process_is_found_and_quarantined(tmp_path):
    rows = make_table(5).to_pylist()
    rows[13]["output"] = "This one is POISON to the engine."
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    config = fake(unit_rows=20, max_failed_fraction=0.1)
    summary = score_parquet(
        tmp_path / "in.parquet",
        tmp_path / "out",
        config,
        build_scorer=lambda config: faulty_scorer("die", "POISON", config),
    )
    scored = read_scored(tmp_path / "out").to_pylist()
    assert summary.by_status == {"ok": 19, "process_crashed": 1}
    assert scored[13]["reward_status"] == "process_crashed"
    job = job_label(tmp_path / "out")
    samples = wait_for(lambda found: total(found, "polar_ray_quarantined_rows_total", job_id=job) == 1)
    deaths = total(samples, "polar_ray_process_deaths_total", job_id=job)
    assert total(samples, "polar_ray_units_repeated_total", job_id=job) == deaths >= 4
    assert total(samples, "polar_ray_engines_started_total", job_id=job) == deaths + 1
    assert [row["row"] for row in scored] == list(range(20))


def test_a_row_that_kills_its_process_while_it_is_prepared_is_not_taken_for_one_of_the_unit_before(tmp_path):
    """With one actor, tasks of twenty units are of two, and every second unit is prepared during the one before."""
    rows = make_table(5).to_pylist()
    rows[13]["output"] = "This one is POISON to the encoder."
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    config = fake(unit_rows=1, actors=1, max_failed_fraction=0.1)
    score_parquet(
        tmp_path / "in.parquet", tmp_path / "out", config, build_scorer=lambda config: deadly_scorer("POISON", config)
    )
    scored = read_scored(tmp_path / "out").to_pylist()
    assert [row["row"] for row in scored if row["reward_status"] != "ok"] == [13]
    assert scored[13]["reward_status"] == "process_crashed"
    job = job_label(tmp_path / "out")
    samples = wait_for(lambda found: total(found, "polar_ray_quarantined_rows_total", job_id=job) == 1)
    assert total(samples, "polar_ray_process_deaths_total", job_id=job) in (2, 3)


def test_an_engine_that_fails_everywhere_fails_the_job_and_writes_nothing(corpus, tmp_path):
    with pytest.raises(EngineError, match="in fresh processes as well; the first failure: a kernel failed"):
        score_parquet(corpus, tmp_path / "out", FAKE, build_scorer=lambda config: faulty_scorer("raise", "", config))
    assert not list((tmp_path / "out").glob("*.parquet"))


def test_an_engine_that_cannot_start_is_a_typed_error(corpus, tmp_path):
    def broken(config):
        raise CheckpointError("model.layers.3.attention.wqkv.weight is missing")

    with pytest.raises(CheckpointError, match="wqkv"):
        score_parquet(corpus, tmp_path / "out", FAKE, build_scorer=broken)


def test_an_engine_whose_processes_die_at_the_start_does_not_loop_for_ever(corpus, tmp_path):
    def dying(config):
        raise ProcessCrashed("a rank was killed while it loaded, and took this process with it")

    with pytest.raises(EngineStartError, match="out of memory"):
        score_parquet(corpus, tmp_path / "out", FAKE, build_scorer=dying)


def test_a_job_that_stands_still_says_what_is_stuck(corpus, tmp_path):
    config = fake(no_progress_timeout_s=6, actors=1)
    with pytest.raises(JobStalled, match=r"unit \d+ \(.*parquet rows \d+-\d+\) for \d+ s"):
        score_parquet(corpus, tmp_path / "out", config, build_scorer=lambda config: open_slow_scorer(config, 30))


def test_faults_in_the_input_are_found_before_anything_is_written(corpus, tmp_path):
    with pytest.raises(SchemaError, match="no column 'answer' for the output"):
        score_parquet(corpus, tmp_path / "out", fake(columns=FAKE.columns.model_copy(update={"output": "answer"})))
    with pytest.raises(OutputError, match=r"the input .* lies in it"):
        score_parquet(corpus, corpus, FAKE)
    with pytest.raises(CheckpointError, match="no such folder"):
        score_parquet(corpus, tmp_path / "out", fake(model="/nowhere"))
    assert not (tmp_path / "out").exists()


def test_jsonl_hive_folders_and_message_lists_are_scored_alike(tmp_path):
    rows = make_table(2).to_pylist()
    for language in ("en", "zh"):
        folder = tmp_path / "in" / f"language={language}"
        folder.mkdir(parents=True)
        with (folder / "rows.jsonl").open("w") as file:
            for row in rows:
                messages = [{"role": "user", "content": row["prompt"]}]
                file.write(
                    json.dumps({"prompt": messages, "reference": row["reference"], "output": row["output"]}) + "\n"
                )
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "plain.parquet")
    score_parquet(tmp_path / "in", tmp_path / "hive", FAKE)
    score_parquet(tmp_path / "plain.parquet", tmp_path / "plain", FAKE)
    scored = read_scored(tmp_path / "hive")
    assert scored["language"].to_pylist() == ["en"] * 8 + ["zh"] * 8
    assert scored["reward"].to_pylist() == read_scored(tmp_path / "plain")["reward"].to_pylist() * 2


def test_an_engine_that_fails_on_some_rows_and_works_on_others_costs_those_rows_only(tmp_path):
    rows = make_table(4).to_pylist()
    for row in rows[:9]:
        row["output"] = "POISON to the engine."
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    summary = score_parquet(
        tmp_path / "in.parquet",
        tmp_path / "out",
        fake(max_failed_fraction=0.9),
        build_scorer=lambda config: faulty_scorer("raise", "POISON", config),
    )
    assert summary.by_status == {"engine_failed": 9, "ok": 7}


def test_fresh_keeps_the_earlier_job_until_the_new_one_can_start(corpus, tmp_path):
    score_parquet(corpus, tmp_path / "out", FAKE)
    kept = sorted(file.name for file in (tmp_path / "out").rglob("*"))
    columns = FAKE.columns.model_copy(update={"output": "answer"})
    with pytest.raises(SchemaError):
        score_parquet(corpus, tmp_path / "out", fake(columns=columns), fresh=True)
    with pytest.raises(CheckpointError):
        score_parquet(corpus, tmp_path / "out", fake(model="/nowhere"), fresh=True)
    assert sorted(file.name for file in (tmp_path / "out").rglob("*")) == kept


def test_an_output_within_the_input_folder_is_no_input_the_next_time(corpus):
    first = score_parquet(corpus, corpus / "scored", FAKE)
    again = score_parquet(corpus, corpus / "scored", FAKE)
    fresh = score_parquet(corpus, corpus / "scored", FAKE, fresh=True)
    assert first.rows == again.rows == fresh.rows == 72
    assert again.resumed_units == again.units


def test_jsonl_files_of_one_job_share_a_schema(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    row = {"prompt": "p", "reference": "r", "output": "o"}
    (folder / "a.jsonl").write_text(json.dumps(row | {"note": None}) + "\nnot json\n")
    (folder / "b.jsonl").write_text(json.dumps(row | {"note": "text", "n": 1}) + "\n")
    (folder / "c.jsonl").write_text(json.dumps(row | {"note": {"deep": 2}, "n": 1.5}) + "\n")
    score_parquet(folder, tmp_path / "out", fake(max_failed_fraction=0.5))
    scored = read_scored(tmp_path / "out").to_pylist()
    assert [row["note"] for row in scored] == [None, None, "text", '{"deep": 2}']
    assert [row["n"] for row in scored] == [None, None, 1.0, 1.5]
    assert [row["reward_status"] for row in scored] == ["ok", "row_unreadable", "ok", "ok"]
