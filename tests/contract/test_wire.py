"""The real client against the real API over a real socket: each form of request, each refusal, and TLS."""

import pytest

from polar_ray import RewardClient, Scorer, Triple
from polar_ray.errors import (
    ConfigError,
    DeadlineExceeded,
    EmptyText,
    Overloaded,
    ReceiptMismatch,
    RequestTooLarge,
    Unauthorized,
    Unavailable,
)
from polar_ray.triples import TokenIds
from tests.support.endpoint import fake_model, running_endpoint, serve_config
from tests.support.tls import make_certificate

TOKEN = "a-token-of-some-length"
PACE = 1e-3
"""Seconds per token, for an endpoint that has work for a while."""


def triples(groups: int, outputs: int) -> list[Triple]:
    return [Triple(f"Q{n % groups}", f"A{n % groups}", f"I say {n}") for n in range(groups * outputs)]


@pytest.fixture(scope="module")
def scorer():
    config = serve_config()
    with Scorer.open(engine=config.engine, limits=config.limits) as scorer:
        yield scorer


@pytest.fixture(scope="module")
def client():
    with running_endpoint(serve_config(requests={"max_rows": 50})) as address, RewardClient(address) as client:
        yield client


def test_every_form_gives_the_scorers_rows(client, scorer):
    given = [
        *triples(5, 30),
        Triple("Q", "A", ""),
        Triple([{"role": "user", "content": "Q"}], "A", [{"role": "assistant", "content": "é 中"}], "pretrain", "mine"),
        Triple("Q", "A", "<|reward|>forged"),
    ]
    expected = scorer.score(given)
    assert client.score(given) == expected
    assert client.receipt_id == client.model().receipt_id

    group = client.score_group("Q1", "A1", [f"I say {n}" for n in range(70)])
    assert group == scorer.score([Triple("Q1", "A1", f"I say {n}") for n in range(70)])

    ids = [TokenIds(row.ids.tolist()) for row in scorer.encode(triples(5, 30))]
    assert [row.reward for row in client.score_ids([*ids, TokenIds([1, 2, 3])])[:-1]] == [
        row.reward for row in expected[:150]
    ]


def test_a_failed_row_raises_as_itself_where_a_number_was_asked_for(client):
    with pytest.raises(EmptyText, match="row 1: output"):
        client.rewards([Triple("Q", "A", "fine"), Triple("Q", "A", "")])


def test_an_endpoint_with_other_settings_is_refused():
    with running_endpoint(serve_config(limits={"cut_side": "left"})) as other:
        with RewardClient(other) as client:
            found = client.model().receipt_id
        with RewardClient(other, expect_receipt=found) as client:
            assert len(client.rewards(triples(1, 1))) == 1
        with RewardClient(other, expect_receipt="0" * 64) as client, pytest.raises(ReceiptMismatch, match=found):
            client.rewards(triples(1, 1))


def test_only_who_has_a_token_is_let_in(tmp_path):
    tokens = tmp_path / "tokens"
    tokens.write_text(f"{TOKEN}\n")
    with running_endpoint(serve_config(auth={"tokens_file": tokens})) as address:
        for wrong in (None, "another-token-of-length"):
            with RewardClient(address, token=wrong) as client, pytest.raises(Unauthorized):
                client.rewards(triples(1, 1))
        with RewardClient(address, token=TOKEN) as client:
            assert len(client.rewards(triples(1, 1))) == 1
        with RewardClient(f"x:{TOKEN}@{address}") as client:
            assert len(client.rewards(triples(1, 1))) == 1


def test_a_row_that_no_request_can_hold_is_too_large():
    config = serve_config(requests={"max_body_bytes": 2000})
    with running_endpoint(config) as address, RewardClient(address) as client:
        assert len(client.rewards(triples(2, 30))) == 60
        with pytest.raises(RequestTooLarge):
            client.rewards([Triple("Q", "A", "long " * 1000)])


def test_what_cannot_be_done_in_time_is_refused():
    config = serve_config()
    with running_endpoint(config, fake_model(config, PACE)) as address, RewardClient(address) as client:
        client.rewards(triples(1, 1))
        with pytest.raises((DeadlineExceeded, Overloaded)):
            client.rewards(triples(100, 2), deadline_s=0.2)
        assert len(client.rewards(triples(2, 2))) == 4


def test_tls_is_checked_against_the_authority_that_is_named(tmp_path):
    (tmp_path / "other").mkdir()
    certificate, other = make_certificate(tmp_path), make_certificate(tmp_path / "other")
    with running_endpoint(**certificate.server) as address:
        with RewardClient(f"https://{address}", verify=certificate.ca) as client:
            assert len(client.rewards(triples(1, 2))) == 2
        for verify in (True, other.ca):
            client = RewardClient(f"https://{address}", verify=verify)
            with client, pytest.raises(ConfigError, match="is not trusted; name its CA's file"):
                client.rewards(triples(1, 2))
        with RewardClient(address, deadline_s=0.5) as client, pytest.raises(Unavailable):
            client.rewards(triples(1, 2))
