"""What a corpus job will take, from whole units drawn at random: known before anything is paid for."""

from __future__ import annotations

import heapq
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pydantic import BaseModel, Field

from polar_ray.columns import detect_message_json, parse_rows
from polar_ray.config import EngineConfig, ScoreConfig
from polar_ray.corpus.inputs import examine, input_names, list_inputs
from polar_ray.corpus.manifest import describe_files, units_of
from polar_ray.corpus.units import read_sample, read_unchanged
from polar_ray.encoding.encode import EncodedTriple, Encoder
from polar_ray.encoding.tokenizer import PolarTokenizer
from polar_ray.engines.build import DEFAULT_TOKEN_BUDGET, build_engine, resolve_engine
from polar_ray.errors import ConfigError, TripleError
from polar_ray.model.architecture import CheckpointConfig
from polar_ray.model.checkpoint import read_config
from polar_ray.model.cost import PEAK_FLOPS, flops_of_batches
from polar_ray.model.locate import locate_model
from polar_ray.model.rope import Rope
from polar_ray.planning import Batch, plan
from polar_ray.scoring import has_gpu, parts_of
from polar_ray.triples import Triple

DEFAULT_MFU = 0.4
"""Share of the peak that arithmetic reaches in prefill: SGLang's published figures come to 0.42. Measure your own."""

HERE = "here"
"""In place of a GPU's name: this machine's own engine."""

MEASURED_SECONDS = 20.0
"""Of the engine's time that its speed is taken from."""

NORMAL_95 = 1.96


class Estimate(BaseModel):
    """A total over the corpus."""

    total: float
    error: float | None
    """Half of its 95 % interval, from how the sampled units differ; 0 if every unit was read, None if one was."""


class Forecast(BaseModel):
    """What scoring all rows takes. Counts are of the whole corpus unless they say that they are the sample's."""

    files: int
    rows: int
    units: int
    sampled_units: int
    sampled_rows: int
    tokens: Estimate
    """Of all sequences, each whole."""

    computed_tokens: Estimate
    """Those that are left when common prefixes and identical rows of a unit are computed once."""

    flops: Estimate
    """Floating point operations on the computed tokens."""

    length_quantiles: dict[str, int]
    """Tokens of a sequence in the sample: 0.5, 0.95, 0.99 and 1."""

    statuses: dict[str, int]
    """Rows of the sample that would have no reward, by status."""

    cut_rows: int
    """Rows of the sample that are cut to fit the limits."""

    duplicates: int
    """Rows of the sample that equal another of their unit."""

    encoding_cpu_hours: float
    """Reading and encoding on one core of this machine, at the pace of the sample."""

    gpu: str
    """What computes: a GPU by its data sheet, or `here`, the engine on this machine as it was measured."""

    mfu: float | None
    """Share of the data sheet's peak that is counted on; None for `here`."""

    flops_per_s: float
    """Of one GPU, or of the engine here."""

    gpu_hours: float
    """Of one such GPU, or of one such engine."""

    gpus_per_engine: int
    """1 for `here`."""

    sizes: tuple[int, ...] = Field(exclude=True, repr=False)
    """Bytes of every unit, by which they are compared."""

    def hours(self, gpus: int) -> float:
        """Wall time on so many of them, without what starting takes: each does the largest unit that is left.

        Raises `ConfigError` for fewer GPUs than an engine has."""
        engines = gpus // self.gpus_per_engine
        if not engines:
            raise ConfigError(f"gpus = {gpus}: an engine has {self.gpus_per_engine}; give as many, or more")
        share = makespan(sorted(self.sizes, reverse=True), engines) / sum(self.sizes)
        return self.gpu_hours / self.gpus_per_engine * share


def makespan(costs: Sequence[float], workers: int) -> float:
    """When the last of `workers` is ready, if each takes the next piece of work when it is free."""
    free = [0.0] * workers
    for cost in costs:
        heapq.heapreplace(free, free[0] + cost)
    return max(free)


@dataclass
class _Sampled:
    """Totals of one unit."""

    rows: int
    size: int
    tokens: int = 0
    computed_tokens: int = 0
    flops: float = 0.0
    cut_rows: int = 0
    duplicates: int = 0
    lengths: list[int] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    batches: list[Batch] = field(default_factory=list)


def forecast(
    inputs: str | Path | Sequence[str | Path],
    config: ScoreConfig | None = None,
    *,
    gpu: str = "h200",
    mfu: float = DEFAULT_MFU,
    units: int = 8,
    seed: int = 0,
    on_unit: Callable[[], None] = lambda: None,
    on_measuring: Callable[[], None] = lambda: None,
) -> Forecast:
    """The forecast of `score_parquet(inputs, ..., config)`, from `units` of its units.

    `gpu` is one of `PEAK_FLOPS`, of which `mfu` is counted on, or `here`: then the engine of `config` is started, and
    computes some of the sampled batches. Otherwise of the model only `config.json` and the tokenizer are read, so a
    folder without weights will do. `on_unit` is called when a unit is done, `on_measuring` when the engine starts.
    Raises `InputError`, `SchemaError`, `CheckpointError`, `ConfigError` for an unknown `gpu`, and for `here` what
    `Scorer.open` raises.
    """
    config = config or ScoreConfig()
    if gpu != HERE and gpu not in PEAK_FLOPS:
        known = ", ".join(PEAK_FLOPS)
        raise ConfigError(f"gpu = {gpu!r}: known are {known} and {HERE}; take one like yours, and scale mfu")
    if not 0 < mfu <= 1:
        raise ConfigError(f"mfu = {mfu}: expected a share of the peak, above 0 and at most 1")
    folder = locate_model(config.model, config.revision)
    encoder, shape = Encoder(PolarTokenizer(folder), config.limits), read_config(folder)
    files = list_inputs(input_names(inputs))
    contents = examine(files, config.columns, config.unit_rows, will_write=False)
    message_json = detect_message_json(read_sample(files, contents, config.columns), config.columns)
    described = describe_files(files, contents)
    every = units_of(contents)
    drawn = sorted(random.Random(seed).sample(range(len(every)), min(units, len(every))))
    engine = config.engine
    if gpu == HERE:
        engine = resolve_engine(engine, folder, has_gpu=has_gpu(), max_tokens=config.limits.max_tokens)
    began = time.process_time()
    sampled = []
    for unit in (every[index] for index in drawn):
        where = f"{files[unit.file].url} rows {unit.start}-{unit.stop - 1}"
        _, fields = read_unchanged(described[unit.file], unit.slice, config.columns, where=where, reader="forecast")
        sampled.append(_sample(parse_rows(fields, message_json), unit.size, encoder, engine, shape))
        if gpu != HERE:
            sampled[-1].batches.clear()
        on_unit()
    cpu_s = time.process_time() - began
    rows, sampled_rows = sum(unit.rows for unit in every), sum(found.rows for found in sampled)
    sizes = tuple(unit.size for unit in every)
    estimate = _Estimator(sum(sizes), len(every), [found.size for found in sampled])
    flops = estimate([found.flops for found in sampled])
    if gpu == HERE:
        on_measuring()
        batches = [batch for found in sampled for batch in found.batches]
        flops_per_s = _measured(engine, folder, shape, random.Random(seed).sample(batches, len(batches)))
    else:
        flops_per_s = PEAK_FLOPS[gpu] * mfu
    lengths = np.array([length for found in sampled for length in found.lengths] or [0])
    return Forecast(
        files=len(files),
        rows=rows,
        units=len(every),
        sampled_units=len(sampled),
        sampled_rows=sampled_rows,
        tokens=estimate([found.tokens for found in sampled]),
        computed_tokens=estimate([found.computed_tokens for found in sampled]),
        flops=flops,
        length_quantiles={str(q): int(np.quantile(lengths, q, method="higher")) for q in (0.5, 0.95, 0.99, 1)},
        statuses=dict(sum((found.statuses for found in sampled), Counter())),
        cut_rows=sum(found.cut_rows for found in sampled),
        duplicates=sum(found.duplicates for found in sampled),
        encoding_cpu_hours=cpu_s * sum(sizes) / sum(unit.size for unit in sampled) / 3600,
        gpu=gpu,
        mfu=None if gpu == HERE else mfu,
        flops_per_s=flops_per_s,
        gpu_hours=flops.total / flops_per_s / 3600,
        gpus_per_engine=1 if gpu == HERE else engine.tensor_parallel_size,
        sizes=sizes,
    )


def _measured(engine: EngineConfig, folder: Path, shape: CheckpointConfig, batches: Iterable[Batch]) -> float:
    """Operations a second of the engine that `engine`, resolved, names, over the first of the batches."""
    built, operations, seconds = build_engine(engine, folder), 0.0, 0.0
    try:
        for number, batch in enumerate(batches):
            began = time.perf_counter()
            built.score(batch)
            if number:  # the first warms it up
                seconds += time.perf_counter() - began
                operations += flops_of_batches(shape, [batch])
            if seconds > MEASURED_SECONDS:
                break
    finally:
        built.close()
    if not seconds:
        raise ConfigError(f"gpu = {HERE!r}: measures more than one batch, and the sample has no more; raise units")
    return operations / seconds


def _sample(
    rows: Sequence[Triple | TripleError], size: int, encoder: Encoder, engine: EngineConfig, shape: CheckpointConfig
) -> _Sampled:
    encoded = encoder.encode_rows(rows)
    good = [row for row in encoded if isinstance(row, EncodedTriple)]
    unit = _Sampled(len(rows), size, lengths=[len(row.ids) for row in good])
    unit.statuses.update(row.code for row in encoded if isinstance(row, TripleError))
    unit.tokens = sum(unit.lengths)
    unit.cut_rows = sum(row.cut_tokens > 0 for row in good)
    for part in parts_of(rows):
        planned = plan(
            [row.ids for row in map(encoded.__getitem__, part) if isinstance(row, EncodedTriple)],
            token_budget=engine.token_budget or DEFAULT_TOKEN_BUDGET["cuda"],
            share_prefixes=engine.share_prefixes,
            max_shared_length=Rope.of(shape, engine.rope_base).longest_with_one_base,
        )
        unit.batches += planned.batches
        unit.duplicates += planned.duplicates
        unit.computed_tokens += planned.computed_tokens
        unit.flops += flops_of_batches(shape, planned.batches)
    return unit


class _Estimator:
    """From totals of sampled units to those of all: the ratio to their sizes, which are known everywhere."""

    def __init__(self, size: int, units: int, sampled_sizes: list[int]) -> None:
        self._size, self._units = size, units
        self._sampled = np.array(sampled_sizes, dtype=np.float64)

    def __call__(self, totals: Sequence[float]) -> Estimate:
        found, n = np.array(totals, dtype=np.float64), len(self._sampled)
        if n == self._units:
            return Estimate(total=float(found.sum()), error=0.0)
        ratio = found.sum() / self._sampled.sum()
        total = float(ratio * self._size)
        if n < 2:
            return Estimate(total=total, error=None)
        spread = float(((found - ratio * self._sampled) ** 2).sum() / (n - 1))
        of_ratio = math.sqrt((1 - n / self._units) * spread / n) / self._sampled.mean()
        return Estimate(total=total, error=float(NORMAL_95 * of_ratio * self._size))
