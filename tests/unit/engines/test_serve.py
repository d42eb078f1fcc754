"""A running endpoint as an engine: one receipt, typed failures, and no row blamed for a dead endpoint."""

import numpy as np
import pytest

from polar_ray import Scorer, Triple
from polar_ray.client import RewardClient
from polar_ray.config import EngineConfig, LimitsConfig, ScoreConfig, validate
from polar_ray.corpus.run import Pool, plan_pool
from polar_ray.encoding.encode import Encoder
from polar_ray.encoding.tokenizer import PolarTokenizer
from polar_ray.engines import serve
from polar_ray.engines.build import resolve_engine
from polar_ray.engines.serve import ServeEngine
from polar_ray.errors import (
    CheckpointError,
    ConfigError,
    EngineError,
    EngineUnavailable,
    NotFound,
    ReceiptMismatch,
    RequestInvalid,
    RequestTooLarge,
    Unauthorized,
)
from polar_ray.model.locate import EMBEDDED_FOLDER
from polar_ray.planning import Batch
from polar_ray.receipts import build_receipt
from tests.support.endpoint import model_of, running_endpoint, serve_config
from tests.support.engines import FaultyEngine, contains
from tests.support.scripted_server import error_answer, rewards_reply, scripted_server
from tests.support.tokenizers import make_polar_tokenizer_folder

TORCH = {"kind": "torch", "device": "cpu", "dtype": "float32"}
PROMPT = "Explain in one paragraph why the sky is blue, for a child of ten who likes to know how things work."


def triples(*outputs):
    return [Triple(PROMPT, "Air scatters blue light more than red light.", output) for output in outputs]


def scorer_of(address, **changes):
    return Scorer.open(engine=EngineConfig(kind="serve", address=address, **changes))


def test_rewards_and_receipt_are_those_of_the_same_engine_here(small_tokenizer):
    local = EngineConfig(**TORCH)
    with running_endpoint(serve_config(engine=TORCH)) as address:
        remote = resolve_engine(EngineConfig(kind="serve", address=address), EMBEDDED_FOLDER, has_gpu=True)
        assert (remote.device, remote.dtype, remote.gpus, remote.threads) == ("cpu", "float32", 0, 1)
        limits = LimitsConfig(max_tokens=1000)
        assert build_receipt(EMBEDDED_FOLDER, small_tokenizer, remote, limits) == build_receipt(
            EMBEDDED_FOLDER, small_tokenizer, local, limits
        )
        given = triples("Light scatters.", "Magic.", "", "It <|reward|>reflects.")
        with scorer_of(address) as there, Scorer.open(engine=local) as here:
            rows, expected = there.score(given), here.score(given)
    assert [row.status for row in rows] == [row.status for row in expected]
    assert [row.removed_control_tokens for row in rows] == [row.removed_control_tokens for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert row.reward == pytest.approx(other.reward, abs=1e-5)


@pytest.mark.parametrize(("fault", "status"), [("raise", "engine_failed"), ("nan", "reward_not_finite")])
def test_the_row_at_fault_is_found_through_the_endpoint(small_tokenizer, fault, status):
    config = serve_config()
    model = model_of(FaultyEngine(fault, contains(small_tokenizer, "POISON")), config)
    with running_endpoint(config, model) as address, scorer_of(address) as scorer:
        rows = scorer.score(triples("a", "POISON", "b"))
    assert [row.status for row in rows] == ["ok", status, "ok"]


def test_an_endpoint_that_is_gone_is_nobodys_fault(monkeypatch):
    monkeypatch.setattr(serve, "DEADLINE_S", 0.5)
    with running_endpoint() as address:
        scorer = scorer_of(address)
    with scorer, pytest.raises(EngineUnavailable, match="does not answer"):
        scorer.score(triples("a", "b"))


def test_no_endpoint_at_the_start_is_said_before_anything_is_scored(monkeypatch):
    monkeypatch.setattr(serve, "CONNECT_S", 0.3)
    with pytest.raises(EngineUnavailable, match="nobody answers"):
        scorer_of("127.0.0.1:9")


def test_another_tokenizer_is_refused(tmp_path):
    folder = make_polar_tokenizer_folder(tmp_path)
    with running_endpoint() as address, pytest.raises(CheckpointError, match="tokenizer is not this model's"):
        resolve_engine(EngineConfig(kind="serve", address=address), folder, has_gpu=False)


@pytest.mark.parametrize("changes", [{"dtype": "bfloat16"}, {"device": "cuda"}, {"rope_base": "sglang-static"}])
def test_settings_that_the_endpoint_does_not_have_are_refused(changes):
    (name,) = changes
    with running_endpoint() as address, pytest.raises(ConfigError, match=f"engine.{name} = .*the endpoint has"):
        scorer_of(address, **changes)


def test_an_endpoint_that_takes_shorter_rows_than_the_job_sends_is_refused():
    with running_endpoint(serve_config(limits={"max_tokens": 100})) as address:
        engine = EngineConfig(kind="serve", address=address)
        with pytest.raises(ConfigError, match=r"limits\.max_tokens = 16384: the endpoint takes 100 at most"):
            Scorer.open(engine=engine)
        with Scorer.open(engine=engine, limits=LimitsConfig(max_tokens=100)) as scorer:
            assert scorer.score(triples("Light scatters."))[0].is_ok


def test_what_a_job_began_with_is_pinned(monkeypatch):
    with running_endpoint() as address:
        monkeypatch.setenv("POLAR_RAY_ADDRESS", address)
        resolved = resolve_engine(EngineConfig(kind="serve"), EMBEDDED_FOLDER, has_gpu=False)
        assert resolved.address == address
        assert len(resolved.expect_receipt) == 64
        with Scorer.open(engine=resolved) as scorer:
            assert scorer.score(triples("a"))[0].is_ok
        other = resolved.model_copy(update={"expect_receipt": "0" * 64})
        with pytest.raises(ReceiptMismatch, match="expected an endpoint of receipt 0000"):
            Scorer.open(engine=other)


def test_one_actor_asks_an_endpoint_unless_told_otherwise():
    engine = EngineConfig(kind="serve", device="cuda", threads=1)
    nodes = [{"CPU": 64, "GPU": 8}] * 4
    assert plan_pool(ScoreConfig(engine=engine), 1000, nodes) == Pool(1, 1, 1, 0)
    assert plan_pool(ScoreConfig(engine=engine, actors="2:6"), 1000, nodes) == Pool(2, 6, 1, 0)


@pytest.mark.parametrize("engine", [{"address": "host:1"}, {"kind": "serve", "address": "x:token@host:1"}])
def test_an_address_in_the_wrong_place_or_with_a_token_in_it_is_refused(engine):
    with pytest.raises(ConfigError, match="engine"):
        validate(EngineConfig, engine, source="test")


def test_a_changed_receipt_ends_the_job():
    ids = np.array(PolarTokenizer(EMBEDDED_FOLDER).encode(["text"])[0], dtype=np.int32)
    batch = Batch.unshared([ids])
    with scripted_server(rewards_reply([1.0], "r1"), rewards_reply([1.0], "r2")) as script:
        engine = ServeEngine(RewardClient(script.address, expect_receipt="r1"), token_budget=100)
        assert engine.score(batch).tolist() == [1.0]
        with pytest.raises(ReceiptMismatch):
            engine.score(batch)
        engine.close()
        with pytest.raises(EngineError, match="closed"):
            engine.score(batch)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ((200, {"Content-Type": "text/html"}, b"<html>We are back soon.</html>"), EngineUnavailable),
        (error_answer(502, "engine_protocol"), EngineUnavailable),
        (error_answer(401, "unauthorized"), Unauthorized),
        (error_answer(400, "request_invalid"), RequestInvalid),
        (error_answer(413, "request_too_large"), RequestTooLarge),
        ((404, {}, b"nginx"), NotFound),
    ],
    ids=["page", "protocol", "401", "400", "413", "404"],
)
def test_what_is_wrong_with_the_endpoint_or_the_call_is_put_down_to_no_row(small_tokenizer, answer, kind):
    with scripted_server(answer) as script:
        engine = ServeEngine(RewardClient(script.address, deadline_s=5), token_budget=1000)
        scorer = Scorer(Encoder(small_tokenizer, LimitsConfig()), engine)
        with scorer, pytest.raises(kind) as raised:
            scorer.score(triples("a", "b"))
    assert type(raised.value) is kind
