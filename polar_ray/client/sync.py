"""`RewardClient`: the asynchronous client for code without an event loop."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import CancelledError
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

from polar_ray.client.aio import AsyncRewardClient
from polar_ray.client.thread import CLOSED, LoopThread
from polar_ray.errors import ServingError
from polar_ray.triples import Scored, Text, TokenIds, Triple, Wrapper
from polar_ray.wire import ModelReply

T = TypeVar("T")


class RewardClient:
    """`AsyncRewardClient` in a thread of its own, with the same arguments, promises and errors.

        with RewardClient("127.0.0.1:8000") as client:
            rewards = client.rewards([Triple(prompt, reference, output), ...])

    Safe to use from several threads, in notebooks (where a loop is running already), in Ray actors, and in a forked
    child, which opens connections of its own. Ctrl-C in a call takes it back; closing does so with calls of other
    threads, which raise `ServingError`, as calls of a closed client do.
    """

    def __init__(self, address: str | None = None, **options: Any) -> None:
        """`options` are those of `AsyncRewardClient`."""
        self._make_client = partial(AsyncRewardClient, address, **options)
        self._reopening = threading.Lock()
        self._open()

    def __repr__(self) -> str:
        return repr(self._client).removeprefix("Async")

    @property
    def receipt_id(self) -> str | None:
        """Of the last reply; None before there was one."""
        return self._client.receipt_id

    def score(
        self, triples: Iterable[Triple], *, deadline_s: float | None = None, progress: bool = False
    ) -> list[Scored]:
        """As `AsyncRewardClient.score`."""
        given = list(triples)
        return self._call(lambda client: client.score(given, deadline_s=deadline_s, progress=progress))

    def score_group(
        self,
        prompt: Text,
        reference: Text,
        outputs: Sequence[Text],
        *,
        wrapper: Wrapper = "sft",
        deadline_s: float | None = None,
    ) -> list[Scored]:
        """As `AsyncRewardClient.score_group`."""
        return self._call(
            lambda client: client.score_group(prompt, reference, outputs, wrapper=wrapper, deadline_s=deadline_s)
        )

    def score_ids(self, sequences: Sequence[TokenIds], *, deadline_s: float | None = None) -> list[Scored]:
        """As `AsyncRewardClient.score_ids`."""
        return self._call(lambda client: client.score_ids(sequences, deadline_s=deadline_s))

    def rewards(self, triples: Iterable[Triple], *, deadline_s: float | None = None) -> list[float]:
        """As `AsyncRewardClient.rewards`."""
        given = list(triples)
        return self._call(lambda client: client.rewards(given, deadline_s=deadline_s))

    def model(self, *, deadline_s: float | None = None) -> ModelReply:
        """As `AsyncRewardClient.model`."""
        return self._call(lambda client: client.model(deadline_s=deadline_s))

    def close(self) -> None:
        """Let go of the connections and the thread. May be called twice; a client that is forgotten closes itself."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> None:
        self._client = self._make_client()
        self._thread = LoopThread("polar-ray-client", partial(_end, self._client))
        self._close = weakref.finalize(self, self._thread.close)

    def _call(self, ask: Callable[[AsyncRewardClient], Coroutine[Any, Any, T]]) -> T:
        future = self._thread_here().start(lambda: ask(self._client))
        try:
            return future.result()
        except CancelledError:
            raise ServingError(CLOSED) from None
        except BaseException:  # an interrupt, for one: nobody waits for what would go on
            future.cancel()
            raise

    def _thread_here(self) -> LoopThread:
        """This process's thread; a forked child has none until it asks for something."""
        if not self._thread.is_of_this_process:
            with self._reopening:
                if not self._close.alive:
                    raise ServingError(CLOSED)
                if not self._thread.is_of_this_process:
                    self._open()
        return self._thread


async def _end(client: AsyncRewardClient) -> None:
    """Cancel what is under way, and let go of the connections."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await client.aclose()
