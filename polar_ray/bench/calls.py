"""One turn of a benchmark's load: rows scored in this process, or asked of an endpoint by callers that do not pause."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Literal

import httpx
import pyarrow as pa

from polar_ray.bench.roads import Endpoint
from polar_ray.errors import EngineProtocolError
from polar_ray.scoring import Scorer
from polar_ray.triples import TEXT_FIELDS, Triple
from polar_ray.wire import (
    ARROW_MEDIA_TYPE,
    ARROW_REPLY_KEY,
    JSON_MEDIA_TYPE,
    REWARDS_PATH,
    read_error,
    triple_to_json,
)

REQUEST_TIMEOUT_S = 300.0


Wire = Literal["json", "arrow"]

MEDIA_TYPES: dict[Wire, str] = {"json": JSON_MEDIA_TYPE, "arrow": ARROW_MEDIA_TYPE}


@dataclass(frozen=True, slots=True)
class Request:
    """Rows as they are scored here and as they are sent, and what must come back."""

    triples: Sequence[Triple]
    expected: list[float]
    body: bytes
    media_type: str = JSON_MEDIA_TYPE


@dataclass(frozen=True, slots=True)
class Load:
    """So many callers, each with one request of so many rows under way at a time."""

    callers: int
    rows: int


@dataclass(slots=True)
class Sample:
    """One round of one road under one load."""

    seconds: float = 0.0
    requests: int = 0
    tokens: int = 0
    computed_tokens: int = 0
    road_cpu_s: float = 0.0
    """CPU seconds of the endpoint's processes beyond what they take at rest; on the Scorer's road, of this process."""

    callers_cpu_s: float = 0.0
    """CPU seconds of this process while it called."""

    max_difference: float = 0.0
    """Of a reward from the Scorer's."""

    latencies_s: list[float] = field(default_factory=list)


def make_requests(
    triples: Sequence[Triple], expected: Sequence[float], load: Load, wire: Wire = "json"
) -> Iterator[Request]:
    """Twice as many as there are callers, so that no two under way are alike."""
    write = _as_arrow if wire == "arrow" else _as_json
    for start in range(0, 2 * load.callers * load.rows, load.rows):
        rows = triples[start : start + load.rows]
        yield Request(rows, list(expected[start : start + load.rows]), write(rows), MEDIA_TYPES[wire])


def _as_json(rows: Sequence[Triple]) -> bytes:
    return json.dumps({"triples": [triple_to_json(row) for row in rows]}).encode()


def _as_arrow(rows: Sequence[Triple]) -> bytes:
    table = pa.table({field: [getattr(row, field) for row in rows] for field in TEXT_FIELDS})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def rewards_of(scorer: Scorer, triples: Sequence[Triple]) -> list[float]:
    """One reward per triple. Raises `EngineProtocolError` where there is none."""
    rewards = [row.reward for row in scorer.score(triples)]
    if None in rewards:
        raise EngineProtocolError("the Scorer gives no reward for a row of the benchmark's")
    return [reward for reward in rewards if reward is not None]


def score_turn(scorer: Scorer, requests: Sequence[Request], load: Load, seconds: float) -> Sample:
    """The floor: what all callers of `load` have under way, as one call to the Scorer, for `seconds` or more."""
    waves = [
        [row for request in requests[start : start + load.callers] for row in request.triples]
        for start in (0, load.callers)
    ]
    sample, before = Sample(), scorer.usage.copy()
    began, cpu = time.perf_counter(), time.process_time()
    for wave in itertools.cycle(waves):
        sent = time.perf_counter()
        rewards_of(scorer, wave)
        now = time.perf_counter()
        sample.latencies_s.append(now - sent)
        sample.requests += load.callers
        if now - began > seconds:
            break
    sample.seconds, sample.road_cpu_s = time.perf_counter() - began, time.process_time() - cpu
    work = scorer.usage - before
    sample.tokens, sample.computed_tokens = work.tokens, work.computed_tokens
    return sample


def call_turn(
    endpoint: Endpoint,
    requests: Sequence[Request],
    load: Load,
    seconds: float,
    *,
    tolerance: float,
    idle_cpu: float = 0.0,
) -> Sample:
    """Every caller sends its next request as soon as it has the last reply, for `seconds` or one request.

    `idle_cpu` are the CPU seconds that the endpoint takes in a second at rest.

    Raises `EngineProtocolError` for a reward that is not the expected one, or what the endpoint answers with.
    """
    sample = asyncio.run(_call_together(endpoint, requests, load, seconds, tolerance))
    sample.road_cpu_s -= idle_cpu * sample.seconds
    return sample


async def _call_together(
    endpoint: Endpoint, requests: Sequence[Request], load: Load, seconds: float, tolerance: float
) -> Sample:
    sample, upcoming = Sample(), itertools.cycle(requests)
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(_one_connection(endpoint)) for _ in range(load.callers)]
        await asyncio.gather(*(client.get("/healthz") for client in clients))  # connects all of them
        road_cpu, cpu, began = endpoint.cpu_s(), time.process_time(), time.perf_counter()

        async def call(client: httpx.AsyncClient) -> None:
            while True:
                request, sent = next(upcoming), time.perf_counter()
                reply = await client.post(
                    REWARDS_PATH, content=request.body, headers={"content-type": request.media_type}
                )
                now = time.perf_counter()
                sample.latencies_s.append(now - sent)
                count_reply(sample, reply, request.expected, tolerance)
                if now - began > seconds:
                    return

        await asyncio.gather(*(call(client) for client in clients))
        sample.seconds, sample.callers_cpu_s = time.perf_counter() - began, time.process_time() - cpu
        sample.road_cpu_s = endpoint.cpu_s() - road_cpu
    return sample


def _one_connection(endpoint: Endpoint) -> httpx.AsyncClient:
    """A client of its own for each caller: the time that a pool of httpx's takes grows with the square of its
    connections, and with 32 of them it would be the pool that is measured."""
    return httpx.AsyncClient(base_url=endpoint.url, timeout=REQUEST_TIMEOUT_S, trust_env=False, verify=False)


def count_reply(sample: Sample, reply: httpx.Response, expected: Sequence[float], tolerance: float) -> None:
    """Add a reply to `sample`. Raises what the endpoint says, or `EngineProtocolError` for a wrong reward."""
    if not reply.is_success:
        raise read_error(reply.status_code, reply.content, reply.headers)
    rewards, usage = _read_reply(reply)
    found = [reward for reward in rewards if reward is not None]
    if len(found) != len(expected):
        raise EngineProtocolError(f"a reply of {len(found)} rewards to {len(expected)} rows")
    difference = max(abs(reward - right) / max(1.0, abs(right)) for reward, right in zip(found, expected, strict=True))
    if not difference <= tolerance:
        raise EngineProtocolError(f"a reward is off the Scorer's by {difference:.2e}, and {tolerance:g} is allowed")
    sample.requests += 1
    sample.tokens += usage["tokens"]
    sample.computed_tokens += usage["computed_tokens"]
    sample.max_difference = max(sample.max_difference, difference)


def _read_reply(reply: httpx.Response) -> tuple[list[float | None], dict[str, int]]:
    """Rewards and usage, of either wire."""
    if reply.headers["content-type"] != ARROW_MEDIA_TYPE:
        content = json.loads(reply.content)
        return [row["reward"] for row in content["rewards"]], content["usage"]
    with pa.ipc.open_stream(reply.content) as stream:
        table = stream.read_all()
    return table["reward"].to_pylist(), json.loads(table.schema.metadata[ARROW_REPLY_KEY])["usage"]
