"""One engine, many callers: whose rows go into the next engine call.

Why not `serve.batch`: it counts items and not tokens, one bad item fails a whole batch, and an error in its size
function hangs the replica for good (ray-project/ray#66140). Here a call's rows are cut into chunks, one for each group
of them. Of interactive calls the one that is due first is first. It is due at its deadline, or sooner, after `PATIENCE`
times what the engine would take for it alone: so a call of one row does not wait for one of ten thousand, nor that for
ever, and whoever can wait lets pass who cannot. Bulk calls stand in one line and get `bulk_share` of the tokens while
interactive ones wait, everything while none do. Whoever is next takes along the chunks of other callers that begin
with the same ids, because they cost their own tokens only.

Pure asyncio: no Ray, no HTTP. Times are of `time.monotonic`, asyncio's own clock, which uvloop's rounds. The engine
runs in one thread of its own, so that the event loop stays free.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from polar_ray.encoding.encode import EncodedTriple
from polar_ray.errors import DeadlineExceeded, EngineError, PolarRayError, Unavailable
from polar_ray.scoring import Outcome
from polar_ray.wire import Priority

Compute = Callable[[Sequence[EncodedTriple]], list[Outcome]]
"""`Scorer.compute`, or what stands around it. Called in the engine's thread, one call at a time."""

RATE_WEIGHT = 0.2
"""Of the newest engine call in the moving average of the engine's speed: the last ten or so decide."""

TELLING_FRACTION = 0.5
"""Of the token budget: an engine call that holds less tells of its fixed cost, and little of the engine's speed."""

PATIENCE = 16.0
"""Times what a call would take alone, after which it is due. With less, large calls hold up small ones; with more, they
wait until their deadlines are near (`jobs/bench/deadlines.py`)."""

GUESSED_TOKENS_PER_S = 20_000.0
"""While the engine's speed is not known; only the order of calls depends on it."""

DEAD_ENTRIES = 64
"""That a queue may hold beside as many as wait: of calls that were cancelled, or that went along with others."""


SHUTTING_DOWN = "the endpoint is shutting down; ask again"


@dataclass(frozen=True, slots=True)
class Computed:
    """What became of a caller's rows, in order, and where the time went."""

    outcomes: list[Outcome]
    queue_s: float
    engine_s: float


@dataclass(eq=False, slots=True)
class _Call:
    """One caller's rows, until the last of them is computed."""

    rows: Sequence[EncodedTriple]
    priority: Priority
    arrived: float
    deadline: float
    future: asyncio.Future[list[Outcome]]
    waiting_tokens: int = 0
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    started: float | None = None
    """When the engine took the first of the rows."""

    def receive(self, places: Sequence[int], outcomes: Sequence[Outcome]) -> None:
        self.outcomes.update(zip(places, outcomes, strict=True))
        if len(self.outcomes) == len(self.rows) and not self.future.done():
            self.future.set_result([self.outcomes[place] for place in range(len(self.rows))])

    def fail(self, error: PolarRayError) -> None:
        if not self.future.done():
            self.future.set_exception(error)


@dataclass(eq=False, slots=True)
class _Chunk:
    """Rows of one call that begin with the same ids."""

    call: _Call
    places: list[int]
    key: bytes
    prefix_tokens: int
    own_tokens: int
    is_waiting: bool = True

    @property
    def tokens(self) -> int:
        """What it costs in nobody's company."""
        return self.prefix_tokens + self.own_tokens


class Batcher:
    """Computes callers' rows on one engine.

    Build it inside a running event loop. Promises: every call gets one outcome per row, in order, or one typed error;
    rows of a call that is cancelled, past its deadline or sure to pass it are not started; an engine call holds
    `token_budget` computed tokens, or one chunk that is larger by itself.
    """

    def __init__(
        self,
        compute: Compute,
        *,
        token_budget: int,
        batch_wait_s: float = 0.005,
        bulk_share: float = 0.125,
        share_prefixes: bool = True,
    ) -> None:
        """`share_prefixes` is whether `compute` shares them, on which the cost of rows depends."""
        self._compute = compute
        self._share_prefixes = share_prefixes
        self._batch_wait_s = batch_wait_s
        self._bulk_share = bulk_share
        self._loop = asyncio.get_running_loop()
        self._queues: dict[Priority, list[tuple[float, int, _Chunk]]] = {"interactive": [], "bulk": []}
        self._order = itertools.count()
        self._by_key: defaultdict[bytes, list[_Chunk]] = defaultdict(list)
        self._pending: dict[Priority, int] = {"interactive": 0, "bulk": 0}
        self._waiting_chunks: dict[Priority, int] = {"interactive": 0, "bulk": 0}
        self._in_flight_tokens = 0
        self._bulk_credit = 0.0
        self._waiting_since = 0.0
        self._arrived = asyncio.Event()
        self._is_closing = False
        self._calls: dict[_Call, list[_Chunk]] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="polar-ray-engine")
        self._worker = asyncio.create_task(self._work(), name="polar-ray-batcher")
        self.token_budget = token_budget
        """Computed tokens of one engine call."""

        self.tokens_per_s: float | None = None
        """Computed tokens per second of engine time, of late; None until an engine call was half full."""

        self.computing_since: float | None = None
        """When the engine call in progress began, by `time.monotonic`; None between calls."""

    async def run(self, rows: Sequence[EncodedTriple], *, priority: Priority, deadline: float) -> Computed:
        """The outcome of each row, in order. `deadline` is a time of `time.monotonic`.

        Raises `DeadlineExceeded`, `Unavailable` after `close`, or the error that took the engine away. When the
        awaiting task is cancelled, rows that were not started never are.
        """
        if self._is_closing:
            raise Unavailable(SHUTTING_DOWN)
        now = time.monotonic()
        if not rows:
            return Computed([], 0.0, 0.0)
        call = _Call(rows, priority, now, deadline, self._loop.create_future())
        self._enqueue(call)
        try:
            async with asyncio.timeout_at(deadline):
                outcomes = await call.future
        except TimeoutError as error:
            if isinstance(error, PolarRayError):
                raise
            message = "the deadline passed before all rows were computed; ask for fewer at once, or wait longer"
            raise DeadlineExceeded(message) from None
        finally:
            self._withdraw(call)
            del self._calls[call]
            self._forget_the_dead(priority)
        started = call.started if call.started is not None else now
        return Computed(outcomes, started - now, time.monotonic() - started)

    def pending_tokens(self, priority: Priority | None = None) -> int:
        """Tokens that wait or are being computed; of one priority, or of both."""
        return sum(self._pending.values()) if priority is None else self._pending[priority]

    def due(self, arrived: float, tokens: int, deadline: float) -> float:
        """When a call of so many tokens is to be done; who is due first is first."""
        return min(deadline, arrived + PATIENCE * tokens / (self.tokens_per_s or GUESSED_TOKENS_PER_S))

    def tokens_ahead(self, tokens: int, priority: Priority, deadline: float) -> int:
        """What the engine would compute before it is done with a call of so many tokens that came now, beside it."""
        if priority == "bulk":
            return self.pending_tokens()
        due = self.due(time.monotonic(), tokens, deadline)
        queue = self._queues["interactive"]
        waiting = sum(chunk.tokens for other, _, chunk in queue if chunk.is_waiting and other <= due)
        return waiting + self._in_flight_tokens

    def seconds_ahead(self, tokens: int, priority: Priority, deadline: float) -> float | None:
        """How long a call of so many tokens would take if it came now; None while the engine's speed is not known."""
        if self.tokens_per_s is None:
            return None
        return (self.tokens_ahead(tokens, priority, deadline) + tokens) / self.tokens_per_s

    async def close(self) -> None:
        """Stop after the engine call in progress; what still waits is told `Unavailable`. May be called twice."""
        self._is_closing = True
        self._arrived.set()
        await asyncio.gather(self._worker, return_exceptions=True)
        for call in tuple(self._calls):
            call.fail(Unavailable(SHUTTING_DOWN))
        self._thread.shutdown(wait=True, cancel_futures=True)

    @property
    def is_alive(self) -> bool:
        """Whether anybody will ever take what waits."""
        return not self._worker.done()

    def _enqueue(self, call: _Call) -> None:
        if not any(self._queues.values()):
            self._waiting_since = call.arrived
        chunks = self._calls[call] = list(_chunks(call, self.token_budget, self._share_prefixes))
        tokens = call.waiting_tokens = sum(chunk.tokens for chunk in chunks)
        due = 0.0 if call.priority == "bulk" else self.due(call.arrived, tokens, call.deadline)
        for chunk in chunks:  # of one time they keep their order, and so do bulk calls
            heapq.heappush(self._queues[call.priority], (due, next(self._order), chunk))
            self._by_key[chunk.key].append(chunk)
        self._pending[call.priority] += tokens
        self._waiting_chunks[call.priority] += len(chunks)
        self._arrived.set()

    def _withdraw(self, call: _Call) -> None:
        """Take what still waits of a call out of the queue; its place in the heap may be left until it comes up."""
        for chunk in self._calls[call]:
            if chunk.is_waiting:
                self._leave_queue(chunk)
                self._pending[call.priority] -= chunk.tokens

    def _leave_queue(self, chunk: _Chunk) -> None:
        chunk.is_waiting = False
        chunk.call.waiting_tokens -= chunk.tokens
        self._waiting_chunks[chunk.call.priority] -= 1
        same = self._by_key[chunk.key]
        same.remove(chunk)
        if not same:
            del self._by_key[chunk.key]

    def _forget_the_dead(self, priority: Priority) -> None:
        """Callers that hang up and ask again would else fill a queue, whose end is far off, with their rows."""
        queue = self._queues[priority]
        if len(queue) > 2 * self._waiting_chunks[priority] + DEAD_ENTRIES:
            queue[:] = [entry for entry in queue if entry[2].is_waiting]
            heapq.heapify(queue)

    async def _work(self) -> None:
        while not self._is_closing:
            await self._arrived.wait()
            await self._wait_for_company()
            taken = [] if self._is_closing else self._take()
            if taken:
                await self._execute(taken)
            else:
                self._arrived.clear()

    async def _wait_for_company(self) -> None:
        """Callers that come together are some milliseconds apart; only a queue that was empty is worth the wait."""
        rest = self._waiting_since + self._batch_wait_s - time.monotonic()
        if rest > 0 and self.pending_tokens() < self.token_budget:
            await asyncio.sleep(rest)

    def _take(self) -> list[_Chunk]:
        """The chunks of the next engine call, out of the queue."""
        self._fail_the_late()
        taken: list[_Chunk] = []
        used = 0
        while (chunk := self._next()) is not None:
            if taken and used + chunk.tokens > self.token_budget:
                break
            used += chunk.prefix_tokens
            for member in (chunk, *(other for other in self._by_key[chunk.key] if other is not chunk)):
                if member is chunk or used + member.own_tokens <= self.token_budget:
                    self._leave_queue(member)
                    taken.append(member)
                    used += member.own_tokens
            self._account(chunk)
        return taken

    def _next(self) -> _Chunk | None:
        """Whose turn it is; it stays in the queue. None if nobody waits."""
        interactive, bulk = self._head("interactive"), self._head("bulk")
        if interactive is None or (bulk is not None and self._bulk_credit >= bulk.tokens):
            return bulk or interactive
        return interactive

    def _account(self, chunk: _Chunk) -> None:
        """Bulk earns its share of what interactive calls get, while it waits, and pays with it for its turns."""
        if chunk.call.priority == "bulk":
            self._bulk_credit = max(0.0, self._bulk_credit - chunk.tokens)
        elif self._head("bulk") is not None:
            self._bulk_credit += self._bulk_share * chunk.tokens

    def _head(self, priority: Priority) -> _Chunk | None:
        """The first chunk of a queue that still waits."""
        queue = self._queues[priority]
        while queue and not queue[0][2].is_waiting:
            heapq.heappop(queue)
        return queue[0][2] if queue else None

    def _fail_the_late(self) -> None:
        """Withdraw the calls that nobody waits for any more, and fail those whose last reward would come after their
        deadline: what else would be computed of them is lost.

        The last call that is left is tried: nobody else is the worse for it, and a speed that was measured in bad times
        is measured again.
        """
        now = time.monotonic()
        waiting = [call for call in self._calls if call.waiting_tokens]
        for number, call in enumerate(waiting, 1):
            is_last = number == len(waiting) and not any(earlier.waiting_tokens for earlier in waiting[:-1])
            needed = call.waiting_tokens / self.tokens_per_s if self.tokens_per_s and not is_last else 0.0
            if now + needed > call.deadline:
                call.fail(DeadlineExceeded("what is left of the deadline is shorter than the engine needs"))
            if call.future.done():
                self._withdraw(call)

    async def _execute(self, taken: list[_Chunk]) -> None:
        self.computing_since = began = time.monotonic()
        for chunk in taken:
            chunk.call.started = chunk.call.started if chunk.call.started is not None else began
        rows = [chunk.call.rows[place] for chunk in taken for place in chunk.places]
        self._in_flight_tokens = sum(chunk.tokens for chunk in taken)
        try:
            outcomes = await self._loop.run_in_executor(self._thread, self._compute, rows)
        except Exception as error:  # whatever it is, its callers are told, and the next batch is tried
            known = (
                error if isinstance(error, PolarRayError) else EngineError(f"the engine failed: {type(error).__name__}")
            )
            for chunk in taken:
                chunk.call.fail(known)
        else:
            self._measure(sum(outcome.computed_tokens for outcome in outcomes), time.monotonic() - began)
            results = iter(outcomes)
            for chunk in taken:
                chunk.call.receive(chunk.places, list(itertools.islice(results, len(chunk.places))))
        finally:
            self.computing_since = None
            self._in_flight_tokens = 0
            for chunk in taken:
                self._pending[chunk.call.priority] -= chunk.tokens

    def _measure(self, computed_tokens: int, seconds: float) -> None:
        if computed_tokens < TELLING_FRACTION * self.token_budget:
            return
        rate = computed_tokens / max(seconds, 1e-6)
        self.tokens_per_s = (
            rate if self.tokens_per_s is None else self.tokens_per_s + RATE_WEIGHT * (rate - self.tokens_per_s)
        )


def _chunks(call: _Call, token_budget: int, share_prefixes: bool) -> Iterator[_Chunk]:
    """The call's rows by what they begin with, groups in order of arrival, those beyond the budget in parts."""
    groups: dict[bytes, list[int]] = {}
    for place, row in enumerate(call.rows):
        groups.setdefault(row.ids[: row.halfway].tobytes(), []).append(place)
    for key, places in groups.items():
        prefix_tokens = min(call.rows[place].shareable for place in places) if share_prefixes else 0
        part: list[int] = []
        own_tokens = 0
        for place in places:
            tokens = len(call.rows[place].ids) - prefix_tokens
            if part and prefix_tokens + own_tokens + tokens > token_budget:
                yield _Chunk(call, part, key, prefix_tokens, own_tokens)
                part, own_tokens = [], 0
            part.append(place)
            own_tokens += tokens
        yield _Chunk(call, part, key, prefix_tokens, own_tokens)
