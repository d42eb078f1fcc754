"""One connection per process and endpoint, in a thread of its own, that all threads and event loops of a trainer use.

Trainers call reward functions from short-lived loops (ms-swift), from several loops (verl) and from thread pools
(OpenRLHF). A client lives in one loop, so it gets one that outlives theirs, and what they ask at the same moment
travels together.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from polar_ray.client import AsyncRewardClient
from polar_ray.client.thread import LoopThread
from polar_ray.config import endpoint_address, endpoint_token
from polar_ray.trainers.coalesce import WAIT_S, Coalescer
from polar_ray.triples import Scored, Triple

CLOSE_S = 5.0
"""For saying goodbye to the endpoint at exit."""


class Connection:
    """A client, and a coalescer in front of it. Safe to use from any thread.

    Callers with very many rows have a client beside it, lest their requests take all of its connections.
    """

    def __init__(self, *, coalesce_s: float = WAIT_S, **options: Any) -> None:
        """`options` are those of `AsyncRewardClient`."""
        self._client, self._large_client = AsyncRewardClient(**options), AsyncRewardClient(**options)
        self._coalescer = Coalescer(self._client.score, send_large=self._large_client.score, wait_s=coalesce_s)
        self._thread = LoopThread("polar-ray-rewards", self._end)

    def ask(self, triples: Sequence[Triple]) -> Future[list[Scored]]:
        """One `Scored` per triple, in order, to come; cancelling it takes the question back."""
        return self._thread.start(lambda: self._coalescer.ask(triples))

    def close(self) -> None:
        """Fail what is under way with `Unavailable`, and end the thread."""
        self._thread.close(CLOSE_S)

    async def _end(self) -> None:
        await self._coalescer.aclose()
        await self._client.aclose()
        await self._large_client.aclose()


class _Connections:
    """Those of this process, by their options."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Start afresh: a forked child has the parent's connections, but not the threads they run in."""
        self._lock = threading.Lock()
        self._by_options: dict[tuple[tuple[str, Any], ...], Connection] = {}

    def get(self, options: dict[str, Any]) -> Connection:
        with self._lock:
            key = tuple(sorted(options.items()))
            if key not in self._by_options:
                self._by_options[key] = Connection(**options)
            return self._by_options[key]

    def close(self) -> None:
        with self._lock:
            open_ones, self._by_options = list(self._by_options.values()), {}
        for connection in open_ones:
            connection.close()


_connections = _Connections()
os.register_at_fork(after_in_child=_connections.forget)


def connection(address: str | None = None, token: str | None = None, **options: Any) -> Connection:
    """This process's connection with these options, opened on first use; None takes what the environment says now.

    Raises `ConfigError` where no address is known.
    """
    resolved = {"address": address or endpoint_address(), "token": token or endpoint_token()}
    return _connections.get({**resolved, **options})


@atexit.register
def close_connections() -> None:
    """Close all of this process's connections; the next question opens another."""
    _connections.close()
