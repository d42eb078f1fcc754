"""A replica that can give no more rewards is replaced; one that cannot start says why."""

import asyncio
import os
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import pytest

from polar_ray.config import EngineConfig, ServeConfig
from polar_ray.engines.fake import FakeEngine
from polar_ray.errors import EngineError, EngineUnavailable
from polar_ray.planning import Batch
from polar_ray.scoring import Scorer
from polar_ray.serving.service import Model
from tests.serve.caller import LEAKS
from tests.serve.conftest import groups
from tests.support.endpoint import model_of
from tests.support.lmdeploy_server import servers_below, start_engine, write_interpreter
from tests.support.ranks import are_gone, ranks_below

pytestmark = pytest.mark.ray

TOKENS = ("first-token-of-callers", "second-token-of-callers")


class BreakableEngine(FakeEngine):
    """Fails at everything from the moment that `broken`, a file, names this process."""

    def __init__(self, broken: Path) -> None:
        super().__init__()
        self._broken = broken

    def score(self, batch: Batch) -> np.ndarray:
        if self._broken.exists() and self._broken.read_text() == str(os.getpid()):
            raise EngineError("a kernel failed")
        return super().score(batch)


def breakable_model(config: ServeConfig, broken: Path) -> Model:
    return model_of(BreakableEngine(broken), config)


def test_a_replica_whose_engine_breaks_is_replaced(deploy, truth, tmp_path):
    broken = tmp_path / "broken"
    endpoint = deploy(load_model=partial(breakable_model, broken=broken))
    (first,) = endpoint.replicas()
    broken.write_text(str(first))
    triples = groups(2, 2)

    async def ask(tried):
        async with endpoint.client() as client:
            return await tried(client, triples)

    with pytest.raises(EngineUnavailable):
        asyncio.run(ask(endpoint.ask))
    refused = httpx.get(f"{endpoint.url}/healthz")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
    assert asyncio.run(ask(endpoint.score)) == truth(triples)
    assert first not in endpoint.replicas()
    endpoint.check_errors()


def deploy_ranks(deploy, tmp_path):
    engine = {"kind": "torch", "device": "cpu", "dtype": "float32", "tensor_parallel_size": 2, "threads": 2}
    return deploy(engine=engine, load_model=Model.load), ranks_below


def deploy_server(deploy, tmp_path):
    """LMDeploy's engine and a server of its own."""
    python = write_interpreter(tmp_path)
    return deploy(load_model=lambda config: model_of(start_engine(python), config)), servers_below


@pytest.mark.parametrize(
    ("deploy_engine", "n_processes"),
    [pytest.param(deploy_ranks, 2, id="rank"), pytest.param(deploy_server, 1, id="server", marks=pytest.mark.slow)],
)
def test_a_replica_that_loses_a_process_of_its_engine_in_a_call_is_replaced(
    deploy, tmp_path, deploy_engine, n_processes
):
    endpoint, processes_below = deploy_engine(deploy, tmp_path)
    (first,) = endpoint.replicas()
    processes = processes_below(first)
    assert len(processes) == n_processes
    triples = groups(2, 2)

    async def ask():
        async with endpoint.client() as client:
            asking = asyncio.create_task(endpoint.score(client, triples))
            await asyncio.sleep(0.5)
            assert not asking.done()
            processes[-1].kill()
            return await asking

    processes[-1].suspend()
    found = asyncio.run(ask())
    with Scorer.open(engine=EngineConfig(device="cpu", dtype="float32")) as scorer:
        assert found == pytest.approx([row.reward for row in scorer.score(triples)], abs=1e-4)
    endpoint.check_errors()
    assert first not in endpoint.replicas()
    assert are_gone(processes)


def test_tokens_are_wanted_through_the_proxy_and_can_be_rotated(deploy, tmp_path):
    file = tmp_path / "tokens"
    file.write_text(f"# two callers\n{TOKENS[0]}\n")
    endpoint = deploy(replicas=2, auth={"tokens_file": str(file)})

    def ask(token=None, path="/v1/models"):
        headers = {"authorization": f"Bearer {token}"} if token else {}
        replies = [httpx.get(f"{endpoint.url}{path}", headers=headers) for _ in range(6)]
        assert not [reply for reply in replies if reply.status_code != 200 and LEAKS.search(reply.content)]
        (status,) = {reply.status_code for reply in replies}
        return status

    assert [ask(), ask(TOKENS[1]), ask(TOKENS[0])] == [401, 401, 200]
    assert [ask(path="/metrics"), ask(TOKENS[0], path="/metrics"), ask(path="/healthz")] == [401, 200, 200]
    file.write_text("\n".join(TOKENS))
    assert [ask(TOKENS[0]), ask(TOKENS[1])] == [200, 200]
    file.write_text(f"{TOKENS[1]}\n")
    assert [ask(TOKENS[0]), ask(TOKENS[1])] == [401, 200]


def test_where_tokens_are_required_and_missing_nothing_comes_up(cluster, tmp_path):
    from ray import serve

    from polar_ray.serving.app import build_application
    from tests.support.endpoint import fake_model, serve_config

    config = serve_config(replica_cpus=0.1, auth={"mode": "required"})
    application = build_application(config, fake_model)
    with pytest.raises(RuntimeError):
        serve.run(application, name="closed", route_prefix="/closed")
    said = "".join(deployment.message for deployment in serve.status().applications["closed"].deployments.values())
    assert "ConfigError: a token is required and there are none" in said
    serve.delete("closed")
