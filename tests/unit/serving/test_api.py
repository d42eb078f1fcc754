"""The native routes over ASGI: rewards as the Scorer gives them, and every refusal in one shape."""

import asyncio
import io
import json
import logging
import re
import time
from dataclasses import replace

import httpx
import pyarrow as pa
import pytest

from polar_ray import Scorer, Triple
from polar_ray.config import EngineConfig
from polar_ray.errors import error_kinds
from polar_ray.wire import ARROW_MEDIA_TYPE, ARROW_REPLY_KEY, RECEIPT_HEADER, ErrorReply, ModelsReply, RewardsReply
from tests.support.endpoint import api_client, fake_model, model_of, serve_config
from tests.support.engines import FaultyEngine, contains

PROMPT, REFERENCE = "Explain in one paragraph why the sky is blue, for a child of ten.", "Air scatters blue light most."
OUTPUTS = ["Because air scatters blue light.", "Because of the sea.", "It reflects <|reward|>space.", "Magic."]
TOKEN = "a-token-of-some-length"
CAPITAL = {"prompt": "What is the capital of China?", "reference": "Beijing.", "outputs": ["Beijing.", "Shanghai."]}


def with_api(test, config=None, model=None):
    """Run `test(client, service)` against an API in this process."""

    async def run():
        async with api_client(config, model) as (client, service):
            return await test(client, service)

    return asyncio.run(run())


def error_of(response) -> tuple[int, str]:
    """Status and code of a refusal, whose shape is checked on the way."""
    error = ErrorReply.model_validate_json(response.content).error
    assert response.headers["content-type"] == "application/json"
    assert "Traceback" not in error.message
    assert error.retryable is error_kinds()[error.code].retryable
    return response.status_code, error.code


@pytest.fixture
def log():
    """What the endpoint logs, with tracebacks if it logs any."""
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    logger = logging.getLogger("polar_ray.serving")
    logger.addHandler(handler)
    yield written
    logger.removeHandler(handler)


@pytest.fixture(scope="module")
def expected():
    with Scorer.open(engine=EngineConfig(device="cpu", dtype="float32")) as scorer:
        return scorer.score([Triple(PROMPT, REFERENCE, output) for output in OUTPUTS])


@pytest.mark.parametrize("form", ["group", "triples", "ids", "arrow", "arrow ids"])
def test_every_form_gives_the_scorers_rewards(expected, form):
    triples = [{"prompt": PROMPT, "reference": REFERENCE, "output": output, "id": output[:3]} for output in OUTPUTS]

    async def test(client, service):
        scorer = service.model.scorer
        ids = [row.ids.tolist() for row in scorer.encode([Triple(PROMPT, REFERENCE, output) for output in OUTPUTS])]
        bodies = {
            "group": {"prompt": PROMPT, "reference": REFERENCE, "outputs": OUTPUTS},
            "triples": {"triples": triples},
            "ids": {"ids": ids},
        }
        if form in bodies:
            return await client.post("/v1/rewards", json=bodies[form])
        table = pa.Table.from_pylist(triples) if form == "arrow" else pa.table({"ids": ids})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        headers = {"Content-Type": ARROW_MEDIA_TYPE, "Accept": "application/json"}
        return await client.post("/v1/rewards?priority=bulk", content=sink.getvalue().to_pybytes(), headers=headers)

    response = with_api(test, serve_config(engine={"kind": "torch", "device": "cpu", "dtype": "float32"}))
    reply = RewardsReply.model_validate_json(response.content)
    assert [row.index for row in reply.rewards] == [0, 1, 2, 3]
    assert [row.reward for row in reply.rewards] == pytest.approx([row.reward for row in expected], abs=1e-5)
    assert [row.tokens for row in reply.rewards] == [row.tokens for row in expected]
    assert reply.usage.tokens == sum(row.tokens for row in expected)
    assert reply.usage.computed_tokens < 0.6 * reply.usage.tokens
    assert response.headers[RECEIPT_HEADER] == reply.receipt_id
    if form in ("group", "triples", "arrow"):
        assert [row.removed_control_tokens for row in reply.rewards] == [0, 0, 1, 0]
    if form in ("triples", "arrow"):
        assert [row.id for row in reply.rewards] == [output[:3] for output in OUTPUTS]
    assert reply.timings.total_s >= reply.timings.engine_s > 0


def test_arrow_in_arrow_out():
    async def test(client, service):
        table = pa.table({"prompt": [PROMPT] * 2, "reference": [REFERENCE] * 2, "output": ["a", None]})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        response = await client.post(
            "/v1/rewards", content=sink.getvalue().to_pybytes(), headers={"Content-Type": ARROW_MEDIA_TYPE}
        )
        assert response.headers["content-type"] == ARROW_MEDIA_TYPE
        table = pa.ipc.open_stream(response.content).read_all()
        assert table.column("status").to_pylist() == ["ok", "triple_invalid"]
        assert json.loads(table.schema.metadata[ARROW_REPLY_KEY])["receipt_id"] == service.receipt_id

    with_api(test)


def test_a_bad_row_says_so_on_itself_and_leaves_its_neighbours_alone():
    async def test(client, service):
        rows = [
            {"prompt": "P", "reference": "R", "output": "O"},
            {"prompt": "P", "reference": "R"},
            {"prompt": "P", "reference": "R", "output": ""},
            {"prompt": "P", "reference": "R", "output": 3},
            {"prompt": "P", "reference": "R", "output": "O", "wraper": "sft"},
            {"prompt": "P", "reference": "R", "output": "O", "wrapper": "other"},
        ]
        response = await client.post("/v1/rewards", json={"triples": rows})
        return RewardsReply.model_validate_json(response.content).rewards

    rows = with_api(test)
    assert [row.status for row in rows] == ["ok", "triple_invalid", "triple_empty", *["triple_invalid"] * 3]
    assert [row.reward is None for row in rows] == [False, *[True] * 5]
    assert "unknown field 'wraper'" in rows[4].detail


@pytest.mark.parametrize(
    ("fault", "status"), [("raise", "engine_failed"), ("nan", "reward_not_finite"), ("short", "engine_protocol")]
)
def test_an_engine_that_fails_on_a_row_is_that_rows_affair(small_tokenizer, fault, status):
    config = serve_config()
    model = model_of(FaultyEngine(fault, contains(small_tokenizer, "POISON")), config)

    async def test(client, service):
        response = await client.post("/v1/rewards", json={**CAPITAL, "outputs": ["a", "POISON", "b"]})
        assert (await client.get("/healthz")).status_code == 200
        return RewardsReply.model_validate_json(response.content).rewards

    assert [row.status for row in with_api(test, config, model)] == ["ok", status, "ok"]


@pytest.mark.parametrize("fault", ["raise", "crash", "nan", "short"])
def test_an_engine_that_fails_on_everything_makes_the_replica_unhealthy_and_no_row_is_blamed(fault):
    config = serve_config()
    engine = FaultyEngine(fault, lambda ids: True)

    async def test(client, service):
        response = await client.post("/v1/rewards", json=CAPITAL)
        assert error_of(response) == (503, "engine_unavailable")
        assert error_of(await client.get("/healthz")) == (503, "unavailable")

    with_api(test, config, model_of(engine, config))


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "Invalid JSON"),
        (b"[1]", "JSON object|object"),
        (b"\xff\xfe", "Invalid JSON"),
        (b'{"triples": []', "Invalid JSON"),
        (b"{}", "exactly one of triples, outputs and ids, found none"),
        (b'{"triples": [], "ids": []}', "found triples and ids"),
        (b'{"triples": [], "prompt": "P"}', "prompt belongs to a group"),
        (b'{"triples": [], "deadline": 3}', "deadline: Extra inputs"),
        (b'{"triples": [], "deadline_s": 0}', "deadline_s"),
        (b'{"triples": [], "priority": "urgent"}', "priority"),
        (b'{"triples": ["text"]}', "triples.0"),
        (b'{"ids": [["a"]]}', "ids.0.0"),
    ],
)
def test_a_malformed_request_is_refused_with_the_place(body, says):
    async def test(client, service):
        response = await client.post("/v1/rewards", content=body)
        assert error_of(response) == (400, "request_invalid")
        return response.json()["error"]["message"]

    assert re.search(says, with_api(test))


def test_nobodys_text_is_quoted_in_a_refusal():
    async def test(client, service):
        response = await client.post("/v1/rewards", json={"triples": "a very private text", "priority": "my secret"})
        assert error_of(response) == (400, "request_invalid")
        assert "private" not in response.text
        assert "secret" not in response.text

    with_api(test)


def test_a_body_of_too_many_bytes_or_rows_is_refused():
    async def test(client, service):
        group = {"prompt": "P", "reference": "R"}
        assert error_of(await client.post("/v1/rewards", json={**group, "outputs": ["o"] * 11})) == (
            413,
            "request_too_large",
        )
        long = await client.post("/v1/rewards", json={**group, "outputs": ["o" * 5000]})
        assert error_of(long) == (413, "request_too_large")

        async def unannounced():
            for _ in range(100):
                yield b" " * 1000

        assert error_of(await client.post("/v1/rewards", content=unannounced())) == (413, "request_too_large")

    with_api(test, serve_config(requests={"max_rows": 10, "max_body_bytes": 4000}))


def test_rows_are_counted_before_any_is_looked_at(monkeypatch):
    def look(self):
        raise AssertionError("rows were made")

    monkeypatch.setattr("polar_ray.wire.RewardsRequest.rows", look)

    async def test(client, service):
        for body in ({"triples": [{}] * 11}, {"ids": [[1]] * 11}, {**CAPITAL, "outputs": ["o"] * 11}):
            assert error_of(await client.post("/v1/rewards", json=body)) == (413, "request_too_large")

    with_api(test, serve_config(requests={"max_rows": 10}))


@pytest.mark.parametrize("field", ["prompt", "reference", "output"])
def test_a_text_that_would_hold_everybody_up_is_its_own_rows_error(field):
    async def test(client, service):
        whole = {"prompt": "P", "reference": "R", "output": "O"}
        long = {**whole, field: [{"role": "user", "content": "a" * 60}, {"role": "user", "content": "b" * 60}]}
        response = await client.post("/v1/rewards", json={"triples": [whole, long]})
        return RewardsReply.model_validate_json(response.content).rewards

    first, second = with_api(test, serve_config(requests={"max_text_characters": 100}))
    assert (first.status, second.status) == ("ok", "triple_too_long")
    assert second.detail == f"{field}: 120 characters, and requests.max_text_characters = 100; shorten it"


@pytest.fixture
def slow_encoder(monkeypatch):
    """Encodes one row at a time, ten milliseconds each; the number of rows it was given."""
    monkeypatch.setattr("polar_ray.serving.service.ENCODING_TOKENS", 1)
    encode, given = Scorer.encode, []

    def slowly(self, rows):
        given.extend(rows)
        time.sleep(0.01)
        return encode(self, rows)

    monkeypatch.setattr(Scorer, "encode", slowly)
    return given


def test_a_small_call_is_encoded_between_the_rows_of_large_ones(slow_encoder):
    async def test(client, service):
        outputs = [f"output {n}" for n in range(100)]
        large = [asyncio.create_task(client.post("/v1/rewards", json={**CAPITAL, "outputs": outputs})) for _ in "abc"]
        while len(slow_encoder) < 5:
            await asyncio.sleep(0.001)
        await client.post("/v1/rewards", json=CAPITAL)
        assert not any(task.done() for task in large)
        replies = await asyncio.gather(*large)
        assert [len(reply.json()["rewards"]) for reply in replies] == [100] * 3

    with_api(test)


def test_a_call_that_nobody_waits_for_is_not_encoded_to_its_end(slow_encoder):
    async def test(client, service):
        body = {**CAPITAL, "outputs": ["o"] * 500, "deadline_s": 0.05}
        assert error_of(await client.post("/v1/rewards", json=body)) == (504, "deadline_exceeded")
        assert service.pending_tokens == 0
        assert (await client.post("/v1/rewards", json=CAPITAL)).status_code == 200

    with_api(test)
    assert len(slow_encoder) < 50


@pytest.mark.parametrize("outputs", [1, 5000])
def test_a_service_that_is_closed_is_unavailable(outputs):
    async def test(client, service):
        asked = asyncio.create_task(client.post("/v1/rewards", json={**CAPITAL, "outputs": ["an output"] * 5000}))
        await asyncio.sleep(0.01)
        await service.close()
        assert error_of(await asked) == (503, "unavailable")
        late = await client.post("/v1/rewards", json={**CAPITAL, "outputs": ["an output of some length"] * outputs})
        assert error_of(late) == (503, "unavailable")

    config = serve_config()
    with_api(test, config, fake_model(config, seconds_per_token=0.001))


def test_a_compressed_body_is_refused():
    async def test(client, service):
        response = await client.post("/v1/rewards", content=b"x", headers={"Content-Encoding": "gzip"})
        assert error_of(response) == (400, "request_invalid")

    with_api(test)


def test_a_body_that_never_comes_is_not_waited_for(monkeypatch):
    monkeypatch.setattr("polar_ray.serving.exchange.BODY_TIMEOUT_S", 0.05)

    async def test(client, service):
        async def dribble():
            yield b"{"
            await asyncio.sleep(5)

        response = await client.post("/v1/rewards", content=dribble())
        assert error_of(response) == (400, "request_invalid")

    with_api(test)


def test_an_unexpected_receipt_is_refused_before_anything_is_computed():
    async def test(client, service):
        response = await client.post("/v1/rewards", json={**CAPITAL, "expect_receipt": "0" * 64})
        assert error_of(response) == (409, "receipt_mismatch")
        assert response.json()["error"]["details"]["receipt_id"] == service.receipt_id
        assert service.model.scorer.usage.rows == 0
        response = await client.post("/v1/rewards", json={**CAPITAL, "expect_receipt": service.receipt_id})
        assert response.status_code == 200

    config = serve_config()
    with_api(test, config, fake_model(config))


def test_a_full_queue_says_when_to_come_back():
    config = serve_config(queue={"max_queued_tokens": 50})

    async def test(client, service):
        large = {**CAPITAL, "outputs": ["o", "p" * 400]}
        first = asyncio.create_task(client.post("/v1/rewards", json=large))
        while service.pending_tokens < 50:
            await asyncio.sleep(0.001)
        response = await client.post("/v1/rewards", json=large)
        assert error_of(response) == (429, "overloaded")
        assert int(response.headers["Retry-After"]) >= 1
        assert (await first).status_code == 200
        assert (await client.post("/v1/rewards", json=CAPITAL)).status_code == 200

    with_api(test, config, fake_model(config, seconds_per_token=0.001))


def test_a_short_deadline_is_a_typed_refusal_and_no_late_work():
    config = serve_config()

    async def test(client, service):
        busy = asyncio.create_task(client.post("/v1/rewards", json=CAPITAL))
        while service._batcher.computing_since is None:
            await asyncio.sleep(0.001)
        late = await client.post("/v1/rewards", json={**CAPITAL, "prompt": "Another question?", "deadline_s": 0.02})
        assert error_of(late) in [(504, "deadline_exceeded"), (429, "overloaded")]
        assert (await busy).status_code == 200
        assert service.model.scorer.usage.rows == 2
        assert service.pending_tokens == 0

    with_api(test, config, fake_model(config, seconds_per_token=0.002))


def test_a_handler_that_is_cancelled_tells_of_a_caller_who_has_gone():
    """Which is how Ray's proxy may say it, instead of ending the connection's messages."""
    config = serve_config()

    async def test(client, service):
        asked = asyncio.create_task(client.post("/v1/rewards", json=CAPITAL))
        while service._batcher.computing_since is None:
            await asyncio.sleep(0.001)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        told = (await client.get("/metrics")).text
        assert 'polar_ray_dropped_requests_total{replica="local"} 1.0' in told
        assert 'polar_ray_requests_total{code="caller_gone",replica="local",route="/v1/rewards"} 1.0' in told
        assert 'code="ok",replica="local",route="/v1/rewards"' not in told

    with_api(test, config, fake_model(config, seconds_per_token=0.002))


def test_a_caller_that_hangs_up_leaves_no_work_behind():
    """At the level of ASGI: the connection's end comes while the rows still wait."""
    config = serve_config()

    async def test(client, service):
        busy = asyncio.create_task(client.post("/v1/rewards", json=CAPITAL))
        while service._batcher.computing_since is None:
            await asyncio.sleep(0.001)
        body = json.dumps({**CAPITAL, "prompt": "Another question?"}).encode()
        messages = [{"type": "http.request", "body": body, "more_body": False}, {"type": "http.disconnect"}]

        async def receive():
            await asyncio.sleep(0.01)
            return messages.pop(0)

        sent = []

        async def send(message):
            sent.append(message)

        scope = {
            "type": "http", "http_version": "1.1", "method": "POST", "path": "/v1/rewards", "raw_path": b"/v1/rewards",
            "query_string": b"", "headers": [(b"content-type", b"application/json")], "scheme": "http",
            "server": ("endpoint", 80), "client": ("caller", 1), "root_path": "",
        }  # fmt: skip
        await client._transport.app(scope, receive, send)
        assert sent[0]["status"] == 499
        assert (await busy).status_code == 200
        assert service.model.scorer.usage.rows == 2
        assert service.pending_tokens == 0
        metrics = (await client.get("/metrics")).text
        assert 'polar_ray_dropped_requests_total{replica="local"} 1.0' in metrics

    with_api(test, config, fake_model(config, seconds_per_token=0.002))


def test_tokens_guard_everything_but_the_page_and_health(monkeypatch):
    monkeypatch.setenv("POLAR_RAY_TOKENS", TOKEN)

    async def test(client, service):
        guarded = [("POST", "/v1/rewards"), ("GET", "/v1/models"), ("GET", "/metrics"), ("POST", "/classify")]
        for method, path in guarded:
            response = await client.request(method, path)
            assert error_of(response) == (401, "unauthorized"), path
            assert response.headers["WWW-Authenticate"] == "Bearer"
        for path in ("/", "/healthz", "/readyz", "/docs", "/openapi.json"):
            assert (await client.get(path)).status_code == 200, path
        response = await client.post("/v1/rewards", json=CAPITAL, headers={"Authorization": f"Bearer {TOKEN}"})
        assert response.status_code == 200
        response = await client.post("/v1/rewards", json=CAPITAL, auth=httpx.BasicAuth("anybody", TOKEN))
        assert response.status_code == 200

    with_api(test)


def test_what_the_framework_refuses_has_our_shape():
    async def test(client, service):
        assert error_of(await client.get("/nowhere")) == (404, "not_found")
        assert error_of(await client.get("/v1/rewards")) == (405, "request_invalid")

    with_api(test)


def test_a_bug_says_its_type_and_nothing_else(monkeypatch, log):
    async def broken(self, *args, **kwargs):
        raise KeyError("a very private text")

    monkeypatch.setattr("polar_ray.serving.service.RewardService.score", broken)

    async def test(client, service):
        response = await client.post("/v1/rewards", json=CAPITAL)
        assert error_of(response) == (500, "internal")
        assert "KeyError" in response.text
        assert "private" not in response.text

    with_api(test)
    assert "/v1/rewards failed with KeyError" in log.getvalue()
    assert "private" not in log.getvalue()


def test_the_model_tells_its_receipt_and_limits():
    async def test(client, service):
        model = ModelsReply.model_validate_json((await client.get("/v1/models")).content).data[0]
        assert model.receipt_id == service.receipt_id
        assert model.receipt["engine"] == "fake"
        assert model.limits.max_rows == 16384
        assert not model.untrained

    with_api(test)


def test_the_model_tells_that_it_is_untrained():
    async def test(client, service):
        assert (await client.get("/v1/models")).json()["data"][0]["untrained"] is True

    config = serve_config()
    with_api(test, config, replace(fake_model(config), untrained=True))


def test_metrics_count_what_was_answered():
    async def test(client, service):
        await client.post("/v1/rewards", json={**CAPITAL, "outputs": ["a", "b", ""]})
        await client.post("/v1/rewards", content=b"{")
        text = (await client.get("/metrics")).text
        assert 'polar_ray_rows_total{replica="local",status="ok"} 2.0' in text
        assert 'polar_ray_rows_total{replica="local",status="triple_empty"} 1.0' in text
        assert 'polar_ray_requests_total{code="request_invalid",replica="local",route="/v1/rewards"} 1.0' in text
        assert 'polar_ray_pending_tokens{priority="bulk",replica="local"} 0.0' in text
        assert "What is the capital" not in text

    with_api(test)


def test_metrics_tell_of_the_health_of_rewards():
    async def test(client, service):
        same = {**CAPITAL, "outputs": ["Beijing.", "Beijing.", "Beijing."]}
        await client.post("/v1/rewards", json=same)
        await client.post("/v1/rewards", json={**CAPITAL, "outputs": ["x" * n for n in range(1, 601)]})
        text = (await client.get("/metrics")).text
        assert 'polar_ray_groups_total{replica="local"} 2.0' in text
        assert 'polar_ray_zero_spread_groups_total{replica="local"} 1.0' in text
        assert 'polar_ray_echo_rows_total{kind="equal",replica="local"} 3.0' in text
        assert 'polar_ray_reward_length_correlation{replica="local",scope="groups"}' in text
        assert f'polar_ray_receipt_info{{receipt_id="{service.receipt_id[:12]}",replica="local"}} 1.0' in text
        assert "polar_ray_reward_drift{" not in text, "not known yet"
        for _ in range(2):
            await client.post("/v1/rewards", json={**CAPITAL, "outputs": ["y" * n for n in range(1, 601)]})
        assert 'polar_ray_reward_drift{replica="local"}' in (await client.get("/metrics")).text

    with_api(test)


def test_the_openapi_examples_are_real():
    async def test(client, service):
        schema = (await client.get("/openapi.json")).json()
        examples = schema["paths"]["/v1/rewards"]["post"]["requestBody"]["content"]["application/json"]["examples"]
        for example in examples.values():
            response = await client.post("/v1/rewards", json=example["value"])
            assert {row["status"] for row in response.json()["rewards"]} == {"ok"}

    with_api(test)
