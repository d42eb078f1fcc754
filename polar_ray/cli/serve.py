"""`polar-ray serve`: an endpoint on this machine, or on the cluster at RAY_ADDRESS."""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import httpx
import typer
from rich.console import Console
from rich.table import Table

from polar_ray.cli.options import Assignments, ConfigFile, Dtype, Model
from polar_ray.config import ServeConfig, load_config, ray_address
from polar_ray.errors import ConfigError, EngineStartError
from polar_ray.serving.auth import Gate
from polar_ray.wire import REWARDS_PATH

if TYPE_CHECKING:
    from ray.serve import Application

    from polar_ray.wire import ModelReply

APPLICATION = "polar_ray"

OBJECT_STORE_BYTES = 512 << 20
"""Of a cluster started for one endpoint: the bodies of large requests pass through it."""

PROXY_SECONDS = 30.0

UNTRAINED = "The weights of this checkpoint are untrained: its rewards are random numbers. Name a model with --model."


def serve(
    model: Model = None,
    replicas: Annotated[str | None, typer.Option(help="Engines: N, or MIN:MAX to follow the queue.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. Left out: this machine only.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on. Left out: 8000.")] = None,
    engine: Annotated[str | None, typer.Option(help="torch, or fake for a dry run.")] = None,
    tensor_parallel_size: Annotated[
        int | None, typer.Option(help="GPUs of one replica; without GPUs, processes that share its threads.")
    ] = None,
    dtype: Dtype = None,
    tokens_file: Annotated[Path | None, typer.Option(help="File of bearer tokens, one a line.")] = None,
    config: ConfigFile = None,
    assignments: Assignments = None,
) -> None:
    """Serve rewards over HTTP, for trainers and people.

    Opens a playground in the browser, the native API and the protocols of
    the trainers; /docs lists them. Ctrl-C finishes what was accepted and
    stops. Tokens come from --tokens-file or POLAR_RAY_TOKENS.

    [dim]polar-ray serve[/]
    [dim]polar-ray serve --model internlm/POLAR-7B --replicas 1:8 --port 8000[/]
    [dim]polar-ray serve --set queue.max_queued_tokens=500000 --set limits.cut_side=left[/]
    """
    settings = load_config(
        ServeConfig,
        config,
        assignments or (),
        model=model,
        replicas=replicas,
        http__host=host,
        http__port=port,
        engine__kind=engine,
        engine__dtype=dtype,
        engine__tensor_parallel_size=tensor_parallel_size,
        auth__tokens_file=tokens_file,
    )
    notes = Console(stderr=True)
    # In this order, because Ray takes SIGTERM for itself.
    with running(settings, notes) as described, _stop_signals() as stopped:
        _show(settings, described)
        stopped.wait()
        notes.print("finishing what was accepted ...", highlight=False)


@contextmanager
def running(settings: ServeConfig, notes: Console) -> Iterator[ModelReply]:
    """The endpoint, up and answering, with what it says of itself; gone afterwards.

    Raises `ConfigError` or `CheckpointError` for the settings, `EngineStartError` when no replica comes up.
    """
    _refuse_open_doors(settings)
    _refuse_taken_port(settings)
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
    with ExitStack() as stack:
        with notes.status("starting Ray" if ray_address() is None else "connecting to Ray") as stage:
            from ray import serve as ray_serve

            from polar_ray.cluster import ray_cluster
            from polar_ray.serving.app import build_application
            from polar_ray.serving.starting import listening

            logging.getLogger("ray.serve").setLevel(logging.ERROR)
            stack.enter_context(ray_cluster(OBJECT_STORE_BYTES))
            stack.enter_context(_sigterm_as_ctrl_c())
            stage.update("checking the model")
            application = build_application(settings)
            stage.update("starting the proxy")
            ray_serve.start(
                http_options={"host": settings.http.host, "port": settings.http.port},
                logging_config={"log_level": "ERROR", "enable_access_log": False},
            )
            stack.callback(_take_down)
            loading = f"loading {settings.model}, {settings.replicas} replica(s)"
            stage.update(loading)

            def show(text: str) -> None:
                if notes.is_terminal:
                    stage.update(f"{loading}: {text}")
                else:
                    notes.print(text, highlight=False)

            with listening(APPLICATION, show):
                _deploy(application)
            _wait_for_proxy(settings)
            described = _describe()
        yield described


def _deploy(application: Application) -> None:
    from ray import serve as ray_serve

    try:
        ray_serve.run(application, name=APPLICATION, route_prefix="/")
    except RuntimeError:
        status = ray_serve.status().applications[APPLICATION]
        said = " ".join([status.message, *(deployment.message for deployment in status.deployments.values())])
        ours = re.findall(r"polar_ray\.errors\.\w+: [^\n]+", said)
        raise EngineStartError(ours[-1].partition(": ")[2] if ours else "no replica came up; see Ray's logs") from None


def _wait_for_proxy(settings: ServeConfig) -> None:
    """The proxy learns of a new application a moment after it is deployed."""
    deadline = time.monotonic() + PROXY_SECONDS
    while time.monotonic() < deadline:
        try:
            # Of this machine, whatever HTTP_PROXY says about the world.
            if httpx.get(f"{_local_url(settings)}/healthz", trust_env=False).is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise EngineStartError(f"nothing answers at {_local_url(settings)} after {PROXY_SECONDS:g} s; see Ray's logs")


def _describe() -> ModelReply:
    from ray import serve as ray_serve

    from polar_ray.serving.app import DEPLOYMENT

    described: ModelReply = ray_serve.get_deployment_handle(DEPLOYMENT, APPLICATION).describe.remote().result()
    return described


def _take_down() -> None:
    """Of a cluster that is not ours, the application only."""
    from ray import serve as ray_serve

    from polar_ray.cluster import silence

    with silence():
        if ray_address() is None:
            ray_serve.shutdown()
        else:
            ray_serve.delete(APPLICATION)


def _refuse_open_doors(settings: ServeConfig) -> None:
    """An address that others reach wants tokens, unless it was said that it does not; and tokens must be there."""
    if _is_open(settings) and settings.auth.mode == "auto" and not _is_loopback(settings.http.host):
        raise ConfigError(
            f"http.host = {settings.http.host!r} is open to the network and there are no tokens; give --tokens-file or "
            "POLAR_RAY_TOKENS, or say --set auth.mode=none"
        )


def _refuse_taken_port(settings: ServeConfig) -> None:
    http = settings.http
    family = socket.AF_INET6 if ":" in http.host else socket.AF_INET
    try:
        # Ray listens at `::` for IPv4 as well.
        both = http.host == "::" and socket.has_dualstack_ipv6()
        with socket.create_server((http.host, http.port), family=family, dualstack_ipv6=both):
            pass
    except OSError as error:
        raise ConfigError(
            f"http.port = {http.port}: cannot listen there ({error.strerror}); choose another with --port"
        ) from None


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _local_url(settings: ServeConfig) -> str:
    """How this machine reaches the endpoint."""
    host = "127.0.0.1" if settings.http.host in ("0.0.0.0", "::") else settings.http.host
    return f"http://{f'[{host}]' if ':' in host else host}:{settings.http.port}"


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """While an endpoint comes up. Ray's own handler, which `ray.init` puts in place, aborts the process."""
    kept = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if kept is None else kept)


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """Set by Ctrl-C and by SIGTERM."""
    stopped = threading.Event()
    kept = {number: signal.signal(number, lambda *_: stopped.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def _show(settings: ServeConfig, described: ModelReply) -> None:
    url = _local_url(settings)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("playground", f"{url}/")
    table.add_row("rewards", f"POST {url}{REWARDS_PATH}")
    table.add_row("protocols", f"{url}/docs")
    table.add_row("metrics", f"{url}/metrics")
    receipt = described.receipt
    how = f"{receipt['engine']}, {receipt['dtype']} on {receipt['device']}, {settings.replicas} replica(s)"
    table.add_row("model", f"{described.id}: {how}")
    table.add_row("receipt", described.receipt_id)
    anybody = "anybody on this machine" if _is_loopback(settings.http.host) else "anybody"
    table.add_row("callers", anybody if _is_open(settings) else "with a token")
    Console().print(table)
    if described.untrained:
        Console(stderr=True).print(UNTRAINED, style="yellow", soft_wrap=True)
    Console(stderr=True).print("Ctrl-C stops it.", style="dim")


def _is_open(settings: ServeConfig) -> bool:
    return Gate(settings.auth).is_open
