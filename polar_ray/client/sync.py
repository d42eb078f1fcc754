"""`RewardClient`: the asynchronous client for code without an event loop."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Self

from anyio.from_thread import BlockingPortal, start_blocking_portal

from polar_ray.client.aio import AsyncRewardClient
from polar_ray.triples import Scored, Text, TokenIds, Triple, Wrapper
from polar_ray.wire import ModelReply


class RewardClient:
    """`AsyncRewardClient` in a thread of its own, with the same arguments, promises and errors.

        with RewardClient("127.0.0.1:8000") as client:
            rewards = client.rewards([Triple(prompt, reference, output), ...])

    Safe to use from several threads, in notebooks (where a loop is running already) and in Ray actors.
    """

    def __init__(self, address: str | None = None, **options: Any) -> None:
        """`options` are those of `AsyncRewardClient`."""
        self._client = AsyncRewardClient(address, **options)
        thread = start_blocking_portal()
        self._portal = thread.__enter__()
        self._close = weakref.finalize(self, _close, self._client, self._portal, thread)

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
        return self._portal.call(lambda: self._client.score(given, deadline_s=deadline_s, progress=progress))

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
        return self._portal.call(
            lambda: self._client.score_group(prompt, reference, outputs, wrapper=wrapper, deadline_s=deadline_s)
        )

    def score_ids(self, sequences: Sequence[TokenIds], *, deadline_s: float | None = None) -> list[Scored]:
        """As `AsyncRewardClient.score_ids`."""
        return self._portal.call(lambda: self._client.score_ids(sequences, deadline_s=deadline_s))

    def rewards(self, triples: Iterable[Triple], *, deadline_s: float | None = None) -> list[float]:
        """As `AsyncRewardClient.rewards`."""
        given = list(triples)
        return self._portal.call(lambda: self._client.rewards(given, deadline_s=deadline_s))

    def model(self, *, deadline_s: float | None = None) -> ModelReply:
        """As `AsyncRewardClient.model`."""
        return self._portal.call(lambda: self._client.model(deadline_s=deadline_s))

    def close(self) -> None:
        """Let go of the connections and the thread. May be called twice; a client that is forgotten closes itself."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _close(client: AsyncRewardClient, portal: BlockingPortal, thread: AbstractContextManager[BlockingPortal]) -> None:
    portal.call(client.aclose)
    thread.__exit__(None, None, None)
