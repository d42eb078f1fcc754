"""HTTP connections to one endpoint, lent one request at a time."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx

CONNECTIONS_PER_POOL = 8
"""Whenever a request comes or goes httpx counts all connections of its pool, once for each of them; with 64 in one pool
that is most of what a client does."""


class Connections:
    """`most` connections; a request for which none is free waits for its turn. For one event loop."""

    def __init__(self, most: int, **options: Any) -> None:
        """`options` are those of `httpx.AsyncClient`."""
        self._pools: list[httpx.AsyncClient] = []
        self._free: list[httpx.AsyncClient] = []
        self._turn = asyncio.Semaphore(most)  # lets nobody who comes later go before those who wait
        for start in range(0, most, CONNECTIONS_PER_POOL):
            size = min(CONNECTIONS_PER_POOL, most - start)
            limits = httpx.Limits(max_connections=size, max_keepalive_connections=size)
            self._pools.append(httpx.AsyncClient(limits=limits, **options))
            self._free += [self._pools[-1]] * size

    async def request(self, method: str, url: str, **arguments: Any) -> httpx.Response:
        """The whole response. `arguments` and errors are those of `httpx.AsyncClient.request`."""
        async with self._turn:
            pool = self._free.pop()
            try:
                return await pool.request(method, url, **arguments)
            finally:
                self._free.append(pool)

    async def aclose(self) -> None:
        """Let go of them. May be called twice."""
        for pool in self._pools:
            await pool.aclose()
