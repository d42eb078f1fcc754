"""The roads on which a caller reaches an engine, each in processes of its own for as long as it is measured."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

import httpx
import uvicorn
from fastapi import FastAPI

from polar_ray.bench.processes import ProcessTree
from polar_ray.config import HttpConfig, ServeConfig
from polar_ray.errors import EngineStartError
from polar_ray.serving.api import build_api
from polar_ray.serving.service import Model, RewardService, freeze_heap

START_S, STOP_S = 120.0, 60.0


@dataclass(frozen=True)
class Endpoint:
    """One that answers."""

    url: str
    pid: int

    def cpu_s(self) -> float:
        """User and system seconds so far of its process and all that descend from it."""
        return ProcessTree(self.pid).cpu_s()


@contextmanager
def bare(config: ServeConfig) -> Iterator[Endpoint]:
    """The API under uvicorn, without Ray."""
    config = _on_free_port(config)
    process = multiprocessing.get_context("spawn").Process(target=_serve_bare, args=(config,), daemon=True)
    process.start()
    assert process.pid is not None
    try:
        _wait_until_up(config, process.is_alive, lambda: "its process ended")
        yield Endpoint(_url(config), process.pid)
    finally:
        process.terminate()
        process.join(STOP_S)


@contextmanager
def proxy(config: ServeConfig, switches: Mapping[str, str] | None = None) -> Iterator[Endpoint]:
    """`polar-ray serve` on a cluster of its own, behind Ray Serve's default proxy."""
    config = _on_free_port(config)
    command = [sys.executable, "-m", "polar_ray", "serve"]
    for assignment in _assignments(config.model_dump(mode="json", exclude_unset=True)):
        command += ["--set", assignment]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command, env={**_environment(), **(switches or {})}, stdout=said, stderr=said, start_new_session=True
        )
        try:
            _wait_until_up(config, lambda: process.poll() is None, lambda: _last_line(said))
            yield Endpoint(_url(config), process.pid)
        finally:
            _stop(process)


def haproxy(config: ServeConfig) -> AbstractContextManager[Endpoint]:
    """`polar-ray serve` on a cluster of its own, behind the HAProxy that Ray Serve brings up."""
    switches = {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0.1",  # else it would take half a minute to stop
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(_free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(_free_port()),
    }
    return proxy(config, switches)


ROADS: dict[str, Callable[[ServeConfig], AbstractContextManager[Endpoint]]] = {
    "bare": bare,
    "proxy": proxy,
    "haproxy": haproxy,
}


def _serve_bare(config: ServeConfig) -> None:
    os.setsid()  # as the other roads: Linux shares a busy machine out by session
    uvicorn.run(
        partial(_build_bare, config),
        factory=True,
        host=config.http.host,
        port=config.http.port,
        log_level="error",
        access_log=False,
        lifespan="off",
    )


def _build_bare(config: ServeConfig) -> FastAPI:
    """Called by uvicorn in the event loop that requests will run in."""
    service = RewardService(Model.load(config), config)
    freeze_heap()
    return build_api(service)


def _on_free_port(config: ServeConfig) -> ServeConfig:
    return config.model_copy(update={"http": HttpConfig(port=_free_port())})


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
    return port


def _url(config: ServeConfig) -> str:
    return f"http://{config.http.host}:{config.http.port}"


def _assignments(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """As `--set` takes them; JSON's plain values are TOML's."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _assignments(value, f"{prefix}{name}.")
        elif value is not None:
            yield f"{prefix}{name}={json.dumps(value)}"


def _environment() -> dict[str, str]:
    """Ours without what would lead to somebody else's cluster or switch the proxy."""
    strangers = ("RAY_ADDRESS", "RAY_SERVE_", "POLAR_RAY_")
    return {name: value for name, value in os.environ.items() if not name.startswith(strangers)}


def _wait_until_up(config: ServeConfig, is_alive: Callable[[], bool], last_words: Callable[[], str]) -> None:
    deadline = time.monotonic() + START_S
    while is_alive():
        if time.monotonic() > deadline:
            raise EngineStartError(f"nothing answers after {START_S:g} s; {last_words()}")
        try:
            if httpx.get(f"{_url(config)}/healthz", trust_env=False).is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise EngineStartError(f"the endpoint did not come up: {last_words()}")


def _last_line(said: IO[str]) -> str:
    said.seek(0)
    lines = [line.strip() for line in said if line.strip()]
    return lines[-1] if lines else "it said nothing"


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
