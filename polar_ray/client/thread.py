"""An event loop in a thread of its own, for clients of code that has no loop, or many that come and go."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from polar_ray.errors import ServingError

T = TypeVar("T")

CLOSED = "this client is closed; make another"


class LoopThread:
    """Belongs to the process that made it: a forked child inherits the object, but not the thread.

    Safe to use from any thread.
    """

    def __init__(self, name: str, end: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """`end` is the last thing that runs in the loop; `name` is the thread's, for whoever debugs."""
        self._end = end
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._is_closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def is_of_this_process(self) -> bool:
        return self._pid == os.getpid()

    def start(self, work: Callable[[], Coroutine[Any, Any, T]]) -> Future[T]:
        """The outcome of `work`, to come; cancelling it cancels what runs. Raises `ServingError` if closed."""
        with self._lock:  # nothing is started behind the back of `end`
            if self._is_closed:
                raise ServingError(CLOSED)
            return asyncio.run_coroutine_threadsafe(work(), self._loop)

    def close(self, timeout_s: float | None = None) -> None:
        """Run `end` and end the thread, waiting for it so long at the most. Nothing, in a forked child."""
        if not self.is_of_this_process:
            return
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                asyncio.run_coroutine_threadsafe(self._finish(), self._loop)
        if threading.current_thread() is not self._thread:  # where the collector may find a forgotten client
            self._thread.join(timeout_s)

    def _run(self) -> None:
        self._loop.run_forever()
        self._loop.close()

    async def _finish(self) -> None:
        try:
            await self._end()
        finally:
            self._loop.stop()
