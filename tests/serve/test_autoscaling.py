"""Replicas follow the queue: up while tokens pend, down when none do, and from nothing at the first request."""

import asyncio

import pytest

from tests.serve.conftest import groups

pytestmark = pytest.mark.ray

PACE = 2e-4
"""Seconds per token: a hundred short rows take about a second."""

QUICK = {
    "target_pending_tokens": 2000,
    "upscale_delay_s": 0.5,
    "downscale_delay_s": 1,
    "look_back_period_s": 2,
    "interval_s": 0.5,
}


def test_pending_tokens_drive_one_replica_to_three_and_back(deploy, truth):
    endpoint = deploy(replicas="1:3", autoscaling=QUICK, seconds_per_token=PACE)
    assert len(endpoint.replicas()) == 1
    seen = asyncio.run(ask_until(endpoint, truth, lambda: len(endpoint.replicas()) == 3))
    assert 1 <= min(seen) <= max(seen) == 3
    endpoint.wait_for(lambda: len(endpoint.replicas()) == 1)
    endpoint.check_errors()


async def ask_until(endpoint, truth, is_enough) -> list[int]:
    """Sixteen callers with long queues; the numbers of replicas that were seen meanwhile."""
    seen: list[int] = []

    async def one(client, number):
        rows = 0
        while not (seen and is_enough()):
            triples = groups(10, 1, about=f"{number}, {rows}", words=10)
            assert await endpoint.score(client, triples) == truth(triples)
            rows += len(triples)

    async def watch():
        while not (seen and seen[-1] == 3):
            seen.append(len(await asyncio.to_thread(endpoint.replicas)))
            await asyncio.sleep(0.2)

    async with endpoint.client() as client:
        async with asyncio.timeout(60):
            await asyncio.gather(watch(), *(one(client, number) for number in range(16)))
    return seen


def test_from_no_replica_the_first_request_starts_one_and_waits_for_it(deploy, truth):
    endpoint = deploy(replicas="0:2", autoscaling=QUICK)
    endpoint.wait_for(lambda: not endpoint.replicas())
    triples = groups(2, 2)

    async def main():
        async with endpoint.client() as client:
            return await endpoint.score(client, triples)

    assert asyncio.run(main()) == truth(triples)
    assert not endpoint.errors
