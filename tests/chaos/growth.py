"""A job and an endpoint on a cluster that has no worker: nodes come, and go when there is nothing to do for them.

    python -m tests.chaos.growth --output build/growth.json

Autoscaler v2 with nodes that are processes of this machine. Says how long each step took and how many nodes there were.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import pyarrow.parquet as pq
import ray
import typer
from rich.console import Console

from polar_ray.config import ScoreConfig
from polar_ray.corpus.job import score_parquet
from polar_ray.errors import ConfigError
from tests.chaos.paced_job import open_paced_scorer
from tests.ray.conftest import make_table
from tests.serve.caller import Endpoint
from tests.serve.conftest import free_port, groups
from tests.serve.test_autoscaling import PACE, QUICK
from tests.support.endpoint import fake_model, serve_config
from tests.support.fake_nodes import growing_cluster

MOST = 3
PATIENCE_S = 120.0

SECONDS_PER_ROW = 0.4
LONG_ROWS = 40
"""Of one unit, a quarter of a minute: the others are done long before, and their nodes are idle."""

SHORT_ROWS = 4
SHORT_UNITS = 6


def workers() -> int:
    """Nodes with a CPU that run."""
    return sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes())


@dataclass
class Watch:
    """How many workers there were, several times a second, from `begin` to `end`."""

    seen: list[tuple[float, int]] = field(default_factory=list)
    _over: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Watch:
        self._started = time.monotonic()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.25):
            found = workers()
            if not self.seen or self.seen[-1][1] != found:
                self.seen.append((round(time.monotonic() - self._started, 1), found))

    @property
    def counts(self) -> list[int]:
        return [found for _, found in self.seen]


def wait_for(is_true: Callable[[], bool]) -> float:
    """Seconds until `is_true()`."""
    started = time.monotonic()
    while not is_true():
        assert time.monotonic() - started < PATIENCE_S, "it did not happen"
        time.sleep(0.25)
    return time.monotonic() - started


def grow_for_a_job(folder: Path) -> dict[str, Any]:
    """A job with one unit that takes long: nodes for all actors at once, and some of them given back before its end."""
    source, pace, ledger = folder / "in", folder / "pace", folder / "ledger"
    source.mkdir()
    ledger.mkdir()
    pace.write_text(str(SECONDS_PER_ROW))
    pq.write_table(make_table(LONG_ROWS // 4), source / "0.parquet")
    for number in range(SHORT_UNITS):
        pq.write_table(make_table(SHORT_ROWS // 4, first=1000 + number), source / f"{number + 1}.parquet")
    settings = {"unit_rows": LONG_ROWS, "engine": {"kind": "fake", "device": "cpu", "threads": 1}}
    open_scorer = partial(open_paced_scorer, pace=pace, ledger=ledger)
    try:
        score_parquet(source, folder / "out", ScoreConfig.model_validate(settings))
        refused = None
    except ConfigError as error:
        refused = str(error)
    config = ScoreConfig.model_validate({**settings, "actors": MOST})
    with Watch() as watch:
        summary = score_parquet(source, folder / "out", config, build_scorer=open_scorer)
    return {
        "auto_refused": refused,
        "rows": summary.rows,
        "ok": summary.ok,
        "seconds": summary.seconds,
        "workers_while_it_ran": watch.seen,
        "most_workers": max(watch.counts),
        "workers_at_its_end": watch.counts[-1],
        "seconds_to_none": wait_for(lambda: workers() == 0),
    }


def grow_for_an_endpoint() -> dict[str, Any]:
    """Replicas from none to as many as the queue asks for and back, and nodes with them."""
    from ray import serve

    from polar_ray.serving.app import build_application

    port = free_port()
    serve.start(
        proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port},
        logging_config={"log_level": "ERROR"},
    )  # fmt: skip
    endpoint = Endpoint("fleet", f"http://127.0.0.1:{port}/fleet")
    config = serve_config(replicas=f"0:{MOST}", replica_cpus=1, autoscaling=QUICK, drain_timeout_s=5)
    application = build_application(config, partial(fake_model, seconds_per_token=PACE))
    serve.run(application, name=endpoint.name, route_prefix=f"/{endpoint.name}")
    to_none = wait_for(lambda: not endpoint.replicas() and workers() == 0)
    answered = 0

    async def ask_once() -> None:
        async with endpoint.client() as client:
            await endpoint.score(client, groups(1, 2))

    async def ask_until(is_enough: threading.Event) -> None:
        async def one(client, number: int) -> None:
            nonlocal answered
            while not is_enough.is_set():
                triples = groups(10, 1, about=f"{number}, {answered}", words=10)
                answered += len(await endpoint.score(client, triples))

        async with endpoint.client() as client:
            await asyncio.gather(*(one(client, number) for number in range(16)))

    started = time.monotonic()
    asyncio.run(ask_once())
    first_answer = time.monotonic() - started
    enough = threading.Event()
    asking = threading.Thread(target=lambda: asyncio.run(ask_until(enough)))
    asking.start()
    try:
        to_most = wait_for(lambda: len(endpoint.replicas()) == MOST)
        nodes_at_most = workers()
    finally:
        enough.set()
        asking.join()
    back_to_no_replica = wait_for(lambda: not endpoint.replicas())
    back_to_no_node = wait_for(lambda: workers() == 0)
    endpoint.check_errors()
    serve.shutdown()
    return {
        "seconds_to_none_before": to_none,
        "seconds_from_none_to_the_first_answer": first_answer,
        "seconds_to_all_replicas": to_most,
        "workers_with_all_replicas": nodes_at_most,
        "rows_answered": answered,
        "calls_repeated": len(endpoint.errors),
        "seconds_to_no_replica": back_to_no_replica,
        "seconds_to_no_node": back_to_no_node,
    }


def main(output: Annotated[Path | None, typer.Option(help="JSON file for the result.")] = None) -> None:
    """Let a job and an endpoint grow a cluster from nothing and back."""
    notes = Console(stderr=True)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="growth-")))
        address = stack.enter_context(growing_cluster(folder, free_port(), most=MOST, cpus=1))
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        stack.callback(ray.shutdown)
        result = {"workers_at_the_start": workers(), "job": grow_for_a_job(folder)}
        notes.print("job: done")
        result["endpoint"] = grow_for_an_endpoint()
    text = json.dumps(result, indent=2)
    typer.echo(text)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n")


if __name__ == "__main__":
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="disabled", RAY_SERVE_LOG_TO_STDERR="0")
    typer.run(main)
