"""A real local Ray cluster with Serve's proxy, and applications on it whose engines have a pace or a fault."""

import itertools
import logging
import os
import random
import socket
from contextlib import contextmanager, suppress
from functools import partial

import pytest

from polar_ray.scoring import Scorer
from polar_ray.triples import Triple
from tests.serve.caller import Endpoint
from tests.support.endpoint import fake_model, serve_config

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")

START_S = 60

names = (f"app{n}" for n in itertools.count())


@pytest.fixture(scope="package")
def cluster():
    """Eight logical CPUs and a proxy on a free loopback port, whose number it gives.

    A process has one connection to Ray: a cluster that another folder's tests are done with is taken down first.
    """
    import ray
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    ray.shutdown()
    ray.init(
        address="local", num_cpus=8, include_dashboard=False, object_store_memory=256 << 20, log_to_driver=False,
        logging_level="ERROR", _system_config={"metrics_report_interval_ms": 500},
    )  # fmt: skip
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"log_level": "ERROR"})
    yield port
    serve.shutdown()
    ray.shutdown()


@pytest.fixture
def deploy(cluster):
    """`deploy(seconds_per_token=0, load_model=None, **settings)`: an `Endpoint` that answers; gone after the test."""
    with deploying(cluster) as start:
        yield start


@pytest.fixture(scope="module")
def module_deploy(cluster):
    """`deploy`, for endpoints that a module's tests share."""
    with deploying(cluster) as start:
        yield start


@contextmanager
def deploying(port):
    from ray import serve

    deployed = []

    def start(**changes):
        name = next(names)
        deployed.append(name)
        endpoint = Endpoint(name, f"http://127.0.0.1:{port}/{name}")
        redeploy(endpoint, **changes)
        return endpoint

    yield start
    for name in deployed:
        serve.delete(name)


def redeploy(endpoint, *, seconds_per_token=0.0, load_model=None, **settings):
    """Deploy in the place of what `endpoint` is now, and wait until it answers."""
    from ray import serve

    from polar_ray.serving.app import build_application

    config = serve_config(**{"replica_cpus": 0.1, "drain_timeout_s": 20, **settings})
    application = build_application(config, load_model or partial(fake_model, seconds_per_token=seconds_per_token))
    serve.run(application, name=endpoint.name, route_prefix=f"/{endpoint.name}")
    endpoint.wait_until_ready(START_S)


def free_port() -> int:
    """Below the ports that systems hand out and above those of Ray's workers: nobody takes it before it is bound."""
    for port in random.sample(range(20000, 30000), 100):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("a hundred ports, and none is free")


@pytest.fixture(scope="session")
def truth():
    """`truth(triples)`: what `Scorer` gives for them, with the fake engine."""
    config = serve_config()
    with Scorer.open(engine=config.engine, limits=config.limits) as scorer:
        yield lambda triples: [row.reward for row in scorer.score(triples)]


def groups(n_groups: int, outputs: int, *, about: str = "apples", words: int = 1) -> list[Triple]:
    """Triples in groups that share prompt and reference; `words` makes the prompts longer."""
    padding = " and".join([" so on"] * words)
    return [
        Triple(
            f"Question {group} about {about}{padding}: how many?", f"There are {group * 3}.", f"I count {group + n}."
        )
        for group in range(n_groups)
        for n in range(outputs)
    ]


@contextmanager
def environment(**values):
    """Environment variables of this process, for what is started meanwhile."""
    kept = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in kept.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
