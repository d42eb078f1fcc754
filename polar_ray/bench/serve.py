"""An endpoint beside the in-process `Scorer` it is made of: what each road from a caller to the engine costs.

All roads stand for the whole run and take turns, load by load, so that other work on the machine meets them alike.
Rates are medians of the rounds; on a busy machine trust the CPU seconds, which are of all rounds together and leave out
what a cluster takes at rest. Callers are coroutines of this process with one kept-alive connection each
(httpx, bodies made beforehand), so they share no interpreter with a replica, but do share the machine. Every
reward of every reply is compared with the Scorer's, and a wrong one ends the run, as any error does.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from polar_ray.bench.calls import Load, Sample, Wire, call_turn, make_requests, rewards_of, score_turn
from polar_ray.bench.roads import ROADS, Endpoint
from polar_ray.bench.workload import random_triples
from polar_ray.config import QueueConfig, ServeConfig, load_config
from polar_ray.engines.build import DEFAULT_TOKEN_BUDGET
from polar_ray.errors import ConfigError, EngineStartError
from polar_ray.scoring import Scorer
from polar_ray.serving.service import freeze_heap

SCORER = "scorer"
"""The floor: `Scorer.score` in this process, with all rows that the callers of a load have in flight in one call."""

REFERENCE = "proxy"
"""The road whose rate is 1."""

GROUP_SIZE = 4

ROWS_IN_FLIGHT = {"fake": 1024, "torch": 64}
"""Callers times rows that a load may have: beyond, a round would take minutes."""

TOLERANCE = {"fake": 0.0, "torch": 1e-4}
"""Other callers' rows in the same engine call may move a reward by rounding."""

MOST_QUEUED_TOKENS = 100_000_000
"""Of a measured endpoint: its callers wait for each other, so none needs to be refused."""

WARM_UP_S, REST_S = 0.3, 3.0
"""Of each road before its first turn; and of all together after it, to see what they take at rest."""

METHOD = {
    "dtype": "float32",
    "group_size": GROUP_SIZE,
    "rows_in_flight_at_most": ROWS_IN_FLIGHT,
    "tolerance": TOLERANCE,
    "batch_wait_s": QueueConfig().batch_wait_s,
    "callers": "coroutines of one process beside the endpoint's; an httpx client each, kept alive, bodies made before",
    "errors": "none, and no reward off by more than the tolerance: one of either ends the run",
}
"""How every run measures, for its results file."""


@dataclass
class Result:
    """One road under one load: the figures of every round, and what they come to. Rates are medians."""

    road: str
    callers: int
    rows_per_request: int
    seconds: list[float]
    requests: list[int]
    tokens: int
    computed_tokens: int
    road_cpu_s: list[float]
    callers_cpu_s: list[float]
    max_difference: float
    requests_per_s: float
    rows_per_s: float
    p50_ms: float
    p99_ms: float
    computed_tokens_per_row: float
    road_cpu_us_per_row: float
    overhead_us_per_row: float = 0.0
    """Time of a row on this road less its time in the Scorer."""

    overhead_ms_per_request: float = 0.0
    overhead_percent: float = 0.0
    """Of the Scorer's time. Negative where an endpoint gains more by encoding one request while it computes another."""

    cpu_overhead_us_per_row: float = 0.0
    """CPU time of a row on this road less that in the Scorer; the callers' own is not in it."""

    cpu_overhead_ms_per_request: float = 0.0
    cpu_overhead_percent: float = 0.0

    speed_over_proxy: float | None = None
    """None where the default proxy was left out."""

    of_engine: float | None = None
    """Computed tokens a second, as a part of those that the engine stands in for."""


@dataclass
class Comparison:
    """All roads under all loads with one engine."""

    engine: str
    results: list[Result]
    idle_cpu: dict[str, float]
    """CPU seconds in a second that a road takes at rest."""

    left_out: dict[str, str]
    """Roads that could not be built here, and why."""


def within_reach(callers: Sequence[int], rows: Sequence[int], engine: str) -> list[Load]:
    """Every combination that `ROWS_IN_FLIGHT` allows. Raises `ConfigError` if there is none."""
    most = ROWS_IN_FLIGHT[engine]
    loads = [Load(n_callers, n_rows) for n_rows in rows for n_callers in callers if n_callers * n_rows <= most]
    if not loads:
        raise ConfigError(f"--engine {engine} is measured with {most} rows in flight at most; ask for fewer")
    return loads


def settings_for(engine: str, model: str, threads: int, tokens_per_s: float | None = None) -> ServeConfig:
    """The endpoint that is measured; the Scorer beside it has the same engine. On a CPU, open to this machine.

    With `tokens_per_s` the fake engine takes as long as one of that speed would on a GPU.
    """
    sleeps = engine == "fake" and tokens_per_s is not None
    return load_config(
        ServeConfig,
        model=model,
        engine__kind=engine,
        engine__device="cpu",
        engine__dtype=METHOD["dtype"],
        engine__threads=threads,
        queue__max_queued_tokens=MOST_QUEUED_TOKENS,
        auth__mode="none",
        engine__arguments={"tokens_per_s": tokens_per_s} if sleeps else None,
        engine__token_budget=DEFAULT_TOKEN_BUDGET["cuda"] if sleeps else None,
    )


def bench_serve(
    config: ServeConfig,
    loads: Sequence[Load],
    roads: Sequence[str],
    *,
    rounds: int,
    seconds: float,
    wire: Wire = "json",
    seed: int = 0,
) -> Comparison:
    """Every road under every load, `rounds` times for `seconds` each, the Scorer among them.

    Raises `EngineProtocolError` for a reward that is not the Scorer's, and whatever error an endpoint answers with.
    """
    kind = config.engine.kind
    with ExitStack() as stack:
        scorer = stack.enter_context(Scorer.open(config.model, engine=config.engine, limits=config.limits))
        n_rows = 2 * max(load.callers * load.rows for load in loads)
        triples = random_triples(math.ceil(n_rows / GROUP_SIZE), GROUP_SIZE, seed=seed)
        expected = rewards_of(scorer, triples)
        endpoints, left_out = _build(config, roads, stack)
        warm_up = list(make_requests(triples, expected, Load(1, min(load.rows for load in loads))))
        for endpoint in endpoints.values():
            call_turn(endpoint, warm_up, Load(1, 1), WARM_UP_S, tolerance=TOLERANCE[kind])
        idle = _idle_cpu(endpoints)
        freeze_heap()  # the callers' pauses are none of the road's
        results = []
        for load in loads:
            requests = list(make_requests(triples, expected, load, wire))
            samples: dict[str, list[Sample]] = {road: [] for road in (SCORER, *endpoints)}
            for turn in range(rounds):
                for road in _in_turn(list(samples), turn):
                    if road == SCORER:
                        sample = score_turn(scorer, requests, load, seconds)
                    else:
                        sample = call_turn(
                            endpoints[road], requests, load, seconds, tolerance=TOLERANCE[kind], idle_cpu=idle[road]
                        )
                    samples[road].append(sample)
            results += compare({road: summarise(road, load, taken) for road, taken in samples.items()})
        if (speed := config.engine.arguments.get("tokens_per_s")) is not None:
            for result in results:
                result.of_engine = result.computed_tokens_per_row * result.rows_per_s / float(speed)
    return Comparison(kind, results, idle, left_out)


def summarise(road: str, load: Load, samples: Sequence[Sample]) -> Result:
    """What the rounds of one road come to, without comparison."""
    latencies_ms = [1000 * latency for sample in samples for latency in sample.latencies_s]
    rate = statistics.median(sample.requests / sample.seconds for sample in samples)
    n_rows = load.rows * sum(sample.requests for sample in samples)
    computed = sum(sample.computed_tokens for sample in samples)
    return Result(
        road,
        load.callers,
        load.rows,
        seconds=[sample.seconds for sample in samples],
        requests=[sample.requests for sample in samples],
        tokens=sum(sample.tokens for sample in samples),
        computed_tokens=computed,
        road_cpu_s=[sample.road_cpu_s for sample in samples],
        callers_cpu_s=[sample.callers_cpu_s for sample in samples],
        max_difference=max(sample.max_difference for sample in samples),
        requests_per_s=rate,
        rows_per_s=rate * load.rows,
        p50_ms=float(np.percentile(latencies_ms, 50)),
        p99_ms=float(np.percentile(latencies_ms, 99)),
        computed_tokens_per_row=computed / n_rows,
        road_cpu_us_per_row=1e6 * sum(sample.road_cpu_s for sample in samples) / n_rows,
    )


def compare(results: dict[str, Result]) -> list[Result]:
    """The roads of one load, each measured against the Scorer and the default proxy."""
    floor = results[SCORER]
    for result in results.values():
        result.overhead_us_per_row = 1e6 * (1 / result.rows_per_s - 1 / floor.rows_per_s)
        result.overhead_ms_per_request = result.overhead_us_per_row * result.rows_per_request / 1000
        result.overhead_percent = 100 * (floor.rows_per_s / result.rows_per_s - 1)
        result.cpu_overhead_us_per_row = result.road_cpu_us_per_row - floor.road_cpu_us_per_row
        result.cpu_overhead_ms_per_request = result.cpu_overhead_us_per_row * result.rows_per_request / 1000
        result.cpu_overhead_percent = 100 * result.cpu_overhead_us_per_row / floor.road_cpu_us_per_row
        if REFERENCE in results:
            result.speed_over_proxy = result.rows_per_s / results[REFERENCE].rows_per_s
    return list(results.values())


def _build(config: ServeConfig, roads: Sequence[str], stack: ExitStack) -> tuple[dict[str, Endpoint], dict[str, str]]:
    """Endpoints that answer, and why others do not. The HAProxy is one that a machine may be without."""
    endpoints, left_out = {}, {}
    for road in roads:
        try:
            endpoints[road] = stack.enter_context(ROADS[road](config))
        except EngineStartError as error:
            if road != "haproxy":
                raise
            left_out[road] = str(error)
    return endpoints, left_out


def _idle_cpu(endpoints: Mapping[str, Endpoint]) -> dict[str, float]:
    before = {road: endpoint.cpu_s() for road, endpoint in endpoints.items()}
    time.sleep(REST_S)
    return {road: (endpoint.cpu_s() - before[road]) / REST_S for road, endpoint in endpoints.items()}


def _in_turn(roads: list[str], turn: int) -> list[str]:
    start = turn % len(roads)
    return roads[start:] + roads[:start]
