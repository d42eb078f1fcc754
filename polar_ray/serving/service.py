"""`RewardService`: what one replica does, without HTTP and without Ray."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self, get_args

from polar_ray.config import ServeConfig
from polar_ray.encoding.encode import EncodedTriple
from polar_ray.encoding.tokenizer import PolarTokenizer
from polar_ray.engines.build import resolve_engine
from polar_ray.errors import (
    DeadlineExceeded,
    EngineError,
    EngineStartError,
    EngineUnavailable,
    ReceiptMismatch,
    RequestTooLarge,
    TripleError,
)
from polar_ray.model.locate import is_untrained, locate_model
from polar_ray.receipts import Receipt, build_receipt
from polar_ray.scoring import CANARY, Outcome, Scorer, has_gpu, scored_row
from polar_ray.serving.admission import Admission
from polar_ray.serving.batcher import Batcher, Computed
from polar_ray.serving.metrics import Metrics
from polar_ray.triples import Rendered, Row, Scored, Text, TokenIds, Triple
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

ENCODING_THREADS = 2
"""SentencePiece works in one thread a call; a second keeps a small call from waiting for a large one."""

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
        engine = resolve_engine(config.engine, folder, has_gpu=config.engine.device == "auto" and has_gpu())
        receipt = build_receipt(folder, PolarTokenizer(folder), engine, config.limits)
        scorer = Scorer.open(config.model, revision=config.revision, engine=engine, limits=config.limits)
        first = scorer.score([CANARY])[0]
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

    def __init__(self, model: Model, config: ServeConfig, *, replica: str = "local") -> None:
        self.config = config
        self.model = model
        self.metrics = Metrics(replica)
        self._loop = asyncio.get_running_loop()
        self._created = int(time.time())
        self._is_broken = False
        self._encoders = ThreadPoolExecutor(max_workers=ENCODING_THREADS, thread_name_prefix="polar-ray-encode")
        self._batcher = Batcher(
            self._compute,
            token_budget=model.scorer.token_budget,
            batch_wait_s=config.queue.batch_wait_s,
            bulk_share=config.queue.bulk_share,
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
        self._check(rows, options)
        encoded = await self._encode(rows, options, deadline)
        encoded_at = time.monotonic()
        computable = [row for row in encoded if isinstance(row, EncodedTriple)]
        self._admission.check_deadline(_cost(computable), options.priority, deadline - encoded_at)
        computed = await self._batcher.run(computable, priority=options.priority, deadline=deadline)
        scored = _join(rows, encoded, computed)
        self.metrics.count_rows(scored, computed.queue_s)
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
        since = self._batcher.computing_since
        if since is not None and time.monotonic() - since > self.config.engine_timeout_s:
            raise EngineError(f"an engine call takes longer than engine_timeout_s = {self.config.engine_timeout_s:g}")

    async def close(self) -> None:
        """Finish the engine call in progress, refuse the rest, release the engine. May be called twice."""
        await self._batcher.close()
        self._encoders.shutdown(wait=False, cancel_futures=True)
        self.model.scorer.close()

    def _check(self, rows: Sequence[Row], options: CallOptions) -> None:
        most = self.config.requests.max_rows
        if len(rows) > most:
            raise RequestTooLarge(
                f"{len(rows)} rows, and requests.max_rows = {most}; send them in parts", max_rows=most
            )
        if options.expect_receipt is not None and options.expect_receipt != self.receipt_id:
            raise ReceiptMismatch(
                f"this endpoint's receipt is {self.receipt_id}, not the expected one; GET /v1/models says why",
                receipt_id=self.receipt_id,
            )

    async def _encode(
        self, rows: Sequence[Row], options: CallOptions, deadline: float
    ) -> list[EncodedTriple | TripleError]:
        with self._admission.reserve(_guess_tokens(rows), options.priority):
            try:
                async with asyncio.timeout_at(deadline):
                    return await self._loop.run_in_executor(self._encoders, self.model.scorer.encode, rows)
            except TimeoutError:
                raise DeadlineExceeded("the deadline passed while the rows were encoded") from None

    def _compute(self, rows: Sequence[EncodedTriple]) -> list[Outcome]:
        """In the engine's thread."""
        scorer = self.model.scorer
        before = scorer.usage.copy()
        outcomes = scorer.compute(rows)
        used = scorer.usage - before
        self.metrics.count_engine_call(used.computed_tokens, used.engine_seconds)
        if any(
            isinstance(outcome.reward, EngineError) and outcome.reward.code == EngineError.code for outcome in outcomes
        ):
            self._is_broken = not scorer.score([CANARY])[0].is_ok
            if self._is_broken:
                raise EngineUnavailable(f"{BROKEN}; ask again, another replica takes its place")
        return outcomes


def freeze_heap() -> None:
    """Leave all that lives now out of the garbage collector's sight, for good.

    For a process that does nothing but serve, once it is ready to: what it has loaded (torch, transformers, Ray; some
    300,000 objects) stays as long as it does, and a full collection that walks it stops every caller for 200 ms.
    """
    gc.collect()
    gc.freeze()


def _cost(rows: Sequence[EncodedTriple]) -> int:
    """Tokens to compute for these rows alone, what their groups share counted once."""
    prefixes = {row.ids[: row.halfway].tobytes(): row.shareable for row in rows}
    return sum(prefixes.values()) + sum(len(row.ids) - row.shareable for row in rows)


def _guess_tokens(rows: Sequence[Row]) -> int:
    return sum(_guess_row_tokens(row) for row in rows)


def _guess_row_tokens(row: Row) -> int:
    if isinstance(row, Triple):
        prompt, reference, output = map(_length, (row.prompt, row.reference, row.output))
        return (2 * prompt + reference + output) // CHARACTERS_PER_TOKEN
    if isinstance(row, Rendered):
        return len(row.text) // CHARACTERS_PER_TOKEN
    return len(row.ids) if isinstance(row, TokenIds) else 0


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
