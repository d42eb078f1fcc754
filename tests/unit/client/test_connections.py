"""Connections: as many as were asked for, in pools of a bearable size, and the next in line waits."""

import asyncio

import httpx
import pytest

from polar_ray.client.connections import CONNECTIONS_PER_POOL, Connections


@pytest.mark.parametrize("most", [1, CONNECTIONS_PER_POOL, 20])
def test_many_connections_stand_in_small_pools(most):
    connections = Connections(most)
    sizes = [pool._transport._pool._max_connections for pool in connections._pools]
    assert sum(sizes) == most
    assert max(sizes) <= CONNECTIONS_PER_POOL


def test_who_asks_again_at_once_goes_behind_those_who_wait():
    async def answer(request):
        await asyncio.sleep(0.001)
        return httpx.Response(200)

    async def main():
        connections, order = Connections(2, base_url="http://endpoint", transport=httpx.MockTransport(answer)), []

        async def ask(name):
            await connections.request("GET", "/")
            order.append(name)

        async def worker():
            for _ in range(50):
                await ask("large")

        workers = [asyncio.create_task(worker()) for _ in range(2)]
        await asyncio.sleep(0.01)
        await ask("small")
        waited = len(order)
        await asyncio.gather(*workers)
        await connections.aclose()
        return waited

    assert asyncio.run(main()) < 50


def test_a_request_waits_for_a_free_connection_and_an_error_frees_one():
    under_way, most_under_way = 0, 0

    async def answer(request):
        nonlocal under_way, most_under_way
        under_way += 1
        most_under_way = max(most_under_way, under_way)
        await asyncio.sleep(0.01)
        under_way -= 1
        raise httpx.ReadError("gone")

    async def main():
        connections = Connections(3, base_url="http://endpoint", transport=httpx.MockTransport(answer))
        asked = [connections.request("GET", "/") for _ in range(10)]
        outcomes = await asyncio.gather(*asked, return_exceptions=True)
        await connections.aclose()
        await connections.aclose()
        return outcomes

    outcomes = asyncio.run(main())
    assert [type(outcome) for outcome in outcomes] == [httpx.ReadError] * 10
    assert most_under_way == 3
