"""What a corpus job will take, from whole units drawn at random: known before anything is paid for."""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pydantic import BaseModel

from polar_ray.columns import detect_message_json, parse_rows
from polar_ray.config import ScoreConfig
from polar_ray.corpus.inputs import examine, input_names, list_inputs
from polar_ray.corpus.manifest import describe_files, units_of
from polar_ray.corpus.units import read_sample, read_unchanged
from polar_ray.encoding.encode import EncodedTriple, Encoder
from polar_ray.encoding.tokenizer import PolarTokenizer
from polar_ray.engines.build import DEFAULT_TOKEN_BUDGET
from polar_ray.errors import ConfigError, TripleError
from polar_ray.model.architecture import CheckpointConfig
from polar_ray.model.checkpoint import read_config
from polar_ray.model.cost import PEAK_FLOPS, flops_of_batches
from polar_ray.model.locate import locate_model
from polar_ray.model.rope import Rope
from polar_ray.planning import plan
from polar_ray.scoring import parts_of
from polar_ray.triples import Triple

DEFAULT_MFU = 0.4
"""Share of the peak that arithmetic reaches in prefill: SGLang's published figures come to 0.42. Measure your own."""

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
    mfu: float
    gpu_hours: float
    gpus_per_engine: int

    def hours(self, gpus: int) -> float:
        """Wall time on so many GPUs, without what starting takes. No engine does less than a unit.

        Raises `ConfigError` for fewer GPUs than an engine has."""
        engines = gpus // self.gpus_per_engine
        if not engines:
            raise ConfigError(f"gpus = {gpus}: an engine has {self.gpus_per_engine}; give as many, or more")
        units_in_turn = math.ceil(self.units / engines)
        return self.gpu_hours / self.gpus_per_engine * max(1 / engines, units_in_turn / self.units)


@dataclass
class _Sampled:
    """Totals of one unit."""

    rows: int
    tokens: int = 0
    computed_tokens: int = 0
    flops: float = 0.0
    cut_rows: int = 0
    duplicates: int = 0
    lengths: list[int] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)


def forecast(
    inputs: str | Path | Sequence[str | Path],
    config: ScoreConfig | None = None,
    *,
    gpu: str = "h200",
    mfu: float = DEFAULT_MFU,
    units: int = 8,
    seed: int = 0,
    on_unit: Callable[[], None] = lambda: None,
) -> Forecast:
    """The forecast of `score_parquet(inputs, ..., config)`, from `units` of its units.

    Of the model only `config.json` and the tokenizer are read, so a folder without weights will do. `on_unit` is called
    when a unit is done. Raises `InputError`, `SchemaError`, `CheckpointError`, or `ConfigError` for an unknown `gpu`.
    """
    config = config or ScoreConfig()
    if gpu not in PEAK_FLOPS:
        raise ConfigError(f"gpu = {gpu!r}: known are {', '.join(PEAK_FLOPS)}; take one like yours, and scale mfu")
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
    began = time.process_time()
    sampled = []
    for unit in (every[index] for index in drawn):
        where = f"{files[unit.file].url} rows {unit.start}-{unit.stop - 1}"
        _, fields = read_unchanged(described[unit.file], unit.slice, config.columns, where=where, reader="forecast")
        sampled.append(_sample(parse_rows(fields, message_json), encoder, config, shape))
        on_unit()
    cpu_s = time.process_time() - began
    rows, sampled_rows = sum(unit.rows for unit in every), sum(found.rows for found in sampled)
    estimate = _Estimator(rows, len(every), [found.rows for found in sampled])
    flops = estimate([found.flops for found in sampled])
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
        encoding_cpu_hours=cpu_s * rows / sampled_rows / 3600,
        gpu=gpu,
        mfu=mfu,
        gpu_hours=flops.total / (PEAK_FLOPS[gpu] * mfu) / 3600,
        gpus_per_engine=config.engine.tensor_parallel_size,
    )


def _sample(
    rows: Sequence[Triple | TripleError], encoder: Encoder, config: ScoreConfig, shape: CheckpointConfig
) -> _Sampled:
    encoded = encoder.encode_rows(rows)
    good = [row for row in encoded if isinstance(row, EncodedTriple)]
    unit = _Sampled(len(rows), lengths=[len(row.ids) for row in good])
    unit.statuses.update(row.code for row in encoded if isinstance(row, TripleError))
    unit.tokens = sum(unit.lengths)
    unit.cut_rows = sum(row.cut_tokens > 0 for row in good)
    for part in parts_of(rows):
        planned = plan(
            [row.ids for row in map(encoded.__getitem__, part) if isinstance(row, EncodedTriple)],
            token_budget=config.engine.token_budget or DEFAULT_TOKEN_BUDGET["cuda"],
            share_prefixes=config.engine.share_prefixes,
            max_shared_length=Rope.of(shape, config.engine.rope_base).longest_with_one_base,
        )
        unit.duplicates += planned.duplicates
        unit.computed_tokens += planned.computed_tokens
        unit.flops += flops_of_batches(shape, planned.batches)
    return unit


class _Estimator:
    """From totals of sampled units to those of all: the ratio to rows, whose number is known everywhere."""

    def __init__(self, rows: int, units: int, sampled_rows: list[int]) -> None:
        self._rows, self._units = rows, units
        self._sampled = np.array(sampled_rows, dtype=np.float64)

    def __call__(self, totals: Sequence[float]) -> Estimate:
        found, n = np.array(totals, dtype=np.float64), len(self._sampled)
        ratio = found.sum() / self._sampled.sum()
        total = float(ratio * self._rows)
        if n == self._units:
            return Estimate(total=total, error=0.0)
        if n < 2:
            return Estimate(total=total, error=None)
        spread = float(((found - ratio * self._sampled) ** 2).sum() / (n - 1))
        of_ratio = math.sqrt((1 - n / self._units) * spread / n) / self._sampled.mean()
        return Estimate(total=total, error=float(NORMAL_95 * of_ratio * self._rows))
