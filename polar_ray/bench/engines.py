"""Engines beside each other and beside the ways they replace, on the same ids, taking turns.

Each runs in a process of its own and stands still while another has its turn: servers poll even when nobody asks. The
ids of every round are new, as a prefix cache would otherwise know the whole sequences.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from polar_ray.bench.contestants import EngineContestant, PaddedContestant, Turn
from polar_ray.bench.processes import ProcessTree
from polar_ray.bench.profiles import KernelTime, kernel_times
from polar_ray.bench.rates import product_rate
from polar_ray.config import EngineConfig
from polar_ray.engines.build import HAVE_NO_WEIGHTS, resolve_engine
from polar_ray.errors import ConfigError, EngineStartError, PolarRayError
from polar_ray.model.checkpoint import Checkpoint
from polar_ray.model.reference import reference_rewards
from polar_ray.planning import Ids, Rewards
from polar_ray.scoring import has_gpu

Contestant = EngineContestant | PaddedContestant

VARIANTS: dict[str, dict[str, Any]] = {
    "torch-int8": {"quantization": "int8"},
    "torch-fp8": {"quantization": "fp8"},
    "torch-deterministic": {"deterministic": True},
}
"""Settings of the torch engine that are measured with shared prefixes only."""

PADDED = ("readme", "sorted")
"""On CPUs; on GPUs jobs/bench/gpu.py has them."""

END_S = 30.0


@dataclass
class EngineResult:
    """One method on one workload: raw figures of every round, and what they come to. Rates are of medians."""

    workload: str
    method: str
    version: str
    share_prefixes: bool
    arithmetic: str
    tokens: int
    """Tokens of all sequences of a round."""

    computed_tokens: int
    """Those that went through the model: with padding, or with common prefixes counted once; of engines of other
    projects what the planner would leave, as they share by their own caches."""

    flops: float | None
    """Floating point operations on those tokens; None where another engine's cache decides."""

    start_s: float
    """From nothing to ready, with the parity gate."""

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    """Of all processes of the method, over all threads."""

    plan_cpu_s: list[float] = field(default_factory=list)
    memory_bytes: int = 0
    """Of all its processes after the last round."""

    tokens_per_s: float = 0.0
    median_cpu_s: float = 0.0
    speedup_over_readme: float | None = None
    """In CPU seconds."""

    planning_share: float = 0.0
    """Of the CPU seconds."""

    fraction_of_product_rate: float | None = None
    """Of what bare products in the same arithmetic reach in the same run."""

    max_error: float = 0.0
    """Largest difference of a reward from float32 of the same weights."""

    rms_error: float = 0.0
    profile: list[KernelTime] = field(default_factory=list)
    """Where the time of one more turn went, of torch in the method's own process."""


@dataclass(frozen=True)
class EngineComparison:
    product_rates: dict[str, float]
    """Floating point operations per CPU second of bare products, by arithmetic; the best of all rounds."""

    results: list[EngineResult]


@dataclass(frozen=True)
class _Ready:
    version: str
    start_s: float


class _Process:
    """A contestant in a process of its own, paused except while it is asked."""

    def __init__(self, contestant: Contestant, folder: Path) -> None:
        """Started and ready. Raises what `build_engine` raises."""
        self.contestant = contestant
        context = multiprocessing.get_context("spawn")  # a forked one would have this one's threads and CUDA state
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_contest, args=(theirs, contestant, folder))
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

    @property
    def name(self) -> str:
        return f"{self.contestant.method}, {'shared' if self.contestant.shares else 'unshared'}"

    def turn(self, sequences: Sequence[Ids]) -> tuple[Turn, float]:
        """Its turn, and the CPU seconds of it."""
        before = self.tree.cpu_s()
        turn = self._ask("turn", sequences)
        assert isinstance(turn, Turn)
        return turn, self.tree.cpu_s() - before

    def profile(self, sequences: Sequence[Ids]) -> list[KernelTime]:
        rows = self._ask("profile", sequences)
        assert isinstance(rows, list)
        return rows

    def end(self) -> None:
        self.tree.resume()
        self._pipe.close()
        self._process.join(END_S)
        if self._process.is_alive():
            self.tree.kill()
            self._process.join()

    def _ask(self, what: Literal["turn", "profile"], sequences: Sequence[Ids]) -> object:
        self.tree.resume()
        try:
            self._pipe.send((what, sequences))
            return self._receive()
        finally:
            self.tree.pause()

    def _receive(self) -> object:
        try:
            answer: object = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise EngineStartError(
                f"{self.contestant.method}: its process ended with {self._process.exitcode}; its log above says why"
            ) from None
        if isinstance(answer, PolarRayError):
            raise answer
        return answer


def installed_methods() -> list[str]:
    """What this interpreter can run on this machine."""
    here = ["torch", "torch-fp8"] if has_gpu() else [*PADDED, "torch", "torch-int8"]
    others = (kind for kind in ("vllm", "sglang") if importlib.util.find_spec(kind) is not None)
    return [*here, "torch-deterministic", *others]


def contestants(methods: Mapping[str, EngineConfig], folder: Path, max_tokens: int) -> list[Contestant]:
    """Each method as what is started: engines with shared prefixes and without.

    Raises `ConfigError` for an engine that runs already or has no weights, and what `resolve_engine` raises.
    """
    found: list[Contestant] = []
    for method, settings in methods.items():
        if settings.is_elsewhere:
            raise ConfigError(
                "engine.address: what is measured is started here, alone; name the interpreter that has the engine"
            )
        if settings.kind in HAVE_NO_WEIGHTS:
            raise ConfigError(f"engine.kind = {settings.kind!r}: computes no rewards of a model; name another")
        chosen = settings.model_copy(update=VARIANTS.get(method, {}))
        resolved = resolve_engine(chosen, folder, has_gpu=has_gpu(), max_tokens=max_tokens)
        if method in PADDED:
            if resolved.device != "cpu":
                raise ConfigError(f"--engine {method}: is measured on CPUs; on GPUs run jobs/bench/gpu.py")
            found.append(PaddedContestant(method, resolved.dtype))
            continue
        for share in (True,) if method in VARIANTS else (True, False):
            found.append(EngineContestant(method, resolved.model_copy(update={"share_prefixes": share})))
    return found


def bench_engines(
    folder: Path,
    methods: Mapping[str, EngineConfig],
    workloads: Mapping[str, Sequence[Ids]],
    *,
    rounds: int,
    profiled: bool = False,
    on_stage: Callable[[str], None] = lambda _: None,
) -> EngineComparison:
    """Every method on every workload, `rounds` times after one round to warm up, whose rewards are held against
    float32.

    `methods` are named as in `installed_methods`. Raises what `contestants` and `build_engine` raise.
    """
    checkpoint = Checkpoint.open(folder)
    longest = max(len(ids) for sequences in workloads.values() for ids in sequences)
    planned = contestants(methods, folder, longest)
    rates = dict.fromkeys((each.arithmetic for each in planned if each.device == "cpu"), 0.0)
    results: list[EngineResult] = []
    with ExitStack() as stack:
        processes = []
        for contestant in planned:
            on_stage(f"starting {contestant.method}")
            one = _Process(contestant, folder)
            stack.callback(one.end)
            processes.append(one)
        for (workload, sequences), numbers in zip(workloads.items(), _round_numbers(rounds), strict=False):
            on_stage(f"{workload}: float32 rewards of the same weights")
            expected = reference_rewards(checkpoint, sequences)
            entries = [_first_turn(one, workload, sequences, expected, on_stage) for one in processes]
            for number in numbers:
                fresh = [_renamed(ids, number, checkpoint.config.vocab_size) for ids in sequences]
                for arithmetic, rate in rates.items():
                    rates[arithmetic] = max(rate, product_rate(checkpoint.config, arithmetic))
                for one, result in zip(processes, entries, strict=True):
                    on_stage(f"{workload}, round {number - numbers[0] + 1} of {rounds}: {one.name}")
                    turn, cpu_s = one.turn(fresh)
                    result.wall_s.append(turn.wall_s)
                    result.cpu_s.append(cpu_s)
                    result.plan_cpu_s.append(turn.plan_cpu_s)
            for one, result in zip(processes, entries, strict=True):
                result.memory_bytes = one.tree.memory()
                if profiled:
                    on_stage(f"{workload}, a profile: {one.name}")
                    result.profile = one.profile(sequences)
            results += entries
    for result in results:
        _sum_up(result, results, rates)
    return EngineComparison(rates, results)


def _round_numbers(rounds: int) -> Iterator[range]:
    """Numbers of rounds, from 1, those of one workload after those of another."""
    for first in count(1, rounds):
        yield range(first, first + rounds)


def _first_turn(
    one: _Process, workload: str, sequences: Sequence[Ids], expected: Rewards, on_stage: Callable[[str], None]
) -> EngineResult:
    on_stage(f"{workload}, warming up: {one.name}")
    turn, _ = one.turn(sequences)
    errors = turn.rewards - expected
    return EngineResult(
        workload,
        one.contestant.method,
        one.ready.version,
        one.contestant.shares,
        one.contestant.arithmetic,
        sum(map(len, sequences)),
        turn.computed_tokens,
        turn.flops,
        one.ready.start_s,
        max_error=float(np.abs(errors).max()),
        rms_error=float(np.sqrt(np.mean(errors**2))),
    )


def _sum_up(result: EngineResult, results: Sequence[EngineResult], rates: Mapping[str, float]) -> None:
    result.tokens_per_s = result.tokens / statistics.median(result.wall_s)
    result.median_cpu_s = statistics.median(result.cpu_s)
    result.planning_share = statistics.median(result.plan_cpu_s) / result.median_cpu_s
    if result.flops is not None and result.arithmetic in rates:
        result.fraction_of_product_rate = result.flops / result.median_cpu_s / rates[result.arithmetic]
    for other in results:
        if other.method == "readme" and other.workload == result.workload:
            result.speedup_over_readme = statistics.median(other.cpu_s) / result.median_cpu_s


def _contest(pipe: Connection, contestant: Contestant, folder: Path) -> None:
    """A contestant's process: loaded, and asked until the pipe closes."""
    began = time.perf_counter()
    try:
        with contestant.loaded(folder) as runner:
            pipe.send(_Ready(runner.version, time.perf_counter() - began))
            while True:
                what, sequences = pipe.recv()
                turn = partial(runner.turn, sequences)
                pipe.send(turn() if what == "turn" else kernel_times(turn, torch.device(contestant.device)))
    except (EOFError, BrokenPipeError):
        return
    except PolarRayError as error:
        pipe.send(error)


def _renamed(ids: Ids, number: int, vocab_size: int) -> Ids:
    """Ids of the same pattern that are none of another round's, so that lengths and sharing stay."""
    return ((ids.astype(np.int64) + number) % vocab_size).astype(np.int32)
