"""The torch engine beside the ways it replaces, on the same sequences, interleaved in one process.

The median CPU seconds of all rounds, over all threads, are what is compared. The float32 run that errors are counted
from comes last: large buffers that were freed before leave a heap in which the padded methods take a tenth less time
than in a process of their own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from polar_ray.engines.torch.engine import DTYPES, TorchEngine
from polar_ray.engines.torch.linear import Linear, PlainLinear, linear_kind
from polar_ray.model.architecture import CheckpointConfig
from polar_ray.model.cost import causal_pairs, flops, flops_of_batches
from polar_ray.model.polar import PolarForReward, load_polar
from polar_ray.planning import Ids, Rewards, plan

README_BATCH = 8
"""Sequences of a padded batch in POLAR's own examples."""

TOKEN_BUDGET = 4096
"""Padded or computed tokens of a batch, for every method but `readme`."""

GEMM_TOKENS, GEMM_REPEATS = 512, 40
"""Rows of the bare products, and how often they are done for one measurement: about half a second."""

METHODS = {
    "readme": f"padded batches of {README_BATCH} in arrival order, transformers",
    "sorted": f"padded batches of like lengths up to {TOKEN_BUDGET} tokens, transformers",
    "unshared": "torch engine, every sequence whole",
    "shared": "torch engine, common prefixes once",
    "deterministic": "the same, with engine.deterministic",
}


@dataclass
class Measurement:
    """One method: raw seconds of every round, and what they come to. Rates and ratios are of the medians."""

    method: str
    what: str
    tokens: int
    """Tokens of all sequences."""

    computed_tokens: int
    """Tokens that went through the model: with padding, or with shared prefixes counted once."""

    flops: float
    """Floating point operations on those tokens, by `model/cost.py`."""

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    max_error: float = 0.0
    rms_error: float = 0.0
    tokens_per_s: float = 0.0
    median_cpu_s: float = 0.0
    speedup_over_readme: float = 0.0
    fraction_of_gemm_rate: float = 0.0


@dataclass
class DtypeResult:
    """All methods in one dtype. Errors are against a float32 run of the `sorted` method."""

    dtype: str
    gemm_flops_per_cpu_s: dict[str, float]
    """What bare matrix products of the gate's shape reach on the same threads, by kind; the best of all rounds."""

    methods: list[Measurement]


@dataclass(frozen=True)
class Method:
    run: Callable[[], Rewards]
    computed_tokens: int
    flops: float


def bench_engine(
    folder: Path, sequences: Sequence[Ids], *, dtypes: Sequence[str], rounds: int, threads: int | None = None
) -> list[DtypeResult]:
    """Every method in every dtype, `rounds` times after one run to warm up."""
    if threads is not None:
        torch.set_num_threads(threads)
    results, rewards = [], []
    for dtype in dtypes:
        result, found = _bench_dtype(folder, sequences, dtype, rounds)
        results.append(result)
        rewards.append(found)
    batches = sorted_batches(sequences, TOKEN_BUDGET)
    expected = padded_rewards(load_polar(folder, dtype=torch.float32), sequences, batches)
    for result, found in zip(results, rewards, strict=True):
        for method in result.methods:
            errors = found[method.method] - expected
            method.max_error = float(np.abs(errors).max())
            method.rms_error = float(np.sqrt(np.mean(errors**2)))
    return results


def _bench_dtype(
    folder: Path, sequences: Sequence[Ids], dtype: str, rounds: int
) -> tuple[DtypeResult, dict[str, Rewards]]:
    """Everything but the errors, and the rewards to count them from."""
    model = load_polar(folder, dtype=DTYPES[dtype])
    engine = TorchEngine.load(folder, dtype=dtype, token_budget=TOKEN_BUDGET)
    deterministic = TorchEngine.load(folder, dtype=dtype, token_budget=TOKEN_BUDGET, deterministic=True)
    methods = {
        "readme": _padded_method(model, sequences, _readme_batches(sequences)),
        "sorted": _padded_method(model, sequences, sorted_batches(sequences, TOKEN_BUDGET)),
        "unshared": _engine_method(engine, model.checkpoint_config, sequences, share=False),
        "shared": _engine_method(engine, model.checkpoint_config, sequences, share=True),
        "deterministic": _engine_method(deterministic, model.checkpoint_config, sequences, share=True),
    }
    n_tokens = sum(map(len, sequences))
    results = {
        name: Measurement(name, METHODS[name], n_tokens, method.computed_tokens, method.flops)
        for name, method in methods.items()
    }
    rewards = {name: method.run() for name, method in methods.items()}
    gemm_rates: dict[str, float] = {}
    for _ in range(rounds):
        for kind, rate in _gemm_rates(model.checkpoint_config, DTYPES[dtype]).items():
            gemm_rates[kind] = max(rate, gemm_rates.get(kind, 0.0))
        for name, method in methods.items():
            wall, cpu = time.perf_counter(), time.process_time()
            method.run()
            results[name].wall_s.append(time.perf_counter() - wall)
            results[name].cpu_s.append(time.process_time() - cpu)
    for result in results.values():
        result.median_cpu_s = statistics.median(result.cpu_s)
        result.tokens_per_s = n_tokens / statistics.median(result.wall_s)
        result.speedup_over_readme = statistics.median(results["readme"].cpu_s) / result.median_cpu_s
        result.fraction_of_gemm_rate = result.flops / result.median_cpu_s / max(gemm_rates.values())
    return DtypeResult(dtype, gemm_rates, list(results.values())), rewards


def _readme_batches(sequences: Sequence[Ids]) -> list[list[int]]:
    return [
        list(range(len(sequences)))[start : start + README_BATCH] for start in range(0, len(sequences), README_BATCH)
    ]


def sorted_batches(sequences: Sequence[Ids], token_budget: int) -> list[list[int]]:
    """Rows in batches of like lengths, of `token_budget` tokens with their padding."""
    batches: list[list[int]] = []
    for row in sorted(range(len(sequences)), key=lambda row: len(sequences[row])):
        if not batches or (len(batches[-1]) + 1) * len(sequences[row]) > token_budget:
            batches.append([])
        batches[-1].append(row)
    return batches


def _padded_method(model: PolarForReward, sequences: Sequence[Ids], batches: list[list[int]]) -> Method:
    widths = [max(len(sequences[row]) for row in batch) for batch in batches for _ in batch]
    operations = flops(model.checkpoint_config, sum(widths), sum(map(causal_pairs, widths)))
    return Method(lambda: padded_rewards(model, sequences, batches), sum(widths), operations)


@torch.inference_mode()
def padded_rewards(model: PolarForReward, sequences: Sequence[Ids], batches: list[list[int]]) -> Rewards:
    """One reward per sequence, in order, from padded batches on the model's device."""
    rewards = np.empty(len(sequences), dtype=np.float32)
    for batch in batches:
        shape = (len(batch), max(len(sequences[row]) for row in batch))
        ids, mask = torch.full(shape, model.checkpoint_config.pad_token_id), torch.zeros(shape, dtype=torch.int64)
        for place, row in enumerate(batch):
            ids[place, : len(sequences[row])] = torch.from_numpy(sequences[row].astype(np.int64))
            mask[place, : len(sequences[row])] = 1
        rewards[batch] = model(ids.to(model.device), mask.to(model.device)).cpu().numpy()
    return rewards


def _engine_method(engine: TorchEngine, config: CheckpointConfig, sequences: Sequence[Ids], *, share: bool) -> Method:
    planned = plan(
        sequences,
        token_budget=engine.token_budget,
        share_prefixes=share,
        max_shared_length=engine.max_shared_length,
    )
    operations = flops_of_batches(config, planned.batches)
    return Method(lambda: planned.rewards(engine.score), planned.computed_tokens, operations)


@torch.inference_mode()
def _gemm_rates(config: CheckpointConfig, dtype: torch.dtype) -> dict[str, float]:
    """Floating point operations per CPU second of products in the gate's shape, by the kind of product."""
    x = torch.randn(GEMM_TOKENS, config.hidden_size).to(dtype)
    weight = torch.randn(config.intermediate_size, config.hidden_size).to(dtype)
    kinds: set[type[Linear]] = {PlainLinear, linear_kind(dtype, x.device)}
    rates = {}
    for kind in kinds:
        product = kind(weight)
        product(x)
        before = time.process_time()
        for _ in range(GEMM_REPEATS):
            product(x)
        rates[kind.__name__] = GEMM_REPEATS * 2 * x.numel() * len(weight) / (time.process_time() - before)
    return rates
