"""An evaluation from file to figures, each found again from the rewards it wrote."""

import json
from contextlib import nullcontext

import numpy as np
import pyarrow.parquet as pq
import pytest

import polar_ray
from polar_ray import Scorer, Triple, evaluate
from polar_ray.corpus.progress import SilentProgress
from polar_ray.errors import CheckpointError, OutputError, ReceiptMismatch, TooManyFailures
from polar_ray.evaluation import run
from polar_ray.evaluation.measures import wins
from polar_ray.evaluation.result import Evaluation
from tests.support.comparisons import fake, pair, triple
from tests.support.endpoint import running_endpoint, serve_config


@pytest.fixture
def triples(write):
    """Graded and grouped: 30 prompts with five outputs each."""
    generator = np.random.default_rng(0)
    return [
        triple(number, f"{number} {place} " * 5, int(generator.integers(0, 4)))
        for number in range(30)
        for place in range(5)
    ]


def method(found, name="model"):
    return next(method for method in found.total.methods if method.name == name)


def rewards_of(folder):
    return pq.read_table(folder / "rewards.parquet").to_pandas()


def test_rewards_are_the_scorers_and_accuracy_is_their_order(write, tmp_path):
    rows = [pair(number) for number in range(40)]
    found = evaluate(write(rows), fake(), output=tmp_path / "out")
    with Scorer.open(engine=found.settings.engine) as scorer:
        scored = scorer.score(
            [Triple(r["prompt"], r["reference"], r[name]) for r in rows for name in ("chosen", "rejected")]
        )
    rewards = np.array([row.reward for row in scored], np.float32).reshape(-1, 2)
    written = rewards_of(tmp_path / "out")
    assert written["chosen_reward"].to_numpy() == pytest.approx(rewards[:, 0])
    assert written["rejected_reward"].to_numpy() == pytest.approx(rewards[:, 1])
    assert method(found).accuracy == pytest.approx((rewards[:, 0] > rewards[:, 1]).mean())
    assert method(found).mean_margin == pytest.approx((rewards[:, 0] - rewards[:, 1]).mean(), rel=1e-5)
    assert method(found).accuracy_interval.low < method(found).accuracy < method(found).accuracy_interval.high


def test_every_figure_of_pairs_can_be_found_again_from_the_rewards(write, tmp_path):
    rows = [pair(n, chosen="c " * (n % 7 + 1), rejected="r " * (n % 5 + 1), kind=f"k{n % 3}") for n in range(60)]
    found = evaluate(write(rows), fake(by=["kind"]), output=tmp_path)
    table = rewards_of(tmp_path)
    for block in [found.total, *found.by]:
        part = table if block.column is None else table[table["by_kind"] == block.value]
        assert block.pairs == len(part)
        own = wins(part["margin"].to_numpy())
        for one in block.methods:
            margins = part["margin" if one.name == "model" else f"{one.name}_margin"].to_numpy()
            assert one.accuracy == pytest.approx(wins(margins).mean())
            assert one.ties == (margins == 0).sum()
            assert one.mean_margin == pytest.approx(margins.mean())
            if one.name != "model":
                assert one.lead == pytest.approx((own - wins(margins)).mean())
    assert {block.value for block in found.by} == {"k0", "k1", "k2"}


def test_a_baseline_that_is_right_by_construction_is_right(write):
    rows = [pair(n, reference="x y z", chosen="x y z and more of it", rejected="q") for n in range(12)]
    found = evaluate(write(rows), fake())
    assert method(found, "longer").accuracy == 1
    assert method(found, "closer_length").accuracy == 0
    assert method(found, "tfidf").accuracy == 1
    assert method(found, "longer").accuracy_interval is None, "every resample says the same"


def test_figures_of_triples_can_be_found_again_from_the_rewards(write, triples, tmp_path):
    found = evaluate(write(triples), fake(), output=tmp_path)
    table = rewards_of(tmp_path)
    margins = [
        high.reward - low.reward
        for _, group in table.groupby("group")
        for high in group.itertuples()
        for low in group.itertuples()
        if high.label > low.label
    ]
    assert found.labels == "graded"
    assert found.total.pairs == len(margins)
    assert method(found).accuracy == pytest.approx(wins(np.array(margins)).mean())
    correlations = [
        group["reward"].corr(group["label"], method="spearman")
        for _, group in table.groupby("group")
        if group["label"].nunique() > 1
    ]
    assert method(found).spearman == pytest.approx(np.mean(correlations))
    assert [row.n for row in found.best_of] == [2, 4]
    means = table.groupby("group")["label"].mean()
    assert found.best_of[0].random == pytest.approx(means.mean())
    assert all(row.random < row.oracle for row in found.best_of)


def test_two_labels_have_an_auc_and_best_of_as_asked(write, triples, tmp_path):
    rows = [{**row, "label": row["label"] > 1} for row in triples]
    found = evaluate(write(rows), fake(best_of=[1, 5, 6]), output=tmp_path)
    table = rewards_of(tmp_path)
    good, bad = (table.loc[table["label"] == label, "reward"].to_numpy() for label in (1, 0))
    assert method(found).auc == pytest.approx((good[:, None] > bad[None, :]).mean())
    assert method(found).auc_interval.low < method(found).auc < method(found).auc_interval.high
    assert [row.n for row in found.best_of] == [1, 5], "no group has six outputs"
    first, all_of_them = found.best_of
    one_of_one = [first.random, first.oracle, *(at.value for at in first.methods.values())]
    assert one_of_one == pytest.approx([table["label"].mean()] * 6)
    picked = table.loc[table.groupby("group")["reward"].idxmax(), "label"]
    assert all_of_them.methods["model"].value == pytest.approx(picked.mean())
    assert all_of_them.oracle == pytest.approx(table.groupby("group")["label"].max().mean())


def test_two_labels_may_be_told_apart_without_a_single_pair(write):
    rows = [triple(number, f"{number}", number % 2) for number in range(20)]
    found = evaluate(write(rows), fake())
    assert found.total.pairs == 0
    assert method(found).accuracy is None
    assert 0 < method(found).auc < 1


def test_with_several_rejected_outputs_the_chosen_has_to_beat_them_all(write, tmp_path):
    rows = [pair(n, chosen=[f"c{n}", f"d{n}"], rejected=[f"x{n}", f"y{n}", f"z{n}"]) for n in range(60)]
    found = evaluate(write(rows), fake(), output=tmp_path)
    table = rewards_of(tmp_path)
    expected = table.groupby("row")["margin"].min() > 0
    assert found.total.pairs == 360
    assert method(found).beats_all == pytest.approx(expected.mean())
    assert 0 < expected.mean() < method(found).accuracy
    assert table.loc[table["row"] == 7, ["chosen_place", "rejected_place"]].to_numpy().tolist() == [
        [0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]
    ]  # fmt: skip
    assert method(evaluate(write([pair(0), pair(1)]), fake())).beats_all is None


def test_what_could_not_be_scored_is_counted_and_in_no_figure(write, tmp_path):
    rows = [*(pair(number) for number in range(20)), pair(20, chosen=None), pair(21, rejected=""), "no json\n"]
    found = evaluate(write(rows), fake(), output=tmp_path)
    assert found.input_rows == 23
    assert (found.total.pairs, found.total.unscored_pairs) == (20, 3)
    assert found.by_status == {"ok": 42, "triple_invalid": 1, "triple_empty": 1, "row_unreadable": 2}
    whole = evaluate(write(rows[:20], "whole.jsonl"), fake())
    assert method(found) == method(whole)
    statuses = rewards_of(tmp_path)[["chosen_status", "rejected_status", "margin"]].tail(3)
    assert statuses["chosen_status"].tolist() == ["triple_invalid", "ok", "row_unreadable"]
    assert statuses["rejected_status"].tolist() == ["ok", "triple_empty", "row_unreadable"]
    assert statuses["margin"].isna().all()


def test_a_row_with_an_output_that_failed_says_nothing_of_beating_all(write):
    rows = [pair(0, rejected=["x", ""]), pair(1, rejected=["x", "y"])]
    found = evaluate(write(rows), fake())
    assert (found.total.pairs, found.total.unscored_pairs) == (3, 1)
    assert method(found).beats_all in (0, 1)


def test_equal_outputs_are_ties_for_everything_and_said(write):
    rows = [pair(0, chosen="same", rejected="same"), pair(1)]
    found = evaluate(write(rows), fake())
    assert found.equal_pairs == 1
    assert all(one.ties >= 1 for one in found.total.methods)
    assert method(found).accuracy in (0.25, 0.75)


def test_nothing_scored_is_an_error_that_says_why(write):
    with pytest.raises(TooManyFailures, match=r"not one of 2 pairs could be scored \(4 triple_empty\)"):
        evaluate(write([pair(n, prompt="") for n in range(2)]), fake())


def test_the_same_command_gives_the_same_file_and_another_seed_other_intervals(write, tmp_path):
    path = write([pair(number) for number in range(50)])
    one, same, other = (evaluate(path, fake(seed=seed), output=tmp_path) for seed in (1, 1, 2))
    assert one.model_dump(exclude={"seconds"}) == same.model_dump(exclude={"seconds"})
    assert method(one).accuracy == method(other).accuracy
    assert method(one).accuracy_interval != method(other).accuracy_interval


def test_the_json_is_the_evaluation_with_its_receipt_and_settings(write, tmp_path):
    found = evaluate(write([pair(number) for number in range(9)]), fake(seed=11), output=tmp_path)
    content = (tmp_path / "evaluation.json").read_text()
    assert Evaluation.model_validate_json(content) == found
    plain = json.loads(content)
    assert plain["receipt_id"] == found.receipt_id
    assert plain["receipt"]["engine"] == "fake"
    assert plain["settings"]["seed"] == 11
    assert plain["settings"]["layout"] == "pairs"
    assert "NaN" not in content
    assert pq.read_schema(tmp_path / "rewards.parquet").metadata[b"polar_ray.receipt_id"].decode() == found.receipt_id
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "evaluation.json", "report.html", "rewards.parquet", "rows.jsonl"
    ]  # fmt: skip


def test_reliability_compares_how_sure_the_model_is_with_how_often_it_is_right(write, tmp_path):
    found = evaluate(write([pair(number) for number in range(400)]), fake(), output=tmp_path)
    margins = rewards_of(tmp_path)["margin"].to_numpy()
    sure, right = 1 / (1 + np.exp(-np.abs(margins))), margins > 0
    place = np.minimum((20 * (sure - 0.5)).astype(int), 9)
    gaps = [abs(right[place == at].mean() - sure[place == at].mean()) * (place == at).sum() for at in np.unique(place)]
    assert found.reliability.ece == pytest.approx(sum(gaps) / len(margins))
    assert [some.pairs for some in found.reliability.bins] == [int((place == at).sum()) for at in np.unique(place)]
    for bins in (found.reliability.bins, found.by_length, found.by_length_ratio):
        assert sum(some.pairs for some in bins) == 400
    assert sum(found.margin_bins.values()) == 400
    assert sum(count for at, count in found.margin_bins.items() if at < 0) == (margins < 0).sum()


def test_lengths_are_sorted_into_the_bins_that_are_named(write):
    lengths = [(1, 10), (6, 10), (10, 10), (10, 6), (10, 1), (7, 10), (10, 9)]
    rows = [pair(n, chosen="c" * long, rejected="r" * short) for n, (long, short) in enumerate(lengths)]
    found = evaluate(write(rows), fake())
    assert [(some.low, some.high, some.pairs) for some in found.by_length_ratio] == [
        (None, 0.25, 1),
        (0.5, 0.8, 2),
        (0.8, 1.25, 2),
        (1.25, 2.0, 1),
        (4.0, None, 1),
    ]


def test_outputs_of_one_prompt_are_scored_together_wherever_their_rows_lie(write):
    prompt = "a long prompt that is worth sharing, " * 10
    rows = [
        pair(n % 10, prompt=f"{prompt}{n % 10}", reference="r", chosen=f"c{n}", rejected=f"x{n}") for n in range(100)
    ]
    found = evaluate(write(rows), fake())
    assert found.computed_tokens < 0.3 * found.tokens


def test_outputs_that_several_pairs_name_are_computed_once(write):
    rows = [pair(0, chosen=f"c{n // 5}", rejected=f"x{n % 5}") for n in range(25)]
    many = evaluate(write(rows), fake())
    once = evaluate(write([pair(0, chosen=[f"c{n}" for n in range(5)], rejected=[f"x{n}" for n in range(5)])]), fake())
    assert many.computed_tokens == once.computed_tokens
    assert method(many).accuracy == method(once).accuracy


def test_progress_goes_to_the_last_row_over_chunks(write, monkeypatch):
    monkeypatch.setattr(run, "CHUNK_ROWS", 16)
    shown = []

    class Seen(SilentProgress):
        def scoring(self, rows, rows_before, actors):
            assert (rows, rows_before, actors) == (100, 0, 1)
            return nullcontext(lambda snapshot: shown.append(snapshot.rows))

    evaluate(write([pair(number) for number in range(50)]), fake(), progress=Seen())
    assert shown == sorted(shown)
    assert shown[-1] == 100
    assert len(set(shown)) > 5


def test_the_embedded_model_is_evaluated_by_default(write):
    found = polar_ray.evaluate(write([pair(number, chosen="yes", rejected="no") for number in range(4)]))
    assert found.model == "embedded"
    assert found.receipt["engine"] == "torch"
    assert found.receipt["weights_digest"]
    with Scorer.open() as scorer:
        (row,) = scorer.score([Triple("prompt 0", "reference 0", "yes")])
        (other,) = scorer.score([Triple("prompt 0", "reference 0", "no")])
    alone = evaluate(write([pair(0, chosen="yes", rejected="no")]))
    assert method(alone).mean_margin == pytest.approx(row.reward - other.reward, abs=1e-5)


def test_a_running_endpoint_gives_the_same_figures_and_its_receipt(write):
    path = write([pair(number) for number in range(20)])
    with running_endpoint(serve_config()) as address:
        served = evaluate(path, fake(engine={"kind": "serve", "address": address}))
        with pytest.raises(ReceiptMismatch):
            evaluate(path, fake(engine={"kind": "serve", "address": address, "expect_receipt": "another"}))
    local = evaluate(path, fake(engine={"kind": "fake", "device": "cpu", "dtype": "float32"}))
    assert served.total == local.total
    assert served.receipt_id == local.receipt_id


def test_what_is_wrong_is_found_before_the_model_is_loaded(write, tmp_path):
    path = write([pair(0)])
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be made a folder"):
        evaluate(path, fake(model="no/such/model/at/all"), output=tmp_path / "file")
    with pytest.raises(CheckpointError, match="no such folder"):
        evaluate(path, fake(model="no/such/model/at/all"))
