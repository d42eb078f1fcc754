"""`AsyncRewardClient`: any number of triples in, one `Scored` each out, in order, or a typed error."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from math import isfinite
from types import TracebackType
from typing import Any, Self

import httpx
from pydantic import ValidationError

from polar_ray.client.address import base_url, credentials, shown, ssl_context
from polar_ray.client.connections import Connections
from polar_ray.client.parts import Part, fault_of, sendable_ids, split_ids, split_triples
from polar_ray.client.progress import row_progress
from polar_ray.client.retry import retrying
from polar_ray.config import endpoint_token
from polar_ray.errors import (
    ConfigError,
    DeadlineExceeded,
    EngineProtocolError,
    PolarRayError,
    ReceiptMismatch,
    RequestTooLarge,
    TripleError,
    Unavailable,
    error_kinds,
)
from polar_ray.triples import STATUS_OK, Scored, Text, TokenIds, Triple, Wrapper
from polar_ray.wire import (
    CONNECTION_LOST,
    MODELS_PATH,
    REWARDS_PATH,
    ModelReply,
    ModelsReply,
    Priority,
    RewardsReply,
    read_error,
)

OnRows = Callable[[int], None]
"""Told how many rows came back."""

LONGEST_DEADLINE_S = 86400.0
"""That a request may say; a longer call asks again."""

LATE_REPLY_S = 5.0
"""For a reply to arrive after its deadline: the endpoint refuses at the deadline, and that is worth hearing."""


class AsyncRewardClient:
    """A connection to one endpoint, for one event loop.

        async with AsyncRewardClient("127.0.0.1:8000") as client:
            rewards = await client.rewards([Triple(prompt, reference, output), ...])

    Lists are split into requests, of which `max_in_flight` are under way at a time; groups travel whole. Retryable
    errors are asked again until the deadline of the whole call, with back-off and no sooner than `Retry-After`. All
    replies of one call have one receipt, that of `expect_receipt` if it is given.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        token: str | None = None,
        deadline_s: float = 300.0,
        priority: Priority = "interactive",
        expect_receipt: str | None = None,
        max_in_flight: int = 8,
        rows_per_request: int = 256,
        verify: bool | str = True,
    ) -> None:
        """`address` and `token` default to POLAR_RAY_ADDRESS and POLAR_RAY_TOKEN; `verify` may name a CA's file.

        Raises `ConfigError` for an address that is none.
        """
        if max_in_flight < 1 or rows_per_request < 1 or deadline_s <= 0:
            raise ConfigError("max_in_flight, rows_per_request and deadline_s must be positive")
        url = base_url(address)
        self._url = url.copy_with(username=None, password=None)  # httpx logs the URL of every request
        self._connections = Connections(
            max_in_flight,
            base_url=self._url,
            headers=credentials(url, token or endpoint_token()),
            verify=ssl_context(verify),
            trust_env=False,  # an endpoint is on the cluster's own network, where a proxy for the world has no business
        )
        self._options: dict[str, Any] = {"priority": priority}
        if expect_receipt is not None:
            self._options["expect_receipt"] = expect_receipt
        self._expect_receipt = expect_receipt
        self._deadline_s = deadline_s
        self._rows_per_request = rows_per_request
        self._max_in_flight = max_in_flight
        self.receipt_id: str | None = None
        """Of the last reply; None before there was one."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({shown(self._url)!r})"

    async def score(
        self, triples: Iterable[Triple], *, deadline_s: float | None = None, progress: bool = False
    ) -> list[Scored]:
        """One `Scored` per triple, in order; a row that cannot be scored says why on itself.

        Raises the endpoint's error for a call that failed as a whole, `Unavailable` when nobody answers,
        `DeadlineExceeded` when `deadline_s`, which is for everything, is over; if it ends between two tries, what the
        last one raised.
        """
        given = list(triples)
        refused = {
            place: Scored(None, fault.code, str(fault), id=None if triple.id is None else str(triple.id))
            for place, triple in enumerate(given)
            if (fault := fault_of(triple)) is not None
        }
        sendable = [triple for place, triple in enumerate(given) if place not in refused]
        parts = split_triples(sendable, self._rows_per_request)
        with row_progress(len(sendable)) if progress else nullcontext(_ignore) as on_rows:
            return _in_place(refused, await self._run(parts, len(sendable), deadline_s, on_rows))

    async def score_group(
        self,
        prompt: Text,
        reference: Text,
        outputs: Sequence[Text],
        *,
        wrapper: Wrapper = "sft",
        deadline_s: float | None = None,
    ) -> list[Scored]:
        """One `Scored` per output to the same prompt and reference, in order. Raises as `score` does."""
        triples = [Triple(prompt, reference, output, wrapper) for output in outputs]
        return await self.score(triples, deadline_s=deadline_s)

    async def score_ids(self, sequences: Sequence[TokenIds], *, deadline_s: float | None = None) -> list[Scored]:
        """One `Scored` per encoded sequence, in order. Raises as `score` does."""
        plain = [sendable_ids(sequence) for sequence in sequences]
        refused = {
            place: Scored(None, found.code, str(found))
            for place, found in enumerate(plain)
            if isinstance(found, TripleError)
        }
        sendable = [found for found in plain if isinstance(found, TokenIds)]
        parts = split_ids(sendable, self._rows_per_request)
        return _in_place(refused, await self._run(parts, len(sendable), deadline_s, _ignore))

    async def rewards(self, triples: Iterable[Triple], *, deadline_s: float | None = None) -> list[float]:
        """The reward of each triple, in order. Raises, besides what `score` raises, the first failed row's error."""
        return [reward_of(place, row) for place, row in enumerate(await self.score(triples, deadline_s=deadline_s))]

    async def model(self, *, deadline_s: float | None = None) -> ModelReply:
        """What the endpoint serves: the model, its receipt, its limits."""
        reply = await self._ask("GET", MODELS_PATH, None, self._deadline(deadline_s))
        try:
            return ModelsReply.model_validate_json(reply.content).data[0]
        except (ValidationError, IndexError):
            raise EngineProtocolError(f"{shown(self._url)}{MODELS_PATH} is not an endpoint of polar_ray") from None

    async def aclose(self) -> None:
        """Let go of the connections. May be called twice."""
        await self._connections.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def _deadline(self, deadline_s: float | None) -> float:
        return time.monotonic() + (self._deadline_s if deadline_s is None else deadline_s)

    async def _run(self, parts: Iterable[Part], n_rows: int, deadline_s: float | None, on_rows: OnRows) -> list[Scored]:
        """Ask for all parts, some at a time; the first that fails for good ends the call."""
        deadline = self._deadline(deadline_s)
        scored: list[Scored | None] = [None] * n_rows
        receipts: set[str] = set()
        remaining = iter(parts)

        async def settle(part: Part) -> None:
            try:
                reply = await self._ask_for(part, deadline)
            except RequestTooLarge:
                if len(part.places) == 1:
                    raise
                for half in part.halves():
                    await settle(half)
                return
            receipts.add(reply.receipt_id)
            if len(receipts) > 1:
                raise ReceiptMismatch("the endpoint's model or settings changed during this call; ask again")
            for place, row in zip(part.places, reply.rewards, strict=True):
                scored[place] = row.scored()
            on_rows(len(part.places))

        async def work() -> None:
            for part in remaining:
                await settle(part)

        await _all_or_first_error([work() for _ in range(self._max_in_flight)])
        self.receipt_id = next(iter(receipts), self.receipt_id)
        return [row for row in scored if row is not None]

    async def _ask_for(self, part: Part, deadline: float) -> RewardsReply:
        response = await self._ask("POST", REWARDS_PATH, {**part.body, **self._options}, deadline)
        try:
            reply = RewardsReply.model_validate_json(response.content)
        except ValidationError:
            raise EngineProtocolError(
                f"{shown(self._url)} answered with something that is no reply of polar_ray"
            ) from None
        _check_reply(reply, len(part.places))
        if self._expect_receipt not in (None, reply.receipt_id):
            raise ReceiptMismatch(f"expected rewards of receipt {self._expect_receipt}, got {reply.receipt_id}")
        return reply

    async def _ask(self, method: str, path: str, body: dict[str, Any] | None, deadline: float) -> httpx.Response:
        """The reply with status 200, asked for as often as it takes and is worth."""
        failure: PolarRayError | None = None
        async for attempt in retrying(deadline):
            with attempt:
                if failure is not None and time.monotonic() >= deadline:
                    raise failure  # a wait that took longer than it was meant to: this says more than the time does
                try:
                    return await self._ask_once(method, path, body, deadline)
                except PolarRayError as error:
                    failure = error
                    raise
        raise AssertionError("tenacity raises the last error")

    async def _ask_once(self, method: str, path: str, body: dict[str, Any] | None, deadline: float) -> httpx.Response:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise DeadlineExceeded("the deadline of the call is over")
        content = None if body is None else {**body, "deadline_s": min(remaining, LONGEST_DEADLINE_S)}
        async with self._translated(), asyncio.timeout(remaining + LATE_REPLY_S):  # httpx's own are for each read
            response = await self._connections.request(
                method, f".{path}", json=content, timeout=httpx.Timeout(None, connect=remaining)
            )
        if response.status_code != httpx.codes.OK:
            raise read_error(response.status_code, response.content, response.headers)
        return response

    @asynccontextmanager
    async def _translated(self) -> AsyncIterator[None]:
        """httpx's errors as ours."""
        where = shown(self._url)
        try:
            yield
        except TimeoutError:
            raise DeadlineExceeded(f"{where} did not answer within the deadline") from None
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise ConfigError(f"the certificate of {where} is not trusted; name its CA's file as verify") from None
            raise Unavailable(f"nobody answers at {where}; is the endpoint up?") from None
        except httpx.RequestError as error:
            message = f"the connection to {where} broke ({type(error).__name__})"
            raise Unavailable(message, **{CONNECTION_LOST: True}) from None


def reward_of(place: int, row: Scored) -> float:
    """A row's reward. Raises the error that the row has instead, as the class that its status names."""
    if row.reward is not None:
        return row.reward
    kind = error_kinds().get(row.status, PolarRayError)
    raise kind(f"row {place}: {row.detail}", row=place)


def _in_place(refused: Mapping[int, Scored], answers: Sequence[Scored]) -> list[Scored]:
    """The rows that were sent and those that were not, in the caller's order."""
    remaining = iter(answers)
    places = range(len(refused) + len(answers))
    return [refused[place] if place in refused else next(remaining) for place in places]


def _check_reply(reply: RewardsReply, n_rows: int) -> None:
    if [row.index for row in reply.rewards] != list(range(n_rows)):
        raise EngineProtocolError(f"{n_rows} rows were sent and {len(reply.rewards)} came back, or in another order")
    for row in reply.rewards:
        if (row.reward is not None) != (row.status == STATUS_OK) or not isfinite(row.reward or 0.0):
            raise EngineProtocolError(f"row {row.index} came back with status {row.status!r} and reward {row.reward}")


async def _all_or_first_error(work: Sequence[Any]) -> None:
    """Run everything; the first error cancels the rest and is raised by itself, not in a group."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _ignore(rows: int) -> None:
    """Nobody watches."""
