"""An `AsyncRewardClient` in a thread of its own, whose loop outlives every call."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from polar_ray.client.aio import AsyncRewardClient
from polar_ray.errors import ServingError

T = TypeVar("T")

CLOSED = "this client is closed; make another"


class ClientThread:
    """Belongs to the process that made it: a forked child inherits the object, but not the thread.

    Safe to use from any thread.
    """

    def __init__(self, client: AsyncRewardClient) -> None:
        self.client = client
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._is_closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="polar-ray-client", daemon=True)
        self._thread.start()

    @property
    def is_of_this_process(self) -> bool:
        return self._pid == os.getpid()

    def start(self, ask: Callable[[AsyncRewardClient], Coroutine[Any, Any, T]]) -> Future[T]:
        """The outcome of `ask`, to come; cancelling it cancels what runs. Raises `ServingError` if closed."""
        with self._lock:  # nothing is started behind the back of `_end`
            if self._is_closed:
                raise ServingError(CLOSED)
            return asyncio.run_coroutine_threadsafe(ask(self.client), self._loop)

    def close(self) -> None:
        """Cancel what is under way, let go of the connections and end the thread. Nothing, in a forked child."""
        if not self.is_of_this_process:
            return
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                asyncio.run_coroutine_threadsafe(self._end(), self._loop)
        if threading.current_thread() is not self._thread:  # where the collector may find a forgotten client
            self._thread.join()

    def _run(self) -> None:
        self._loop.run_forever()
        self._loop.close()

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        try:
            await self.client.aclose()
        finally:
            self._loop.stop()
