"""What many callers ask within a moment, sent as one call: per-sample trainers' rows come together and share.

A caller whose rows fill a request anyway has nothing to share, and would tie the others to its own pace and deadline:
its rows are a call of their own.

Pure asyncio, for one event loop.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import islice

from polar_ray.errors import PolarRayError, RequestTooLarge, Unavailable
from polar_ray.triples import Scored, Triple

Send = Callable[[Sequence[Triple]], Awaitable[Sequence[Scored]]]
"""One `Scored` per triple, in order, or an error for them all."""

WAIT_S = 0.005
"""How long a first caller waits for company. Rollouts of one group end within milliseconds where they are scored one
by one after a batch; a caller pays this once, against an engine call of tens."""

ROWS_OF_A_REQUEST = 256
"""The client's own size of a request. A caller with as many rows goes by itself."""

MOST_ROWS = 4 * ROWS_OF_A_REQUEST
"""Rows that are sent without waiting further."""


@dataclass(eq=False, slots=True)
class _Ask:
    triples: Sequence[Triple]
    answer: asyncio.Future[list[Scored]]


class Coalescer:
    """Gathers callers' triples into calls of `send`.

    Every caller gets its own rows, in its order, or an error object of its own. A caller that is cancelled leaves the
    others alone; a call that nobody waits for any more is cancelled.
    """

    def __init__(
        self,
        send: Send,
        *,
        send_large: Send | None = None,
        wait_s: float = WAIT_S,
        most_rows: int = MOST_ROWS,
        rows_of_a_request: int = ROWS_OF_A_REQUEST,
    ) -> None:
        """`send_large` is for callers that go by themselves, over a way of their own if there is one."""
        self._send = send
        self._send_large = send_large or send
        self._wait_s = wait_s
        self._most_rows = most_rows
        self._rows_of_a_request = rows_of_a_request
        self._waiting: list[_Ask] = []
        self._timer: asyncio.TimerHandle | None = None
        self._calls: set[asyncio.Task[None]] = set()

    async def ask(self, triples: Sequence[Triple]) -> list[Scored]:
        """One `Scored` per triple, in order. Raises what `send` raises."""
        if not triples:
            return []
        loop = asyncio.get_running_loop()
        asked = _Ask(triples, loop.create_future())
        if len(triples) >= self._rows_of_a_request:
            self._begin(self._send_large, [asked])
            return await asked.answer
        self._waiting.append(asked)
        if self._timer is None:
            self._timer = loop.call_later(self._wait_s, self._send_waiting)
        if sum(len(ask.triples) for ask in self._waiting) >= self._most_rows:
            self._send_waiting()
        return await asked.answer

    async def aclose(self) -> None:
        """Fail whoever still waits with `Unavailable`, and end the calls under way."""
        waiting, self._waiting = self._waiting, []
        if self._timer is not None:
            self._timer.cancel()
        _fail(waiting, Unavailable("the connection was closed before this was sent"))
        for call in self._calls:
            call.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)

    def _send_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        asks, self._waiting, self._timer = [ask for ask in self._waiting if not ask.answer.done()], [], None
        if asks:
            self._begin(self._send, asks)

    def _begin(self, send: Send, asks: Sequence[_Ask]) -> None:
        call = asyncio.ensure_future(self._call(send, asks))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)

        def end_if_unwanted(_: asyncio.Future[list[Scored]]) -> None:
            if all(ask.answer.done() for ask in asks):
                call.cancel()

        for ask in asks:
            ask.answer.add_done_callback(end_if_unwanted)

    async def _call(self, send: Send, asks: Sequence[_Ask]) -> None:
        try:
            scored = iter(await send([triple for ask in asks for triple in ask.triples]))
        except RequestTooLarge as error:
            if len(asks) == 1:
                return _fail(asks, error)
            middle = len(asks) // 2  # one caller's giant must not fail its neighbours
            await asyncio.gather(self._call(send, asks[:middle]), self._call(send, asks[middle:]))
        except asyncio.CancelledError:
            _fail(asks, Unavailable("the connection was closed before the reply came"))
            raise
        except Exception as error:  # the callers' to handle, whatever it is: none may wait for ever
            _fail(asks, error)
        else:
            for ask in asks:
                rows = list(islice(scored, len(ask.triples)))
                if not ask.answer.done():
                    ask.answer.set_result(rows)


def _fail(asks: Sequence[_Ask], error: Exception) -> None:
    """Each caller its own object: one that is raised in several tasks collects all their tracebacks."""
    for ask in asks:
        if not ask.answer.done():
            ask.answer.set_exception(copy.copy(error) if isinstance(error, PolarRayError) else error)
