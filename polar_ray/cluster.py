"""A connection to Ray for as long as something runs: the process's own, a cluster's, or one on this machine."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import ray
from ray.exceptions import AuthenticationError

from polar_ray.config import ray_address
from polar_ray.errors import ConfigError

CONNECT_SECONDS = 10.0

OBJECT_STORE_BYTES = 128 << 20
"""Of a cluster started for one job: only numbers of units and their reports pass through it."""


@contextmanager
def ray_cluster(object_store_bytes: int = OBJECT_STORE_BYTES) -> Iterator[None]:
    """A connection to Ray: this process's own if it has one, else RAY_ADDRESS, else a cluster on this machine.

    Raises `ConfigError` when nothing answers at RAY_ADDRESS, or what does lets nobody in without a token.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # else Ray's C++ warns on this terminal at every pool start
    _keep_logs_off_the_terminal()
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    address = ray_address()
    with silence():
        if address is None:
            ray.init(address="local", include_dashboard=False, object_store_memory=object_store_bytes, **quiet)
        else:
            _connect(address, **quiet)
    try:
        yield
    finally:
        with silence():
            ray.shutdown()


def _keep_logs_off_the_terminal() -> None:
    """Ray Data's log goes to its file only: the job has a progress line of its own, and raises what went wrong."""
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.CRITICAL + 1)


def _connect(address: str, **quiet: Any) -> None:
    host, colon, port = address.rpartition(":")
    found = f"RAY_ADDRESS = {address!r}: "
    try:
        if colon and port.isdigit() and "://" not in address:
            # Ray itself waits for minutes, in silence, for a host that is not there
            socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise ConfigError(f"{found}no Ray cluster answers there ({error})") from None
    try:
        ray.init(address=address, **quiet)
    except AuthenticationError:
        raise ConfigError(
            f"{found}RAY_AUTH_MODE asks for a token and there is none; set RAY_AUTH_TOKEN to the cluster's, or "
            "RAY_AUTH_TOKEN_PATH to a file with it"
        ) from None
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"{found}no Ray cluster there lets this process in ({error}); it must have this version of Ray, and if it "
            "has token auth, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to a file with its token"
        ) from None


@contextmanager
def silence() -> Iterator[None]:
    """Keep Ray off the terminal while it comes and goes.

    Its C++ writes to file descriptor 2, below anything Python could filter; its threads print to stdout about calls
    that an actor took with it.
    """
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def has_gpu() -> bool:
    """Whether the cluster has a GPU now."""
    return bool(ray.cluster_resources().get("GPU", 0))


def has_workers() -> bool:
    """Whether any node that runs has a CPU or GPU to offer: a cluster that grows on demand may have none yet."""
    return any(node["Resources"].get(name, 0) for node in ray.nodes() if node["Alive"] for name in ("CPU", "GPU"))


def is_of_this_process() -> bool:
    """Whether this process has started the cluster: it is this machine, and cannot grow."""
    node = ray._private.worker._global_node  # Ray has no public way to tell a started cluster from one connected to
    return node is not None and bool(node.is_head())
