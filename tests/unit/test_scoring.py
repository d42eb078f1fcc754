"""The scorer: order, duplicates, and a failing row that never takes its neighbours with it."""

import threading
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from polar_ray.config import EngineConfig, LimitsConfig
from polar_ray.encoding.encode import EncodedTriple, Encoder
from polar_ray.engines.fake import FakeEngine
from polar_ray.errors import TripleError
from polar_ray.model.checkpoint import read_config
from polar_ray.model.cost import flops_of_batches
from polar_ray.model.locate import EMBEDDED_FOLDER
from polar_ray.planning import plan
from polar_ray.scoring import Arithmetic, Scorer, parts_of
from polar_ray.triples import Scored, Triple
from tests.support.engines import FaultyEngine, contains

PROMPT = "Explain in one paragraph why the sky is blue, for a child of ten who likes to know how things work."
OUTPUTS = ["Because air scatters blue light most.", "Because of the sea.", "POISON in here.", "It reflects space."]


def triples(outputs=OUTPUTS):
    return [
        Triple(PROMPT, "Air scatters blue light more than red light.", output, id=str(n))
        for n, output in enumerate(outputs)
    ]


@pytest.fixture
def scorer(small_tokenizer):
    with Scorer(Encoder(small_tokenizer, LimitsConfig()), FakeEngine(token_budget=4096)) as scorer:
        yield scorer


def faulty(tokenizer, fault):
    engine = FaultyEngine(fault, contains(tokenizer, "POISON"))
    return Scorer(Encoder(tokenizer, LimitsConfig()), engine), engine


def test_rewards_come_back_in_order_with_their_ids(scorer):
    together = scorer.score(triples())
    alone = [scorer.score([triple])[0] for triple in triples()]
    assert together == alone
    assert [row.id for row in together] == ["0", "1", "2", "3"]
    assert len({row.reward for row in together}) == 4


def test_nothing_in_nothing_out(scorer):
    assert scorer.score([]) == []


def test_identical_triples_are_computed_once_and_answered_each(scorer):
    rows = scorer.score(triples([*OUTPUTS, OUTPUTS[0], OUTPUTS[0]]))
    assert rows[0].reward == rows[4].reward == rows[5].reward
    assert scorer.usage.duplicates == 2
    assert scorer.usage.rows == 6
    assert scorer.usage.tokens == sum(row.tokens for row in rows)
    assert scorer.usage.computed_tokens < scorer.usage.tokens / 2


def test_an_error_in_place_of_a_triple_becomes_its_rows_status(scorer):
    rows = scorer.score([triples()[0], TripleError("output: found null"), triples()[1]])
    assert [row.status for row in rows] == ["ok", "triple_invalid", "ok"]
    assert rows[1] == Scored(None, "triple_invalid", "output: found null")


def test_a_row_that_cannot_be_encoded_keeps_its_place(scorer):
    rows = scorer.score([Triple("p", "r", ""), triples()[0]])
    assert [row.status for row in rows] == ["triple_empty", "ok"]
    assert rows[1].reward == scorer.score(triples()[:1])[0].reward


@pytest.mark.parametrize(
    ("fault", "status"), [("raise", "engine_failed"), ("nan", "reward_not_finite"), ("short", "engine_protocol")]
)
def test_the_row_at_fault_is_found_and_its_neighbours_keep_their_rewards(small_tokenizer, scorer, fault, status):
    expected = [row.reward for row in scorer.score(triples())]
    broken, _ = faulty(small_tokenizer, fault)
    rows = broken.score(triples())
    assert [row.status for row in rows] == ["ok", "ok", status, "ok"]
    assert [row.reward for row in rows] == [*expected[:2], None, expected[3]]
    assert rows[2].detail
    assert rows[2].tokens > 0


def test_a_fault_among_many_costs_few_calls(small_tokenizer):
    broken, engine = faulty(small_tokenizer, "raise")
    rows = broken.score(triples([f"answer number {n}" for n in range(63)] + ["POISON"]))
    assert sum(row.is_ok for row in rows) == 63
    assert len(engine.calls) <= 2 * 7 + 1


def test_a_nan_that_only_neighbours_cause_is_cured_by_scoring_alone(small_tokenizer, scorer):
    class Contagious(FakeEngine):
        def score(self, batch):
            rewards = super().score(batch)
            return rewards if batch.is_single else np.full_like(rewards, np.nan)

    rows = Scorer(Encoder(small_tokenizer, LimitsConfig()), Contagious(token_budget=4096)).score(triples())
    assert [row.reward for row in rows] == [row.reward for row in scorer.score(triples())]


def test_on_batch_is_called_as_work_is_done(small_tokenizer):
    seen = []
    scorer = Scorer(Encoder(small_tokenizer, LimitsConfig()), FakeEngine(token_budget=64))
    scorer.score(triples(), lambda: seen.append(scorer.usage.rows))
    assert seen == sorted(seen)
    assert seen[-1] == 4
    assert len(seen) > 1


def test_a_long_list_is_encoded_while_the_engine_computes_and_comes_back_in_order(small_tokenizer):
    """Shuffled, with rows that cannot be encoded among them: groups are computed together all the same."""
    rows = [Triple(f"question {n % 300}", f"answer {n % 300}", f"{n}", id=f"{n}") for n in range(1500)]
    rows[7], rows[900] = Triple("", "", "", id="7"), TripleError("unreadable")
    np.random.default_rng(0).shuffle(rows)
    encoded_at_call, encoded = [], [0]

    class Watching(FakeEngine):
        def score(self, batch):
            encoded_at_call.append(encoded[0])
            return super().score(batch)

    encoder = Encoder(small_tokenizer, LimitsConfig())
    scorer = Scorer(encoder, Watching(token_budget=100_000, seconds_per_token=1e-5))
    encode = scorer.encode

    def counted(part):
        encoded[0] += len(part)
        return encode(part)

    scorer.encode = counted
    scored = scorer.score(rows)
    expected = scorer.compute([row for row in encode(rows) if isinstance(row, EncodedTriple)])
    assert [row.reward for row in scored if row.is_ok] == [outcome.reward for outcome in expected]
    assert [row.id for row in scored] == [getattr(row, "id", None) for row in rows]
    assert [row.status for row in scored].count("ok") == 1498
    assert encoded_at_call[0] < 1500
    parts = list(parts_of(rows))
    assert sorted(place for part in parts for place in part) == list(range(1500))
    assert [len(part) for part in parts[:3]] == pytest.approx([128, 256, 512], abs=5)
    groups = [
        {(rows[place].prompt, rows[place].reference) for place in part if isinstance(rows[place], Triple)}
        for part in parts
    ]
    assert sum(map(len, groups)) == len(set.union(*groups))


def test_rows_that_are_prepared_meanwhile_are_scored_as_any_others(scorer):
    expected = [scorer.score(rows) for rows in (triples(), triples(OUTPUTS[:2]), [])]
    prepared = [scorer.prepare(rows) for rows in (triples(), triples(OUTPUTS[:2]), [])]
    assert [scorer.score(rows) for rows in prepared] == expected


def test_once_cancelled_no_part_is_encoded(small_tokenizer):
    """The part under way is waited for, so that nothing is at work afterwards."""
    encoded, may_go_on = [], threading.Event()

    class Waiting(Encoder):
        def encode_rows(self, rows):
            may_go_on.wait(10)
            encoded.append(len(rows))
            return super().encode_rows(rows)

    with Scorer(Waiting(small_tokenizer, LimitsConfig()), FakeEngine()) as scorer:
        prepared = scorer.prepare([Triple(f"question {n}", "answer", "output") for n in range(1000)])
        threading.Timer(0.2, may_go_on.set).start()
        prepared.cancel()
        assert 0 < sum(encoded) < 300
        before = list(encoded)
        assert scorer.score(triples())[0].is_ok
        assert encoded == [*before, len(OUTPUTS)]


def test_operations_are_counted_where_the_peak_is_known(small_tokenizer):
    shape = read_config(EMBEDDED_FOLDER)
    encoder = Encoder(small_tokenizer, LimitsConfig())
    triples = [Triple("What is the capital of China?", "Beijing.", output) for output in ("Beijing.", "Shanghai.")]
    counting = Scorer(encoder, FakeEngine(token_budget=64), arithmetic=Arithmetic(shape, peak_flops_per_s=1e12))
    counting.score(triples)
    usage = counting.usage
    planned = plan([row.ids for row in counting.encode(triples)], token_budget=64)
    assert usage.flops == flops_of_batches(shape, planned.batches)
    assert usage.peak_flops == pytest.approx(1e12 * usage.engine_seconds)
    assert (usage.engine_calls, usage.budget_tokens) == (len(planned.batches), 64 * len(planned.batches))
    silent = Scorer(encoder, FakeEngine(token_budget=64))
    silent.score(triples)
    assert silent.usage.flops == silent.usage.peak_flops == 0


def test_the_embedded_model_scores_with_the_torch_engine():
    with Scorer.open() as scorer:
        shared = scorer.score(triples())
    with Scorer.open(engine=EngineConfig(share_prefixes=False)) as scorer:
        alone = [scorer.score([triple])[0] for triple in triples()]
    assert all(row.is_ok for row in shared)
    assert np.allclose([row.reward for row in shared], [row.reward for row in alone], atol=1e-4)


def test_most_of_gsm8k_is_shared(small_tokenizer):
    data = Path(__file__).parents[3] / "shared" / "data" / "gsm8k_triples.parquet"
    if not data.is_file():
        pytest.skip("GSM8K triples are not beside this checkout (../shared/data/gsm8k_triples.parquet)")
    columns = pq.read_table(data, columns=["prompt", "reference", "output"]).to_pylist()
    scorer = Scorer(Encoder(small_tokenizer, LimitsConfig()), FakeEngine(token_budget=4096))
    assert all(row.is_ok for row in scorer.score([Triple(**row) for row in columns]))
    assert scorer.usage.computed_tokens <= 0.55 * scorer.usage.tokens
    assert scorer.usage.duplicates == 6
