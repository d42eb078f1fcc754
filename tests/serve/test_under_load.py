"""Replicas die, come and are replaced while callers ask: nothing lost, nothing twice, no wrong number."""

import asyncio
import os
import signal
import threading

import pytest

from tests.serve.conftest import groups, redeploy

pytestmark = pytest.mark.ray

CALLERS = 16
ROWS_PER_CALL = 8
PACE = 2e-5
"""Seconds per token: about 50 000 tokens a second, a small GPU."""


async def keep_asking(endpoint, truth, stop: threading.Event) -> int:
    """Sixteen callers, until told to stop; how many rows were answered, each of them right."""

    async def one(client, number) -> int:
        rows = 0
        while not stop.is_set():
            triples = groups(2, ROWS_PER_CALL // 2, about=f"caller {number}, row {rows}", words=20)
            assert await endpoint.score(client, triples) == truth(triples)
            rows += len(triples)
        return rows

    async with endpoint.client() as client:
        return sum(await asyncio.gather(*(one(client, number) for number in range(CALLERS))))


async def while_asking(endpoint, truth, happening) -> int:
    """Rows answered to callers who ask while `happening()` runs, in a thread of its own, and a moment longer."""
    stop = threading.Event()
    asking = asyncio.create_task(keep_asking(endpoint, truth, stop))
    try:
        await asyncio.sleep(1)
        await asyncio.to_thread(happening)
        await asyncio.sleep(1)
    finally:
        stop.set()
    return await asking


def test_a_replica_killed_under_load_costs_no_row(deploy, truth):
    endpoint = deploy(replicas=2, seconds_per_token=PACE)

    def kill_one() -> None:
        before = set(endpoint.replicas())
        assert len(before) == 2
        os.kill(min(before), signal.SIGKILL)
        endpoint.wait_for(lambda: min(before) not in endpoint.replicas() and len(endpoint.replicas()) == 2)

    rows = asyncio.run(while_asking(endpoint, truth, kill_one))
    assert rows >= CALLERS * ROWS_PER_CALL
    endpoint.check_errors()


def test_a_redeploy_under_load_fails_no_call(deploy, truth):
    endpoint = deploy(replicas=2, seconds_per_token=PACE, queue={"batch_wait_s": 0.005})
    before = set(endpoint.replicas())
    rows = asyncio.run(
        while_asking(
            endpoint,
            truth,
            lambda: redeploy(endpoint, replicas=2, seconds_per_token=PACE, queue={"batch_wait_s": 0.002}),
        )
    )
    assert rows >= CALLERS * ROWS_PER_CALL
    assert not endpoint.errors
    assert not before & set(endpoint.replicas())
