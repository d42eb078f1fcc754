"""The torch engine on one GPU beside padded batches: time against the rate of bare products, memory and errors.

Random weights, drawn on the device. Everything is timed in turns, from idle device to idle device. The rate that time
is held against is measured between the turns, so that it is the same chip at the same temperature.
"""

from __future__ import annotations

import gc
import logging
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch

from polar_ray.bench.padded import padded_rewards, padded_widths, sorted_batches
from polar_ray.bench.profiles import KernelTime, kernel_times
from polar_ray.bench.rates import copy_rate, matmul_rate, seconds_of
from polar_ray.bench.workload import SHAPES, WORKLOADS, RandomCheckpoint, Shape, Workload, random_groups
from polar_ray.engines.build import DEFAULT_TOKEN_BUDGET
from polar_ray.engines.torch.decoder import CHUNK_TOKENS, Decoder
from polar_ray.engines.torch.engine import TorchEngine
from polar_ray.errors import EngineError, first_line
from polar_ray.model.architecture import CheckpointConfig
from polar_ray.model.cost import bytes_of_batches, flops_of_batches, flops_of_lengths
from polar_ray.model.polar import build_polar
from polar_ray.planning import Batch, Ids, Plan, Rewards, plan

logger = logging.getLogger(__name__)

GPU_SHAPES = {
    "1.8b": Shape(2048, 8192, 24, 16, 8, 92544),
    "7b": Shape(4096, 14336, 32, 32, 8, 92544),
    "tiny": SHAPES["tiny"],
}
"""POLAR's, and one for trying things out on a CPU."""

TOKEN_BUDGET = DEFAULT_TOKEN_BUDGET["cuda"]
"""Computed or padded tokens of a batch."""

ENGINES: dict[str, dict[str, Any]] = {
    "eager": {"compiled": False},
    "compiled": {},
    "fp8": {"quantization": "fp8"},
}
"""Decoders that are compared, by the arguments in which they differ."""

BFLOAT16, FLOAT8 = "compiled", "fp8"
"""Of `ENGINES`, the ones that goals are about."""

PADDED = "transformers"

N_CHECKED = 3
"""Sequences of a workload that are computed in float32 as well, for the errors."""


@dataclass(frozen=True)
class Load:
    """Groups of random sequences; `is_shared` where the groups have something in common."""

    workload: Workload
    n_groups: int
    token_budget: int = TOKEN_BUDGET

    @property
    def is_shared(self) -> bool:
        return self.workload.group_size > 1

    def shorter(self, divisor: int) -> Load:
        """With parts and budget that much shorter."""

        def less(least: int, most: int) -> tuple[int, int]:
            return least // divisor, most // divisor

        old = self.workload
        parts = replace(old, prompt=less(*old.prompt), reference=less(*old.reference), output=less(*old.output))
        return Load(parts, self.n_groups, self.token_budget // divisor)


def _apart(what: str, least: int, most: int) -> Workload:
    return Workload(what, (0, 0), (0, 0), (least, most), 1)


LOADS = {
    "1k": Load(_apart("32 sequences of 0.9-1.1k tokens, nothing in common", 900, 1148), 32),
    "2k": Load(_apart("16 of 1.8-2.3k", 1800, 2296), 16),
    "4k": Load(_apart("8 of 3.6-4.6k", 3600, 4592), 8),
    "groups": Load(WORKLOADS["long"], 4),
    "row-16k": Load(_apart("one of 16k", 16_384, 16_384), 1),
    "batch-64k": Load(_apart("16 of 4k in one batch", 4096, 4096), 16, 65_536),
}
"""`groups`: 4 groups of 8 sequences of 3.6-4.4k tokens; prompt, reference and prompt, three quarters, are in common."""

UNSHARED = ("1k", "2k", "4k")


@dataclass
class Row:
    """One method on one workload. Rates, fractions and ratios are of the median of `seconds`."""

    shape: str
    workload: str
    what: str
    method: str
    tokens: int
    """Of all sequences."""

    computed_tokens: int
    """That went through the model: with padding, or with shared prefixes counted once."""

    flops: float
    """On those, by `model/cost.py`."""

    bytes: float
    """Likewise, as our engine's kernels move them."""

    seconds: list[float] = field(default_factory=list)
    """Of every round."""

    median_s: float | None = None
    tokens_per_s: float | None = None
    effective_tokens_per_s: float | None = None
    """Of all sequences' tokens."""

    fraction_of_matmul_rate: float | None = None
    bound_s: float | None = None
    """The roofline's: operations at the rate of bare products or bytes at that of copies, whichever takes longer; of
    `fp8` as well in bfloat16, which it may then beat."""

    fraction_of_bound: float | None = None
    max_error: float | None = None
    rms_error: float | None = None
    """Both against float32, of `N_CHECKED` sequences."""

    weights_bytes: int | None = None
    peak_bytes: int | None = None
    """Weights and the most that a run holds beside them, on a GPU."""

    kernels: list[KernelTime] | None = None
    """Where the device's time goes, the most first, if asked for."""

    error: str | None = None
    """Why there are no figures: what did not fit into memory."""


@dataclass
class ShapeResult:
    shape: str
    parameters: int
    """Without the embedding, of which a token reads one row."""

    matmul_flops_per_s: float
    """The best of `matmul_rates`: products of the gate's and the down projection's shape, with a whole chunk's rows."""

    bytes_per_s: float
    """The best rate of large copies, read and written."""

    matmul_rates: list[float]
    rows: list[Row]


@dataclass(frozen=True)
class Goal:
    what: str
    target: float
    figure: float | None = None
    """None where it was not measured."""

    @property
    def is_met(self) -> bool | None:
        return None if self.figure is None else self.figure >= self.target


@dataclass
class Method:
    model: str
    """`PADDED`, or one of `ENGINES`."""

    run: Callable[[Any], Rewards]
    """From that model."""

    row: Row
    rewards: Rewards | None = None


def bench_shape(
    name: str, loads: Mapping[str, Load], device: torch.device, *, rounds: int, with_kernels: bool = False
) -> ShapeResult:
    """Every method on every load, `rounds` times after one run to warm up. What does not fit is a row that says so."""
    checkpoint = RandomCheckpoint.of(GPU_SHAPES[name])
    config = checkpoint.config
    models = _Models(checkpoint, device)
    rates, bandwidths = [matmul_rate(config, device)], [copy_rate(device)]
    sequences = {each: random_groups(load.workload, load.n_groups, config.vocab_size) for each, load in loads.items()}
    methods: dict[str, list[Method]] = {}
    for each, load in loads.items():
        logger.info("%s, %s", name, each)
        methods[each] = list(_methods(config, name, each, load, sequences[each], CHUNK_TOKENS[device.type]))
        able = [method for method in methods[each] if _warm_up(method, models, device)]
        for _ in range(rounds):
            rates.append(matmul_rate(config, device))
            for method in able:
                method.row.seconds.append(seconds_of(partial(method.run, models.get(method.model)), device))
        for method in able if with_kernels else ():
            method.row.kernels = kernel_times(partial(method.run, models.get(method.model)), device)
        bandwidths.append(copy_rate(device))
    models.close()
    for measured in methods.values():
        _sum_up(measured, max(rates), max(bandwidths))
    logger.info("%s, errors", name)
    _note_errors(models, {each: (sequences[each][:N_CHECKED], methods[each]) for each in loads})
    rows = [method.row for measured in methods.values() for method in measured]
    parameters = checkpoint.size_bytes // 2 - config.vocab_size * config.hidden_size
    return ShapeResult(name, parameters, max(rates), max(bandwidths), rates, rows)


def goals(results: Iterable[ShapeResult]) -> list[Goal]:
    """What the project wants of one H200, beside what was measured."""
    return [goal for result in results for goal in _goals_of(result.shape, result.rows)]


def _goals_of(shape: str, rows: Iterable[Row]) -> Iterator[Goal]:
    by_name = {(row.workload, row.method): row for row in rows}

    def ratio(load: str, method: str, other: str) -> float | None:
        """Of two methods' effective tokens a second."""
        one, two = by_name.get((load, method)), by_name.get((load, other))
        if one is None or two is None or not one.effective_tokens_per_s or not two.effective_tokens_per_s:
            return None
        return one.effective_tokens_per_s / two.effective_tokens_per_s

    def least(figures: Iterable[float | None]) -> float | None:
        found = list(figures)
        return min((figure for figure in found if figure is not None), default=None) if None not in found else None

    apart = [by_name.get((load, f"{BFLOAT16} unshared")) for load in UNSHARED]
    shares = least(None if row is None else row.fraction_of_matmul_rate for row in apart)
    yield Goal(f"{shape}: share of the matmul rate on unshared 1k-4k sequences, the least", 0.65, shares)
    shared = ratio("groups", f"{BFLOAT16} shared", f"{BFLOAT16} unshared")
    yield Goal(f"{shape}: effective tokens/s of groups of 8, shared over unshared", 2.5, shared)
    narrower = least(ratio(load, f"{FLOAT8} unshared", f"{BFLOAT16} unshared") for load in UNSHARED)
    yield Goal(f"{shape}: tokens/s of unshared 1k-4k sequences, float8 over bfloat16, the least", 1.4, narrower)
    for load in ("row-16k", "batch-64k"):
        row = by_name.get((load, f"{BFLOAT16} unshared"))
        yield Goal(f"{shape}: {load} fits into memory (1: yes)", 1.0, None if row is None else float(row.error is None))


class _Models:
    """Models of one checkpoint, loaded when they are first needed and kept until `close`."""

    def __init__(self, checkpoint: RandomCheckpoint, device: torch.device) -> None:
        self.device = device
        self._checkpoint = checkpoint
        self._loaded: dict[str, Any] = {}
        self.weights_bytes: dict[str, int] = {}

    def get(self, name: str) -> Any:
        if name not in self._loaded:
            before = _allocated(self.device)
            if name == PADDED:
                self._loaded[name] = build_polar(self._checkpoint, dtype=torch.bfloat16, device=self.device)
            else:
                self._loaded[name] = self.engine(torch.bfloat16, ENGINES[name])
            self.weights_bytes[name] = _allocated(self.device) - before
        return self._loaded[name]

    @torch.inference_mode()
    def engine(self, dtype: torch.dtype, differing: Mapping[str, Any]) -> TorchEngine:
        decoder = Decoder(self._checkpoint, dtype, self.device, "hf", **differing)
        vocab_size = self._checkpoint.config.vocab_size
        return TorchEngine(decoder, device=self.device, vocab_size=vocab_size, token_budget=TOKEN_BUDGET)

    def close(self) -> None:
        self._loaded.clear()
        _free(self.device)


def _methods(
    config: CheckpointConfig, shape: str, name: str, load: Load, sequences: Sequence[Ids], chunk_tokens: int
) -> Iterator[Method]:
    def row(method: str, batches: Sequence[Batch], operations: float, chunk_tokens: int) -> Row:
        computed = sum(batch.computed_tokens for batch in batches)
        moved = bytes_of_batches(config, batches, chunk_tokens)
        return Row(shape, name, load.workload.what, method, sum(map(len, sequences)), computed, operations, moved)

    padded = sorted_batches(sequences, load.token_budget)
    widths = padded_widths(sequences, padded)
    filled = [Batch.unshared(np.zeros(width, dtype=np.int32) for width in batch) for batch in widths]
    all_widths = [width for batch in widths for width in batch]
    operations = flops_of_lengths(config, all_widths)
    yield Method(
        PADDED,
        lambda model: padded_rewards(model, sequences, padded),
        row(PADDED, filled, operations, sum(all_widths)),
    )
    for engine, how in product(ENGINES, ("unshared", "shared") if load.is_shared else ("unshared",)):
        planned = plan(sequences, token_budget=load.token_budget, share_prefixes=how == "shared")
        operations = flops_of_batches(config, planned.batches)
        yield Method(
            engine,
            partial(_planned_rewards, planned),
            row(f"{engine} {how}", planned.batches, operations, chunk_tokens),
        )


def _planned_rewards(planned: Plan, engine: TorchEngine) -> Rewards:
    return planned.rewards(engine.score)


def _warm_up(method: Method, models: _Models, device: torch.device) -> bool:
    """The first run, for its rewards and memory. Whether it fits."""
    try:
        model = models.get(method.model)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        before = _allocated(device)
        method.rewards = method.run(model)
    except (EngineError, torch.OutOfMemoryError) as error:
        method.row.error = first_line(error)
    # Not above: the error's frames still hold what the run had allocated.
    if method.row.error is not None:
        _free(device)
        return False
    if device.type == "cuda":
        weights = models.weights_bytes[method.model]
        method.row.weights_bytes = weights
        method.row.peak_bytes = weights + torch.cuda.max_memory_allocated(device) - before
    return True


def _sum_up(methods: Sequence[Method], matmul_flops_per_s: float, bytes_per_s: float) -> None:
    for row in (method.row for method in methods if method.row.seconds):
        row.median_s = statistics.median(row.seconds)
        row.tokens_per_s = row.computed_tokens / row.median_s
        row.effective_tokens_per_s = row.tokens / row.median_s
        row.fraction_of_matmul_rate = row.flops / row.median_s / matmul_flops_per_s
        row.bound_s = max(row.flops / matmul_flops_per_s, row.bytes / bytes_per_s)
        row.fraction_of_bound = row.bound_s / row.median_s


def _note_errors(models: _Models, checked: Mapping[str, tuple[Sequence[Ids], Sequence[Method]]]) -> None:
    """Of the first sequences of every load, against our engine in float32, each of them whole and alone."""
    try:
        expected = _exact_rewards(models, {load: sequences for load, (sequences, _) in checked.items()})
    except (EngineError, torch.OutOfMemoryError) as error:
        logger.warning("no errors are counted: %s", first_line(error))
        expected = {}
    _free(models.device)
    for load, (_, methods) in checked.items():
        for method in methods:
            if method.rewards is not None and load in expected:
                errors = method.rewards[: len(expected[load])] - expected[load]
                method.row.max_error = float(np.abs(errors).max())
                method.row.rms_error = float(np.sqrt(np.mean(errors**2)))


def _exact_rewards(models: _Models, sequences: Mapping[str, Sequence[Ids]]) -> dict[str, Rewards]:
    engine = models.engine(torch.float32, {"compiled": False})
    alone = {load: [engine.score(Batch.unshared([ids])) for ids in each] for load, each in sequences.items()}
    return {load: np.concatenate(rewards) for load, rewards in alone.items()}


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
