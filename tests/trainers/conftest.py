"""Trainers' own packages, and an endpoint for their reward functions to ask."""

import sys
from pathlib import Path

import pytest

from polar_ray import Scorer
from polar_ray.config import EngineConfig, LimitsConfig
from polar_ray.trainers.connection import close_connections
from tests.support.endpoint import running_endpoint, serve_config

CLIENTS = Path(__file__).parents[2] / ".clients"

ENGINE = {"kind": "torch", "device": "cpu", "dtype": "float32"}

LIMITS = {"on_empty": "score"}
"""A tiny random policy may answer with nothing."""


@pytest.fixture(scope="session")
def clients():
    """The folder of other projects' packages, importable, after everything of our own environment."""
    sys.path.append(str(CLIENTS))
    yield CLIENTS
    sys.path.remove(str(CLIENTS))


@pytest.fixture(scope="session")
def address():
    """The real API over the torch engine."""
    with running_endpoint(serve_config(engine=ENGINE, limits=LIMITS)) as address:
        yield address
        close_connections()


@pytest.fixture
def endpoint_in_environment(address, monkeypatch):
    """`address`, where adapters without arguments look for it."""
    monkeypatch.setenv("POLAR_RAY_ADDRESS", address)
    return address


@pytest.fixture(scope="session")
def scorer():
    """What every reward is compared with."""
    with Scorer.open(engine=EngineConfig(**ENGINE), limits=LimitsConfig(**LIMITS)) as scorer:
        yield scorer
