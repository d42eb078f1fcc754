"""Engines beside each other, each with shared prefixes and without, on the same ids, taking turns.

Each runs in a process of its own, started as a job would start it, and stands still while another has its turn: servers
poll even when nobody asks. The ids of every round are new, as a prefix cache would otherwise know the whole sequences.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from polar_ray.bench.processes import ProcessTree
from polar_ray.config import EngineConfig
from polar_ray.engines.base import Engine
from polar_ray.engines.build import HAVE_NO_WEIGHTS, build_engine, engine_module, resolve_engine
from polar_ray.errors import ConfigError, EngineStartError, PolarRayError
from polar_ray.model.checkpoint import Checkpoint
from polar_ray.model.reference import reference_rewards
from polar_ray.planning import Ids, Rewards, plan
from polar_ray.scoring import has_gpu

END_S = 30.0


@dataclass
class EngineResult:
    """One engine in one of its two ways: raw figures of every round, and what they come to. Rates are of medians."""

    engine: str
    version: str
    share_prefixes: bool
    dtype: str
    device: str
    tokens: int
    """Tokens of all sequences of a round."""

    planned_tokens: int
    """Those that the planner leaves when common prefixes are computed once; what `torch` computes. Other engines share
    by their own caches."""

    start_s: float
    """From nothing to ready, with the parity gate."""

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    """Of all processes of the engine, over all threads."""

    memory_bytes: int = 0
    """Of all its processes after the last round."""

    tokens_per_s: float = 0.0
    median_cpu_s: float = 0.0
    max_error: float = 0.0
    """Largest difference of a reward from float32 of the same weights."""

    rms_error: float = 0.0


@dataclass(frozen=True)
class _Ready:
    version: str
    start_s: float


@dataclass(frozen=True)
class _Turn:
    wall_s: float
    planned_tokens: int
    rewards: Rewards


class _Contestant:
    """An engine in a process of its own, paused except while it is asked."""

    def __init__(self, engine: EngineConfig, folder: Path) -> None:
        """Started and ready. Raises what `build_engine` raises."""
        self.engine = engine
        context = multiprocessing.get_context("spawn")  # a forked one would have this one's threads and CUDA state
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_contest, args=(theirs, engine, folder))
        self._process.start()
        theirs.close()
        assert self._process.pid is not None
        self.tree = ProcessTree(self._process.pid)
        try:
            ready = self._receive()
            assert isinstance(ready, _Ready)
        except BaseException:
            self.end()
            raise
        self.ready = ready
        self.tree.pause()

    def ask(self, sequences: Sequence[Ids]) -> tuple[_Turn, float]:
        """Its turn, and the CPU seconds of it."""
        self.tree.resume()
        before = self.tree.cpu_s()
        self._pipe.send(sequences)
        turn = self._receive()
        assert isinstance(turn, _Turn)
        cpu_s = self.tree.cpu_s() - before
        self.tree.pause()
        return turn, cpu_s

    def end(self) -> None:
        self.tree.resume()
        self._pipe.close()
        self._process.join(END_S)
        if self._process.is_alive():
            self.tree.kill()
            self._process.join()

    def _receive(self) -> object:
        try:
            answer: object = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise EngineStartError(
                f"engine {self.engine.kind!r}: its process ended with {self._process.exitcode}; its log above says why"
            ) from None
        if isinstance(answer, PolarRayError):
            raise answer
        return answer


def installed_kinds() -> list[str]:
    """`torch`, and what else this interpreter has that runs in a process of ours."""
    return ["torch", *(kind for kind in ("vllm", "sglang") if importlib.util.find_spec(kind) is not None)]


def bench_engines(
    folder: Path,
    engines: Sequence[EngineConfig],
    sequences: Sequence[Ids],
    *,
    rounds: int,
    on_stage: Callable[[str], None] = lambda _: None,
) -> list[EngineResult]:
    """Every engine, with shared prefixes and without, `rounds` times after one round to warm up, whose rewards are held
    against float32.

    Raises `ConfigError` for an engine that runs already, and what `build_engine` raises.
    """
    for engine in engines:
        if engine.is_elsewhere:
            raise ConfigError(
                "engine.address: what is measured is started here, alone; name the interpreter that has the engine"
            )
        if engine.kind in HAVE_NO_WEIGHTS:
            raise ConfigError(f"engine.kind = {engine.kind!r}: computes no rewards of a model; name another")
    config = Checkpoint.open(folder).config
    longest = max(map(len, sequences))
    on_stage("float32 rewards of the same weights")
    expected = reference_rewards(Checkpoint.open(folder), sequences)
    with ExitStack() as stack:
        contestants = []
        for engine in engines:
            resolved = resolve_engine(engine, folder, has_gpu=has_gpu(), max_tokens=longest)
            for share in (True, False):
                on_stage(f"starting {_name(resolved.kind, share)}")
                one = _Contestant(resolved.model_copy(update={"share_prefixes": share}), folder)
                stack.callback(one.end)
                contestants.append(one)
        results = [_first_turn(one, sequences, expected, on_stage) for one in contestants]
        for number in range(1, rounds + 1):
            fresh = [_renamed(ids, number, config.vocab_size) for ids in sequences]
            for one, result in zip(contestants, results, strict=True):
                on_stage(f"round {number} of {rounds}: {_name(one.engine.kind, one.engine.share_prefixes)}")
                turn, cpu_s = one.ask(fresh)
                result.wall_s.append(turn.wall_s)
                result.cpu_s.append(cpu_s)
        for one, result in zip(contestants, results, strict=True):
            result.memory_bytes = one.tree.memory()
            result.tokens_per_s = result.tokens / statistics.median(result.wall_s)
            result.median_cpu_s = statistics.median(result.cpu_s)
    return results


def _first_turn(
    one: _Contestant, sequences: Sequence[Ids], expected: Rewards, on_stage: Callable[[str], None]
) -> EngineResult:
    on_stage(f"warming up {_name(one.engine.kind, one.engine.share_prefixes)}")
    turn, _ = one.ask(sequences)
    errors = turn.rewards - expected
    return EngineResult(
        one.engine.kind,
        one.ready.version,
        one.engine.share_prefixes,
        one.engine.dtype,
        one.engine.device,
        sum(map(len, sequences)),
        turn.planned_tokens,
        one.ready.start_s,
        max_error=float(np.abs(errors).max()),
        rms_error=float(np.sqrt(np.mean(errors**2))),
    )


def _contest(pipe: Connection, engine: EngineConfig, folder: Path) -> None:
    """A contestant's process: an engine, and its turns until the pipe closes."""
    try:
        with _loaded(engine, folder) as (built, start_s):
            pipe.send(_Ready(engine_module(engine.kind).engine_version(engine), start_s))
            while True:
                pipe.send(_turn(built, pipe.recv(), share_prefixes=engine.share_prefixes))
    except (EOFError, BrokenPipeError):
        return
    except PolarRayError as error:
        pipe.send(error)


@contextmanager
def _loaded(engine: EngineConfig, folder: Path) -> Iterator[tuple[Engine, float]]:
    began = time.perf_counter()
    built = build_engine(engine, folder)
    try:
        yield built, time.perf_counter() - began
    finally:
        built.close()


def _turn(engine: Engine, sequences: Sequence[Ids], *, share_prefixes: bool) -> _Turn:
    """Planning is part of it, as it is of a job."""
    began = time.perf_counter()
    planned = plan(
        sequences,
        token_budget=engine.token_budget,
        share_prefixes=share_prefixes,
        max_shared_length=engine.max_shared_length,
    )
    rewards = planned.rewards(engine.score)
    return _Turn(time.perf_counter() - began, planned.computed_tokens, rewards)


def _renamed(ids: Ids, number: int, vocab_size: int) -> Ids:
    """Ids of the same pattern that are none of another round's, so that lengths and sharing stay."""
    return ((ids.astype(np.int64) + number) % vocab_size).astype(np.int32)


def _name(kind: str, share: bool) -> str:
    return f"{kind}, {'shared' if share else 'unshared'}"
