"""An endpoint through a random schedule of faults, with callers who count.

    python -m tests.chaos.endpoint --seed 1 --faults 12 --output build/chaos_endpoint.json

Sixteen callers ask all the while, as polar_ray's client does: what is retryable is asked again. Every answer is
compared with what the Scorer gives for the same triples.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console

from polar_ray.config import EngineConfig
from polar_ray.errors import PolarRayError
from polar_ray.scoring import Scorer
from tests.chaos.cluster import WORKERS, ChaosCluster, chaos_cluster
from tests.serve.caller import Endpoint
from tests.serve.conftest import free_port, groups, redeploy
from tests.serve.test_under_load import CALLERS, PACE, ROWS_PER_CALL

RECOVERY_S = 60.0
"""For replicas to be as many as before."""


class Faults:
    """What may happen, by name: the methods that do not begin with an underscore. Each gives whether it happened."""

    def __init__(self, cluster: ChaosCluster) -> None:
        self._cluster = cluster

    def kill_replica(self) -> bool:
        return self._cluster.kill_process("ServeReplica:fleet")

    def slow_replica(self) -> bool:
        return self._cluster.pause_process("ServeReplica:fleet", seconds=3)

    def kill_controller(self) -> bool:
        return self._cluster.kill_process("ServeController")

    def kill_proxy(self) -> bool:
        return self._cluster.kill_process("ProxyActor")

    def kill_metrics_board(self) -> bool:
        return self._cluster.kill_process("MetricsBoard")

    def lose_node(self) -> bool:
        self._cluster.lose_node()
        return True

    def drain_node(self) -> bool:
        self._cluster.drain_node(notice_s=3)
        return True

    def freeze_node(self) -> bool:
        self._cluster.freeze_node(seconds=6)
        return True

    def restart_gcs(self) -> bool:
        self._cluster.restart_gcs(seconds=2)
        return True


@dataclass
class Callers:
    """Sixteen who ask until told to stop, and what became of their rows."""

    endpoint: Endpoint
    scorer: Scorer
    stop: threading.Event = field(default_factory=threading.Event)
    asked: int = 0
    answered: int = 0
    wrong: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    """Rows whose call ended with an error that its caller could not mend by asking again for a minute."""

    async def ask(self) -> None:
        async with self.endpoint.client() as client:
            await asyncio.gather(*(self._one(client, number) for number in range(CALLERS)))

    async def _one(self, client: httpx.AsyncClient, number: int) -> None:
        call = 0
        while not self.stop.is_set():
            triples = groups(2, ROWS_PER_CALL // 2, about=f"caller {number}, call {call}", words=20)
            call += 1
            self.asked += len(triples)
            try:
                rewards = await self.endpoint.score(client, triples)
            except PolarRayError as error:
                self.refused[error.code] += len(triples)
                continue
            right = [row.reward for row in self.scorer.score(triples)]
            self.answered += len(rewards)
            self.wrong += sum(given != wanted for given, wanted in zip(rewards, right, strict=True))


def run(seed: int, n_faults: int, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Do it; gives what came of it. Every kind of fault happens before one happens twice."""
    import ray
    from ray import serve

    chance = random.Random(seed)
    kinds = [name for name in dir(Faults) if not name.startswith("_")]
    schedule = [name for _ in range(-(-n_faults // len(kinds))) for name in chance.sample(kinds, len(kinds))][:n_faults]
    done: Counter[str] = Counter()
    started = time.monotonic()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        cluster = stack.enter_context(chaos_cluster(chance, folder / "gcs"))
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        stack.callback(ray.shutdown)
        port = free_port()
        serve.start(
            proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port},
            logging_config={"log_level": "ERROR"},
        )  # fmt: skip
        stack.callback(serve.shutdown)
        endpoint = Endpoint("fleet", f"http://127.0.0.1:{port}/fleet")
        redeploy(endpoint, replicas=WORKERS, replica_cpus=1, seconds_per_token=PACE)
        endpoint.wait_for(lambda: _is_whole(endpoint), RECOVERY_S)
        scorer = stack.enter_context(Scorer.open(engine=EngineConfig(kind="fake", device="cpu")))
        callers = Callers(endpoint, scorer)
        asking = stack.enter_context(ThreadPoolExecutor(1)).submit(lambda: asyncio.run(callers.ask()))
        stack.callback(callers.stop.set)
        for name in schedule:
            before = callers.answered
            happened = getattr(Faults(cluster), name)()
            done[name] += happened
            endpoint.wait_for(lambda: _is_whole(endpoint), RECOVERY_S)
            endpoint.wait_for(lambda before=before: callers.answered > before + ROWS_PER_CALL * CALLERS, RECOVERY_S)
            say(f"{name}{'' if happened else ' (nothing there to be hit)'}: {len(endpoint.errors)} errors so far")
        callers.stop.set()
        asking.result()
        endpoint.check_errors()
    return {
        "seed": seed,
        "faults": dict(sorted(done.items())),
        "faults_survived": sum(done.values()),
        "rows_asked": callers.asked,
        "rows_answered": callers.answered,
        "rows_wrong": callers.wrong,
        "rows_refused": dict(callers.refused),
        "calls_repeated": dict(Counter(error.code for error in endpoint.errors)),
        "seconds": time.monotonic() - started,
    }


def _is_whole(endpoint: Endpoint) -> bool:
    """Whether as many replicas run as before, as far as Serve, which may just be coming up itself, can tell."""
    try:
        return len(endpoint.replicas()) == WORKERS
    except Exception:  # whatever Ray raises while its controller or GCS is away
        return False


def main(
    seed: Annotated[int, typer.Option(help="Another seed, another schedule.")] = 0,
    faults: Annotated[int, typer.Option(min=1, help="How many.")] = 9,
    output: Annotated[Path | None, typer.Option(help="JSON file for the result.")] = None,
) -> None:
    """Drive an endpoint through faults while callers ask."""
    notes = Console(stderr=True)
    result = run(seed, faults, lambda line: notes.print(f"{time.strftime('%H:%M:%S')} {line}"))
    text = json.dumps(result, indent=2)
    typer.echo(text)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n")
    raise typer.Exit(result["rows_answered"] != result["rows_asked"] or result["rows_wrong"] > 0)


if __name__ == "__main__":
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="disabled", RAY_SERVE_LOG_TO_STDERR="0")
    typer.run(main)
