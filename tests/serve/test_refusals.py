"""Bad, late, slow and vanished callers, through Ray's own proxy: each refused in words, nothing computed for nobody."""

import asyncio
import json
import socket
import time

import httpx
import pytest

from polar_ray.errors import DeadlineExceeded, Overloaded, PolarRayError
from polar_ray.wire import ErrorReply, triple_to_json
from tests.serve.caller import LEAKS
from tests.serve.conftest import groups

pytestmark = pytest.mark.ray

PACE = 1e-3
"""Seconds per token: a row of some fifty tokens takes as many milliseconds."""

LEAVERS_TOKENS = 8000
"""At the least, of ten callers with twenty rows."""

COMPUTED = "polar_ray_computed_tokens_total"


def body_of(triples, **options) -> bytes:
    return json.dumps({"triples": [triple_to_json(triple) for triple in triples], **options}).encode()


@pytest.mark.parametrize(
    ("content", "headers", "status", "code"),
    [
        (b"x" * 200_000, {}, 413, "request_too_large"),
        (b'{"triples": [', {}, 400, "request_invalid"),
        (b"\xff\xfe", {}, 400, "request_invalid"),
        (b"[" * 50_000, {}, 400, "request_invalid"),
        (b'{"triples": [], "deadlines": 1}', {}, 400, "request_invalid"),
        (b'{"triples": [], "deadline_s": -1}', {}, 400, "request_invalid"),
        (b"prompt=Question 1", {"content-type": "application/x-www-form-urlencoded"}, 400, "request_invalid"),
        (b"Question 1", {"content-type": "application/vnd.apache.arrow.stream"}, 400, "request_invalid"),
        (b"Question 1", {"content-encoding": "gzip"}, 400, "request_invalid"),
        (body_of(groups(40, 1)), {}, 413, "request_too_large"),
        (body_of(groups(1, 1), expect_receipt="another"), {}, 409, "receipt_mismatch"),
    ],
    ids=[
        "bytes", "cut off", "not text", "deep", "misspelt", "deadline", "form", "arrow", "gzip", "rows", "receipt",
    ],
)  # fmt: skip
def test_a_request_that_is_wrong_is_refused_by_its_fault(strict, content, headers, status, code):
    reply = httpx.post(f"{strict.url}/v1/rewards", content=content, headers=headers)
    assert reply.status_code == status, reply.text
    error = ErrorReply.model_validate_json(reply.content).error
    assert (error.code, error.retryable) == (code, False)
    assert not LEAKS.search(reply.content)


def test_a_body_without_a_length_is_cut_off_at_the_limit(strict):
    def dribble():
        for _ in range(50):
            yield b"x" * 10_000

    reply = httpx.post(f"{strict.url}/v1/rewards", content=dribble())
    assert reply.status_code == 413


@pytest.fixture(scope="module")
def strict(module_deploy):
    return module_deploy(requests={"max_body_bytes": 100_000, "max_rows": 32})


@pytest.fixture
def slow(deploy):
    return deploy(seconds_per_token=PACE, engine=fake_engine(512))


def fake_engine(token_budget: int) -> dict:
    return {"kind": "fake", "device": "cpu", "dtype": "float32", "token_budget": token_budget}


async def occupy(endpoint, client, rows: int):
    """A call that keeps the engine busy, in its queue by the time this returns."""
    task = asyncio.create_task(endpoint.score(client, groups(rows, 1, about="what came first")))
    await asyncio.to_thread(endpoint.wait_for, lambda: endpoint.metrics()["polar_ray_pending_tokens"] > 1000)
    return task


def test_rows_of_a_caller_that_hung_up_are_never_computed(slow, truth):
    before = slow.metrics()

    async def main():
        async with slow.client() as client:
            first = await occupy(slow, client, 60)
            async with slow.client() as other:
                leaving = [asyncio.create_task(slow.ask(other, groups(20, 1, about=f"leaver {n}"))) for n in range(10)]
                await asyncio.to_thread(
                    slow.wait_for, lambda: slow.metrics()["polar_ray_pending_tokens"] > LEAVERS_TOKENS
                )
                for task in leaving:
                    task.cancel()
                gone = await asyncio.gather(*leaving, return_exceptions=True)
            return gone, await first

    gone, rewards = asyncio.run(main())
    assert all(isinstance(outcome, asyncio.CancelledError) for outcome in gone)
    assert rewards == truth(groups(60, 1, about="what came first"))
    slow.wait_for(lambda: slow.metrics()["polar_ray_pending_tokens"] == 0)
    after = slow.metrics()
    assert after["polar_ray_dropped_requests_total"] == 10
    assert after["polar_ray_rows_total{ok}"] == 60
    computed_for_leavers = after[COMPUTED] - before[COMPUTED] - after["polar_ray_tokens_total"]
    assert computed_for_leavers < LEAVERS_TOKENS / 2, "those that the engine got to before they left"


def test_short_deadlines_are_refused_or_passed_and_nothing_late_is_computed(slow):
    async def main():
        async with slow.client() as client:
            first = await occupy(slow, client, 60)
            late = [slow.ask(client, groups(10, 1, about=f"late {n}"), deadline_s=0.3) for n in range(20)]
            outcomes = await asyncio.gather(*late, return_exceptions=True)
            await first
            return outcomes

    before = slow.metrics()[COMPUTED]
    outcomes = asyncio.run(main())
    assert all(isinstance(outcome, Overloaded | DeadlineExceeded) for outcome in outcomes), outcomes
    after = slow.metrics()
    assert after["polar_ray_rows_total{ok}"] == 60
    assert after[COMPUTED] - before <= after["polar_ray_tokens_total"] + 2 * 512, "late rows were computed"
    slow.check_errors()


def test_a_full_queue_says_when_to_come_back_and_is_right(deploy, truth):
    endpoint = deploy(seconds_per_token=PACE, engine=fake_engine(512), queue={"max_queued_tokens": 1500})
    triples = groups(60, 1, about="latecomer")

    async def main():
        async with endpoint.client() as client:
            await endpoint.score(client, triples[:20])  # fills an engine call, so that the engine's speed is known
            first = await occupy(endpoint, client, 60)
            with pytest.raises(Overloaded) as refusal:
                await endpoint.ask(client, triples)
            waits = [refusal.value.details["retry_after_s"]]
            rewards = None
            while rewards is None:
                await asyncio.sleep(waits[-1])
                try:
                    rewards = [row.reward for row in (await endpoint.ask(client, triples)).rewards]
                except Overloaded as again:
                    waits.append(again.details["retry_after_s"])
            await first
            return rewards, waits

    rewards, waits = asyncio.run(main())
    assert rewards == truth(triples)
    assert len(waits) <= 3, "once; a machine that is slow of a sudden may take longer than it seemed"
    endpoint.check_errors()


def test_after_a_storm_of_bad_callers_the_endpoint_is_as_before(slow, truth):
    host, port = slow.url.removeprefix("http://").partition("/")[0].split(":")

    def half_a_request() -> socket.socket:
        connection = socket.create_connection((host, int(port)))
        head = f"POST /{slow.name}/v1/rewards HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
        connection.sendall(head.encode() + b'{"triples"')
        return connection

    async def main():
        async with slow.client() as client:
            dribblers = [half_a_request() for _ in range(10)]
            calls = []
            for n in range(40):
                triples = groups(5, 1, about=f"storm {n}")
                calls += [
                    client.post("/v1/rewards", content=body_of(triples)[: 50 + n]),
                    client.post("/v1/rewards", content=body_of(triples, deadline_s=0.05)),
                    asyncio.wait_for(slow.ask(client, triples), 0.2),
                    client.get("/v1/rewards"),
                    client.post("/nowhere", content=b"Question 1"),
                ]
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            for connection in dribblers:
                connection.close()
            return outcomes

    outcomes = asyncio.run(main())
    replies = [outcome for outcome in outcomes if isinstance(outcome, httpx.Response)]
    assert len(replies) >= 120
    for reply in replies:
        assert reply.status_code in (200, 400, 404, 405, 429, 504), reply.text
        if reply.status_code != 200:
            ErrorReply.model_validate_json(reply.content)
            assert not LEAKS.search(reply.content)
    others = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
    assert all(isinstance(other, TimeoutError | PolarRayError) for other in others), others
    slow.wait_for(lambda: slow.metrics()["polar_ray_pending_tokens"] == 0)
    slow.wait_until_ready(5)
    triples = groups(3, 2)

    async def again():
        async with slow.client() as client:
            return await slow.score(client, triples)

    assert asyncio.run(again()) == truth(triples)


def test_a_caller_that_sends_slowly_keeps_nobody_waiting(slow, truth):
    triples = groups(2, 2)
    content = body_of(triples)

    async def slowly():
        for place in range(0, len(content), len(content) // 5):
            yield content[place : place + len(content) // 5]
            await asyncio.sleep(0.3)

    async def main():
        async with slow.client() as client:
            dribbling = asyncio.create_task(client.post("/v1/rewards", content=slowly()))
            quick = await slow.score(client, triples)
            was_first = not dribbling.done()
            return quick, was_first, slow.read(await dribbling)

    began = time.monotonic()
    quick, was_first, reply = asyncio.run(main())
    assert time.monotonic() - began >= 1
    assert was_first
    assert quick == [row.reward for row in reply.rewards] == truth(triples)
