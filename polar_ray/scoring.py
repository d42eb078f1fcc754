"""`Scorer`: triples in, rewards out. The one road from a triple to a number, in notebooks, jobs and servers."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np

from polar_ray.config import EMBEDDED_MODEL, EngineConfig, LimitsConfig
from polar_ray.encoding.encode import EncodedTriple, Encoder
from polar_ray.encoding.tokenizer import PolarTokenizer
from polar_ray.engines.base import Engine, HasProcesses
from polar_ray.engines.build import HAVE_NO_WEIGHTS, build_engine, resolve_engine
from polar_ray.errors import (
    EngineError,
    EngineProtocolError,
    EngineUnavailable,
    NonFiniteReward,
    ProcessCrashed,
    TripleError,
)
from polar_ray.model.cost import flops_of_batches, peak_flops_of
from polar_ray.model.locate import locate_model
from polar_ray.planning import Batch, Plan, plan
from polar_ray.triples import STATUS_OK, Rendered, Row, Scored, Triple

if TYPE_CHECKING:
    from polar_ray.model.architecture import CheckpointConfig

CANARY = Triple("1 + 1 = ?", "2", "2")
"""Scored to tell a broken engine from bad rows, and to warm one up."""

FIRST_PART_ROWS, PART_ROWS = 128, 1024
"""Of a long list of triples. The engine waits for the first part alone; each next one, twice as large up to the second
number, is encoded while it computes. A part has more where rows of one prompt and reference would be torn apart."""

ROWS_AT_ONCE = 16
"""That are encoded in one call: meanwhile the tokenizer lets no other thread run, the engine's among them."""


@dataclass(slots=True)
class Usage:
    """Work done so far. `tokens` is what the rows hold, `computed_tokens` what went through the model."""

    rows: int = 0
    tokens: int = 0
    computed_tokens: int = 0
    duplicates: int = 0
    engine_seconds: float = 0.0
    engine_calls: int = 0
    budget_tokens: int = 0
    """Computed tokens that the engine calls had room for."""

    flops: float = 0.0
    """Floating point operations of the computed tokens; 0 where the peak is not known."""

    peak_flops: float = 0.0
    """Operations that the data sheet promises for the engine's seconds; 0 where it is not known."""

    def __sub__(self, earlier: Usage) -> Usage:
        return Usage(*(getattr(self, field.name) - getattr(earlier, field.name) for field in fields(self)))

    def copy(self) -> Usage:
        return Usage(*(getattr(self, field.name) for field in fields(self)))


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """What a model's floating point operations are counted by, and what its engine's GPUs could do."""

    shape: CheckpointConfig
    peak_flops_per_s: float

    @classmethod
    def of(cls, engine: EngineConfig, folder: Path) -> Self | None:
        """For resolved settings; None unless the engine computes here, on GPUs whose peak in its dtype is known."""
        if engine.device != "cuda" or engine.is_elsewhere or engine.kind in HAVE_NO_WEIGHTS:
            return None
        import torch

        from polar_ray.model.checkpoint import read_config

        peak = peak_flops_of(torch.cuda.get_device_name(), engine.dtype)
        return None if peak is None else cls(read_config(folder), peak * engine.tensor_parallel_size)


@dataclass(frozen=True, slots=True)
class Outcome:
    """A sequence's reward or the error in its place, and the tokens that were computed on its account."""

    reward: float | EngineError
    computed_tokens: int


@dataclass(frozen=True, slots=True)
class Part:
    """Rows that are encoded and planned together, ready for the engine."""

    places: Sequence[int]
    encoded: list[EncodedTriple | TripleError]
    ready: list[EncodedTriple]
    """Those of `encoded` that can be computed, as `plan` numbers them."""

    plan: Plan


@dataclass(frozen=True, slots=True)
class Prepared:
    """Rows on their way to an engine: a thread encodes and plans them part by part. Good for one `Scorer.score`."""

    rows: Sequence[Row]
    _parts: deque[Future[Part]]

    def parts(self) -> Iterator[Part]:
        """Each part as soon as it is there; it is not kept."""
        while self._parts:
            yield self._parts.popleft().result()

    def cancel(self) -> None:
        """Begin no further part, and return once none is under way."""
        wait([part for part in self._parts if not part.cancel()])
        self._parts.clear()


class Scorer:
    """Scores triples with one engine under one set of limits.

        with Scorer.open("internlm/POLAR-7B") as scorer:
            rewards = [row.reward for row in scorer.score(triples)]

    Not thread-safe; one per engine.
    """

    def __init__(
        self, encoder: Encoder, engine: Engine, *, share_prefixes: bool = True, arithmetic: Arithmetic | None = None
    ) -> None:
        """`arithmetic` is what to count floating point operations by; without it they are not counted."""
        self.encoder = encoder
        self._arithmetic = arithmetic
        self._engine = engine
        self._share_prefixes = share_prefixes
        self._ahead = ThreadPoolExecutor(1, "encode")
        self.usage = Usage()

    @classmethod
    def open(
        cls,
        model: str = EMBEDDED_MODEL,
        *,
        revision: str | None = None,
        engine: EngineConfig | None = None,
        limits: LimitsConfig | None = None,
    ) -> Self:
        """A scorer on this machine's GPU, or on its CPU if there is none; `model` as in `ScoreConfig.model`.

        Raises `CheckpointError`, `ConfigError` or `EngineStartError` before anything is scored.
        """
        folder, engine, limits = locate_model(model, revision), engine or EngineConfig(), limits or LimitsConfig()
        on_gpu = engine.device == "auto" and has_gpu()
        resolved = resolve_engine(engine, folder, has_gpu=on_gpu, max_tokens=limits.max_tokens)
        encoder = Encoder(PolarTokenizer(folder), limits)
        built = build_engine(resolved, folder)
        return cls(encoder, built, share_prefixes=resolved.share_prefixes, arithmetic=Arithmetic.of(resolved, folder))

    def score(self, rows: Sequence[Row] | Prepared, on_batch: Callable[[], None] | None = None) -> list[Scored]:
        """One `Scored` per row, in order. A row that fails says so on itself and leaves the others alone.

        An error in place of a triple, left by whoever could not parse it, becomes that row's status. Identical
        triples are computed once. Many rows are encoded and planned part by part, in a thread ahead of the engine;
        what `prepare` gave for rows may stand for them. `on_batch` is called after every engine call, when `usage` has
        moved.
        """
        prepared = rows if isinstance(rows, Prepared) else self.prepare(rows)
        scored: dict[int, Scored] = {}
        try:
            for part in prepared.parts():
                outcomes = iter(self._carry_out(part.plan, part.ready, on_batch))
                for place, encoded in zip(part.places, part.encoded, strict=True):
                    row, outcome = prepared.rows[place], next(outcomes) if isinstance(encoded, EncodedTriple) else None
                    scored[place] = scored_row(encoded, outcome, row.id if isinstance(row, Triple) else None)
        finally:
            prepared.cancel()
        return [scored[place] for place in range(len(prepared.rows))]

    def prepare(self, rows: Sequence[Row]) -> Prepared:
        """Begin to encode and plan rows, once those of earlier calls are done; the engine may be at work meanwhile.

        Safe in any thread.
        """
        parts = list(parts_of(rows))
        return Prepared(rows, deque(self._ahead.submit(self._prepare, rows, part) for part in parts))

    def encode(self, rows: Sequence[Row]) -> list[EncodedTriple | TripleError]:
        """The first half of `score`: ids, or the error that stands in their place, in order. Safe in any thread."""
        return self.encoder.encode_rows(rows)

    def compute(self, encoded: Sequence[EncodedTriple], on_batch: Callable[[], None] | None = None) -> list[Outcome]:
        """The second half of `score`: an outcome for each encoded triple, in order. One thread at a time."""
        return self._carry_out(self.plan(encoded), encoded, on_batch)

    def _prepare(self, rows: Sequence[Row], places: Sequence[int]) -> Part:
        encoded: list[EncodedTriple | TripleError] = []
        for start in range(0, len(places), ROWS_AT_ONCE):
            encoded += self.encode([rows[place] for place in places[start : start + ROWS_AT_ONCE]])
        ready = [row for row in encoded if isinstance(row, EncodedTriple)]
        return Part(places, encoded, ready, self.plan(ready))

    def plan(self, encoded: Sequence[EncodedTriple]) -> Plan:
        """The batches in which `compute` has them computed. Safe in any thread."""
        return plan(
            [row.ids for row in encoded],
            token_budget=self._engine.token_budget,
            share_prefixes=self._share_prefixes,
            max_shared_length=self._engine.max_shared_length,
        )

    def _carry_out(
        self, planned: Plan, encoded: Sequence[EncodedTriple], on_batch: Callable[[], None] | None
    ) -> list[Outcome]:
        copies = np.bincount(planned.first_of, minlength=len(encoded))
        rewards: dict[int, float | EngineError] = {}
        for batch in planned.batches:
            rewards.update(self._run(batch))
            rows = int(copies[batch.rows].sum())
            self.usage.rows += rows
            self.usage.duplicates += rows - len(batch)
            self.usage.tokens += sum(int(copies[row]) * len(encoded[row].ids) for row in batch.rows)
            if on_batch is not None:
                on_batch()
        return [
            Outcome(rewards[first], computed)
            for first, computed in zip(planned.first_of.tolist(), planned.computed_by_row().tolist(), strict=True)
        ]

    @property
    def token_budget(self) -> int:
        """Computed tokens of one engine call."""
        return self._engine.token_budget

    @property
    def engine(self) -> Engine:
        return self._engine

    @property
    def shares_prefixes(self) -> bool:
        """Whether what rows have in common is computed once."""
        return self._share_prefixes

    def is_running(self) -> bool:
        """Whether the engine's own processes, if it has any, are all there. Safe in any thread."""
        return not isinstance(self._engine, HasProcesses) or self._engine.is_running()

    def close(self) -> None:
        """Release the engine. May be called twice."""
        self._ahead.shutdown(cancel_futures=True)
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, batch: Batch) -> Iterator[tuple[int, float | EngineError]]:
        """(row, outcome) of a batch; a failing batch is halved until the sequence at fault stands alone, and one that
        was planned for a larger budget than there is now until it fits."""
        if len(batch) > 1 and batch.computed_tokens > self._engine.token_budget:
            for half in batch.halves():
                yield from self._run(half)
            return
        try:
            rewards = self._call(batch)
        except (EngineUnavailable, ProcessCrashed):
            raise  # no row is to blame, and halves would wait as long again; or nothing is left to try them on
        except EngineError as error:
            if len(batch) == 1:
                yield int(batch.rows[0]), error
                return
            for half in batch.halves():
                yield from self._run(half)
            return
        finite = np.isfinite(rewards)
        yield from zip(batch.rows[finite].tolist(), rewards[finite].tolist(), strict=True)
        suspects = set(batch.rows[~finite].tolist())
        if suspects and batch.is_single:
            message = f"the engine computed {rewards[0]} for this row, alone and unshared as well"
            yield int(batch.rows[0]), NonFiniteReward(message)
        elif suspects:
            for single in batch.singles():  # neighbours and shared prefix could be the cause as well as the row
                if int(single.rows[0]) in suspects:
                    yield from self._run(single)

    def _call(self, batch: Batch) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        started = time.perf_counter()
        rewards = self._engine.score(batch)
        seconds = time.perf_counter() - started
        self.usage.engine_seconds += seconds
        self.usage.engine_calls += 1
        self.usage.budget_tokens += self._engine.token_budget
        self.usage.computed_tokens += batch.computed_tokens
        if self._arithmetic is not None:
            self.usage.flops += flops_of_batches(self._arithmetic.shape, [batch])
            self.usage.peak_flops += self._arithmetic.peak_flops_per_s * seconds
        if rewards.shape != (len(batch),):
            raise EngineProtocolError(f"expected {len(batch)} rewards, one per sequence, found shape {rewards.shape}")
        return rewards


def parts_of(rows: Sequence[Row]) -> Iterator[list[int]]:
    """Places of rows, part by part as `Scorer.score` takes them; those of one prompt and reference are in one.

    What rows of two parts have in common is computed in both.
    """
    keys = [_begins_with(row) for row in rows]
    part: list[int] = []
    room = FIRST_PART_ROWS
    for place in sorted(range(len(rows)), key=keys.__getitem__):
        if len(part) >= room and keys[place] != keys[part[-1]]:
            yield part
            part, room = [], min(2 * room, PART_ROWS)
        part.append(place)
    if part:
        yield part


def _begins_with(row: Row) -> tuple[str, str]:
    if isinstance(row, Triple):
        return str(row.prompt), str(row.reference)
    return (row.text, "") if isinstance(row, Rendered) else ("", "")


def has_gpu() -> bool:
    """Whether this machine has a GPU that torch can use."""
    import torch

    return torch.cuda.is_available()


def scored_row(
    encoded: EncodedTriple | TripleError, outcome: Outcome | None = None, given_id: str | None = None
) -> Scored:
    """What became of one row: of its encoding, and where that went well (`outcome` is then needed) of its computing."""
    if isinstance(encoded, TripleError):
        return Scored(None, encoded.code, str(encoded), id=given_id)
    assert outcome is not None
    error = outcome.reward if isinstance(outcome.reward, EngineError) else None
    return Scored(
        reward=None if isinstance(outcome.reward, EngineError) else outcome.reward,
        status=error.code if error else STATUS_OK,
        detail=str(error) if error else None,
        tokens=len(encoded.ids),
        cut_tokens=encoded.cut_tokens,
        removed_control_tokens=encoded.removed_control_tokens,
        id=given_id,
    )
