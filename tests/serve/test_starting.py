"""Who waits for an endpoint sees what its replicas are busy with."""

import asyncio
import time

import pytest
import ray
from ray import serve

from polar_ray.serving.starting import listening
from polar_ray.stages import stage
from tests.serve.caller import Endpoint
from tests.serve.conftest import groups, redeploy
from tests.support.endpoint import fake_model

pytestmark = pytest.mark.ray


def staged_model(config):
    """The fake one, which takes its time over a stage."""
    with stage("reading 15 GB of weights"):
        time.sleep(1)
    return fake_model(config, seconds_per_token=0.0)


def test_stages_of_a_replica_are_shown_while_it_starts_and_the_board_goes_with_who_waited(cluster):
    endpoint = Endpoint("staged", f"http://127.0.0.1:{cluster}/staged")
    seen = []
    with listening("staged", seen.append):
        redeploy(endpoint, load_model=staged_model)
    try:
        assert "reading 15 GB of weights" in seen
        endpoint.wait_for(lambda: not has_board("staged"))
    finally:
        serve.delete("staged")


def test_a_replica_that_nobody_waits_for_starts_as_well(deploy, truth):
    endpoint = deploy(load_model=staged_model)
    triples = groups(1, 2)

    async def ask():
        async with endpoint.client() as client:
            return await endpoint.score(client, triples)

    assert asyncio.run(ask()) == truth(triples)


def has_board(application):
    try:
        ray.get_actor(f"polar_ray_start:{application}", namespace="serve")
    except ValueError:
        return False
    return True
