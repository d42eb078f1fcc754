"""`RewardService`: what one replica does, without HTTP and without Ray."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self, TypeVar, get_args

from polar_ray.config import ServeConfig
from polar_ray.encoding.encode import EncodedTriple
from polar_ray.encoding.tokenizer import PolarTokenizer
from polar_ray.engines.build import resolve_engine
from polar_ray.engines.threads import in_passing_thread
from polar_ray.errors import (
    DeadlineExceeded,
    EngineError,
    EngineStartError,
    EngineUnavailable,
    ReceiptMismatch,
    RequestTooLarge,
    TripleError,
    TripleTooLong,
    Unavailable,
)
from polar_ray.model.locate import is_untrained, locate_model
from polar_ray.receipts import Receipt, build_receipt
from polar_ray.scoring import CANARY, Outcome, Scorer, has_gpu, scored_row
from polar_ray.serving.admission import Admission
from polar_ray.serving.batcher import SHUTTING_DOWN, Batcher, Computed
from polar_ray.serving.metrics import Metrics
from polar_ray.tracing import Tracing
from polar_ray.triples import TEXT_FIELDS, Rendered, Row, Scored, Text, TokenIds, Triple
from polar_ray.wire import (
    CallOptions,
    LimitsReply,
    ModelReply,
    Priority,
    RewardRow,
    RewardsReply,
    TimingsReply,
    UsageReply,
)

T = TypeVar("T")

ENCODING_THREADS = 2
"""SentencePiece works in one thread a call; a second lets one call be encoded while another is read."""

ENCODING_TOKENS = 8192
"""Rows that are encoded at a time have about so many. SentencePiece lets no other thread run meanwhile, so that takes
some 30 ms; between two times other callers have their turn, and a call that nobody waits for any more ends."""

QUEUED_ENGINE_CALLS = 64
"""Engine calls' worth of tokens that may wait, where `queue.max_queued_tokens` does not say."""

BROKEN = "the engine fails on a triple that it scored when it came up"
"""Then no row of a caller is to blame."""

CHARACTERS_PER_TOKEN = 3
"""A guess at what a text will come to, for the time until it is encoded; low, so that the guess is high."""


@dataclass(frozen=True)
class Model:
    """What a replica serves, and how its rewards are made."""

    name: str
    receipt: Receipt
    untrained: bool
    scorer: Scorer

    @classmethod
    def load(cls, config: ServeConfig) -> Self:
        """Find the checkpoint, load it and score one triple with it. Blocking: minutes for a large model.

        Raises `CheckpointError`, `ConfigError` or `EngineStartError`.
        """
        folder = locate_model(config.model, config.revision)
        on_gpu = config.engine.device == "auto" and has_gpu()
        engine = resolve_engine(config.engine, folder, has_gpu=on_gpu, max_tokens=config.limits.max_tokens)
        receipt = build_receipt(folder, PolarTokenizer(folder), engine, config.limits)
        scorer = Scorer.open(config.model, revision=config.revision, engine=engine, limits=config.limits)
        first = in_passing_thread(lambda: scorer.score([CANARY]))[0]
        if not first.is_ok:
            raise EngineStartError(f"the engine came up and cannot score: {first.detail}")
        return cls(Path(config.model).name, receipt, is_untrained(folder), scorer)


@dataclass(frozen=True, slots=True)
class Result:
    """A call's rows, in order, with what they cost and where the time went."""

    scored: list[Scored]
    computed_tokens: int
    encode_s: float
    queue_s: float
    engine_s: float
    total_s: float

    @property
    def tokens(self) -> int:
        return sum(row.tokens for row in self.scored)


class RewardService:
    """Scores the calls of many callers with one engine. Build it inside a running event loop.

    The rewards are those of `Scorer.score` with the same settings; other callers' rows in the same engine call can
    move one by rounding.
    """

    def __init__(
        self, model: Model, config: ServeConfig, *, replica: str = "local", tracing: Tracing | None = None
    ) -> None:
        """`tracing` is as the environment asks for, unless given."""
        self.config = config
        self.tracing = tracing or Tracing.from_environment()
        self.model = model
        self.metrics = Metrics(replica, self.receipt_id)
        self._loop = asyncio.get_running_loop()
        self._created = int(time.time())
        self._is_broken = False
        self._is_closed = False
        self._encoders = ThreadPoolExecutor(max_workers=ENCODING_THREADS, thread_name_prefix="polar-ray-encode")
        self._batcher = Batcher(
            self._compute,
            token_budget=model.scorer.token_budget,
            batch_wait_s=config.queue.batch_wait_s,
            bulk_share=config.queue.bulk_share,
            share_prefixes=model.scorer.shares_prefixes,
        )
        limit = config.queue.max_queued_tokens or QUEUED_ENGINE_CALLS * model.scorer.token_budget
        self._admission = Admission(self._batcher, limit)
        for priority in get_args(Priority):
            self.metrics.watch_pending(priority, partial(self._admission.pending_tokens, priority))

    @property
    def receipt_id(self) -> str:
        return self.model.receipt.receipt_id

    @property
    def pending_tokens(self) -> int:
        """What autoscaling goes by."""
        return self._admission.pending_tokens()

    async def score(self, rows: Sequence[Row], options: CallOptions, *, arrived: float | None = None) -> Result:
        """One `Scored` per row, in order. `arrived` is when the request came, by `time.monotonic`.

        Raises `RequestTooLarge`, `ReceiptMismatch`, `Overloaded`, `DeadlineExceeded`, or an `EngineError` that took
        the engine away; when the awaiting task is cancelled, what was not started never is.
        """
        arrived = time.monotonic() if arrived is None else arrived
        deadline = arrived + (options.deadline_s or self.config.queue.default_deadline_s)
        self.check_size(len(rows))
        self._check_receipt(options)
        encoded = await self._encode(rows, options, deadline)
        encoded_at = time.monotonic()
        computable = [row for row in encoded if isinstance(row, EncodedTriple)]
        cost = _cost(computable, share_prefixes=self.model.scorer.shares_prefixes)
        self._admission.check_deadline(cost, options.priority, deadline)
        computed = await self._batcher.run(computable, priority=options.priority, deadline=deadline)
        scored = _join(rows, encoded, computed)
        self.metrics.count_rows(rows, scored, computed.queue_s)
        return Result(
            scored,
            sum(outcome.computed_tokens for outcome in computed.outcomes),
            encode_s=encoded_at - arrived,
            queue_s=computed.queue_s,
            engine_s=computed.engine_s,
            total_s=time.monotonic() - arrived,
        )

    def reply(self, result: Result) -> RewardsReply:
        """A result as `POST /v1/rewards` answers it."""
        return RewardsReply(
            model=self.model.name,
            receipt_id=self.receipt_id,
            rewards=[_reward_row(index, row) for index, row in enumerate(result.scored)],
            usage=UsageReply(rows=len(result.scored), tokens=result.tokens, computed_tokens=result.computed_tokens),
            timings=TimingsReply(
                encode_s=result.encode_s, queue_s=result.queue_s, engine_s=result.engine_s, total_s=result.total_s
            ),
        )

    def describe(self) -> ModelReply:
        """The model, its receipt and its limits."""
        limits = self.config.limits.model_dump()
        return ModelReply(
            id=self.model.name,
            created=self._created,
            untrained=self.model.untrained,
            token_budget=self.model.scorer.token_budget,
            receipt_id=self.receipt_id,
            receipt=self.model.receipt.model_dump(),
            limits=LimitsReply(
                **limits,
                max_rows=self.config.requests.max_rows,
                max_body_bytes=self.config.requests.max_body_bytes,
                max_text_characters=self.config.requests.max_text_characters,
                max_queued_tokens=self._admission.max_queued_tokens,
                default_deadline_s=self.config.queue.default_deadline_s,
            ),
        )

    def check_health(self) -> None:
        """Raise `EngineError` if this replica will give no more rewards and must be replaced."""
        if self._is_broken:
            raise EngineError(BROKEN)
        if not self._batcher.is_alive:
            raise EngineError("nothing takes calls to the engine any more")
        if not self.model.scorer.is_running():
            raise EngineError("a process of the engine's has ended")
        since = self._batcher.computing_since
        if since is not None and time.monotonic() - since > self.config.engine_timeout_s:
            raise EngineError(f"an engine call takes longer than engine_timeout_s = {self.config.engine_timeout_s:g}")

    async def close(self) -> None:
        """Finish the engine call in progress, refuse the rest, release the engine. May be called twice."""
        self._is_closed = True
        await self._batcher.close()
        self._encoders.shutdown(wait=False)
        self.model.scorer.close()

    def check_size(self, rows: int) -> None:
        """Raise `RequestTooLarge` if no request may have so many."""
        most = self.config.requests.max_rows
        if rows > most:
            raise RequestTooLarge(f"{rows} rows, and requests.max_rows = {most}; send them in parts", max_rows=most)

    async def aside(self, work: Callable[[], T]) -> T:
        """What `work` returns, called where it holds up no other caller: for bodies and replies that are large.

        Raises `Unavailable` after `close`.
        """
        if self._is_closed:
            raise Unavailable(SHUTTING_DOWN)
        return await self._loop.run_in_executor(self._encoders, work)

    def _check_receipt(self, options: CallOptions) -> None:
        if options.expect_receipt is not None and options.expect_receipt != self.receipt_id:
            raise ReceiptMismatch(
                f"this endpoint's receipt is {self.receipt_id}, not the expected one; GET /v1/models says why",
                receipt_id=self.receipt_id,
            )

    async def _encode(
        self, rows: Sequence[Row], options: CallOptions, deadline: float
    ) -> list[EncodedTriple | TripleError]:
        rows = [self._too_long(row) or row for row in rows]
        guesses = [_guess_tokens(row) for row in rows]
        encoded: list[EncodedTriple | TripleError] = []
        with self._admission.reserve(sum(guesses), options.priority, deadline):
            try:
                async with asyncio.timeout_at(deadline):
                    for part in _parts(rows, guesses):
                        encoded += await self.aside(partial(self.model.scorer.encode, part))
            except TimeoutError:
                raise DeadlineExceeded("the deadline passed while the rows were encoded") from None
        return encoded

    def _too_long(self, row: Row) -> TripleTooLong | None:
        most = self.config.requests.max_text_characters
        for field, length in _lengths(row).items():
            if length > most:
                return TripleTooLong(
                    f"{field}: {length} characters, and requests.max_text_characters = {most}; shorten it", field=field
                )
        return None

    def _compute(self, rows: Sequence[EncodedTriple]) -> list[Outcome]:
        """In the engine's thread."""
        scorer = self.model.scorer
        before = scorer.usage.copy()
        try:
            outcomes = scorer.compute(rows)
        except Exception:
            self._raise_if_broken()
            raise
        self.metrics.count_engine_work(scorer.usage - before)
        if any(isinstance(outcome.reward, EngineError) for outcome in outcomes):
            self._raise_if_broken()
        return outcomes

    def _raise_if_broken(self) -> None:
        """In the engine's thread, after a failure: are the rows to blame, or the engine?"""
        try:
            self._is_broken = not self.model.scorer.score([CANARY])[0].is_ok
        except Exception:
            self._is_broken = True
        if self._is_broken:
            raise EngineUnavailable(f"{BROKEN}; ask again, another replica takes its place") from None


def freeze_heap() -> None:
    """Leave all that lives now out of the garbage collector's sight, for good.

    For a process that does nothing but serve, once it is ready to: what it has loaded (torch, transformers, Ray; some
    300,000 objects) stays as long as it does, and a full collection that walks it stops every caller for 200 ms.
    """
    gc.collect()
    gc.freeze()


def _cost(rows: Sequence[EncodedTriple], *, share_prefixes: bool) -> int:
    """Tokens to compute for these rows alone, what their groups share counted once if it is computed once."""
    if not share_prefixes:
        return sum(len(row.ids) for row in rows)
    prefixes = {row.ids[: row.halfway].tobytes(): row.shareable for row in rows}
    return sum(prefixes.values()) + sum(len(row.ids) - row.shareable for row in rows)


def _parts(rows: Sequence[Row], guesses: Sequence[int]) -> Iterator[list[Row]]:
    """The rows in order, about `ENCODING_TOKENS` at a time by the guess of each."""
    part: list[Row] = []
    tokens = 0
    for row, guess in zip(rows, guesses, strict=True):
        part.append(row)
        tokens += guess
        if tokens >= ENCODING_TOKENS:
            yield part
            part, tokens = [], 0
    if part:
        yield part


def _guess_tokens(row: Row) -> int:
    if isinstance(row, TokenIds):
        return len(row.ids)
    lengths = _lengths(row)
    return (sum(lengths.values()) + lengths.get("prompt", 0)) // CHARACTERS_PER_TOKEN  # the prompt stands there twice


def _lengths(row: Row) -> dict[str, int]:
    """Characters of each text of a row."""
    if isinstance(row, Triple):
        return {name: _length(getattr(row, name)) for name in TEXT_FIELDS}
    return {"text": len(row.text)} if isinstance(row, Rendered) else {}


def _length(text: Text) -> int:
    return len(text) if isinstance(text, str) else sum(len(message["content"]) for message in text)


def _join(rows: Sequence[Row], encoded: Sequence[EncodedTriple | TripleError], computed: Computed) -> list[Scored]:
    outcomes = iter(computed.outcomes)
    return [
        scored_row(
            found,
            next(outcomes) if isinstance(found, EncodedTriple) else None,
            row.id if isinstance(row, Triple) else None,
        )
        for row, found in zip(rows, encoded, strict=True)
    ]


def _reward_row(index: int, row: Scored) -> RewardRow:
    return RewardRow(
        index=index,
        id=row.id,
        reward=row.reward,
        status=row.status,
        detail=row.detail,
        tokens=row.tokens,
        cut_tokens=row.cut_tokens,
        removed_control_tokens=row.removed_control_tokens,
    )
