"""What the manifests tell a cluster to run, run: on a cluster with token auth, by the commands that KubeRay gives."""

import json
import os
import secrets
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pyarrow.parquet as pq
import pytest
import yaml

from polar_ray import RewardClient, Triple
from polar_ray.config import load_config
from polar_ray.deployment.render import SETTINGS, render
from polar_ray.errors import Unauthorized
from tests.support.token_cluster import free_ports

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PROJECT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
START_S = 120
FINISH_S = 240
CALLERS_TOKEN = "callers-" + "t" * 24
OUR_OWN = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
ON_CPUS = ["workers.gpus=0", "workers.spot=0", "workers.steady=1"]


@pytest.fixture(scope="module")
def token_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("secrets") / "ray_token"
    file.touch(mode=0o600)
    file.write_text(secrets.token_hex(32))
    return file


@pytest.fixture(scope="module")
def with_token(token_file):
    """The environment of a process that may use the cluster, and finds what it needs as in the image."""
    return environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token_file))


def environment(**values):
    return {
        **OUR_OWN,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(PROJECT),
        "RAY_USAGE_STATS_ENABLED": "0",
        **values,
    }


@pytest.fixture(scope="module")
def addresses(with_token):
    """Where a cluster with token auth answers, whose environment is that of the manifest's pods."""
    statistics, metrics = free_ports(2)
    (head,) = manifest("serve", "serve.engine.device=cpu", "serve.replicas=1")["spec"]["rayClusterConfig"][
        "headGroupSpec"
    ]["template"]["spec"]["containers"]
    of_pods = {variable["name"]: variable["value"] for variable in head["env"] if variable["name"] != "HF_HOME"}
    of_this_machine = {  # where other clusters may be
        "RAY_SERVE_HAPROXY_STATS_PORT": str(statistics),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0.1",
    }
    command = [sys.executable, "-m", "tests.support.token_cluster"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    around = with_token | of_pods | of_this_machine
    with subprocess.Popen(command, cwd=PROJECT, env=around, text=True, **pipes) as cluster:
        yield json.loads(cluster.stdout.readline()) | {"haproxy": f"127.0.0.1:{metrics}"}
        cluster.stdin.close()
        assert cluster.wait(60) == 0


def manifest(kind, *settings):
    return next(yaml.safe_load_all(render(load_config(SETTINGS[kind], None, [*ON_CPUS, *settings]))))


def submit(entrypoint, addresses, environment):
    """As KubeRay's submitter does: v1.7, controllers/ray/common/job.go."""
    command = f"ray job submit --address http://{addresses['dashboard']} -- {entrypoint} ;"
    return start(["/bin/bash", "-ce", "--", command], environment)


def start(command, environment):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=PROJECT, env=environment, text=True, **pipes)


@pytest.fixture(scope="module")
def started(addresses, with_token, tmp_path_factory):
    """Everything that takes its time and needs nobody, at once: name to process. Outputs are under `place`."""
    place = tmp_path_factory.mktemp("it's a place")
    corpus_job = manifest(
        "score",
        f'inputs=["{PROJECT}/jobs/demo/*.parquet"]',
        f"output={place}/scored",
        f"config={PROJECT}/jobs/score/smoke.toml",
        "settings.engine.kind=fake",
        "settings.engine.threads=1",
    )
    score = ["polar-ray", "score", "jobs/demo/triples.parquet", "--output", str(place / "refused")]
    nobody = {"HOME": str(place), "RAY_ADDRESS": addresses["gcs"]}
    processes = {
        "score": submit(corpus_job["spec"]["entrypoint"], addresses, with_token),
        "no token": start(score, environment(RAY_AUTH_MODE="token", **nobody)),
        "no token mode": start(score, environment(RAY_AUTH_MODE="disabled", **nobody)),
    }
    yield place, processes
    for process in processes.values():
        process.kill()
        process.wait()


def finish(process):
    """(exit code, what was printed), as often as asked."""
    if process.returncode is None:
        try:
            process.said, _ = process.communicate(timeout=FINISH_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.said, _ = process.communicate()
    return process.returncode, process.said


@pytest.fixture(scope="module")
def endpoint(addresses, token_file, tmp_path_factory):
    """Where the endpoint of the RayService answers, deployed by the dashboard as the operator does it."""
    tokens = tmp_path_factory.mktemp("tokens") / "tokens"
    tokens.write_text(CALLERS_TOKEN)
    service = manifest(
        "serve",
        "serve.model=embedded",
        "serve.replicas=1",
        "serve.replica_cpus=0.5",
        "serve.engine.kind=fake",
        "serve.engine.device=cpu",
        "serve.engine.dtype=float32",
        f"serve.auth.tokens_file={tokens}",
    )
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    (port,) = free_ports(1)
    config["http_options"] |= {"host": "127.0.0.1", "port": port}
    bearer = {"Authorization": f"Bearer {token_file.read_text()}"}
    with httpx.Client(base_url=f"http://{addresses['dashboard']}/api/serve", headers=bearer, timeout=START_S) as api:
        bring_up(api, config)
        yield f"127.0.0.1:{port}"
        api.delete("/applications/").raise_for_status()


def bring_up(api, config):
    """As the operator does: ask, again while the answer is an error, until the application runs."""
    deadline = time.monotonic() + START_S
    asked = api.put("/applications/", json=config)
    while True:
        assert time.monotonic() < deadline, asked.text
        time.sleep(0.2)
        if asked.status_code != 200:
            asked = api.put("/applications/", json=config)
            continue
        application = api.get("/applications/").json()["applications"].get("polar", {})
        if application.get("status") == "RUNNING":
            return
        assert application.get("status") not in ("DEPLOY_FAILED", "UNHEALTHY"), application["message"]


def test_the_endpoint_comes_up_behind_haproxy_and_rays_token_opens_nothing_there(endpoint, addresses, token_file):
    triple = Triple("What is the capital of China?", "Beijing.", "Shanghai.")
    with RewardClient(endpoint, token=CALLERS_TOKEN) as client:
        assert len(client.rewards([triple])) == 1
        assert client.score([Triple(triple.prompt, triple.reference, "")])[0].status == "triple_empty"
    for token in (None, token_file.read_text()):
        with RewardClient(endpoint, token=token) as client, pytest.raises(Unauthorized):
            client.rewards([triple])
    assert "haproxy_" in httpx.get(f"http://{addresses['haproxy']}/metrics").text


def test_a_corpus_job_is_submitted_runs_and_leaves_rewards(started):
    code, said = finish(started[1]["score"])
    assert code == 0, said[-3000:]
    assert pq.read_table(started[0] / "scored")["reward_status"].to_pylist() == ["ok"] * 43


def test_a_training_run_is_submitted_runs_and_leaves_a_checkpoint(addresses, with_token, tmp_path):
    training_run = manifest(
        "train",
        f'inputs=["{PROJECT}/jobs/demo/pairs.jsonl"]',
        f"output={tmp_path}/tuned",
        f"config={PROJECT}/jobs/train/tiny.toml",
        "settings.model=embedded",
        "settings.max_steps=1",
        "settings.threads=1",
    )
    code, said = finish(submit(training_run["spec"]["entrypoint"], addresses, with_token))
    assert code == 0, said[-3000:]
    assert (tmp_path / "tuned" / "model.safetensors").exists()
    assert json.loads((tmp_path / "tuned" / "receipt.json").read_text())["config"]["max_steps"] == 1


def test_no_text_and_no_token_is_in_any_log_of_the_cluster(addresses, endpoint, started, token_file):
    finish(started[1]["score"])
    triples = [json.loads(line) for line in (PROJECT / "jobs" / "demo" / "triples.jsonl").read_text().splitlines()]
    texts = {text for triple in triples for text in triple.values() if isinstance(text, str) and len(text) > 20}
    assert len(texts) > 40
    private = [text.encode() for text in texts] + [CALLERS_TOKEN.encode(), token_file.read_bytes()]
    logs = [file for file in Path(addresses["logs"]).rglob("*") if file.is_file()]
    assert any("serve" in str(file) for file in logs)
    assert any("job-driver" in file.name for file in logs)
    for file in logs:
        content = file.read_bytes()
        assert not [text for text in private if text in content], file


def test_without_the_token_nobody_submits_a_job(addresses):
    asked = httpx.post(f"http://{addresses['dashboard']}/api/jobs/", json={"entrypoint": "echo I should not run"})
    assert asked.status_code == 401


@pytest.mark.parametrize("route", ["/api/jobs/", "/api/version", "/api/serve/applications/", "/nodes?view=summary"])
def test_without_the_token_the_dashboard_says_nothing(addresses, route):
    assert httpx.get(f"http://{addresses['dashboard']}{route}").status_code == 401


def test_a_nodes_health_needs_no_token_as_kubernetes_has_none(addresses):
    assert httpx.get(f"http://{addresses['agent']}/api/healthz").status_code == 200


@pytest.mark.parametrize("name", ["no token", "no token mode"])
def test_a_job_without_the_token_is_told_what_to_set(started, name):
    code, said = finish(started[1][name])
    assert code == 2
    assert "error (config_invalid)" in said
    assert "RAY_AUTH_TOKEN_PATH to a file with it" in said
    assert "Traceback" not in said
    assert not (started[0] / "refused" / "_polar_ray" / "manifest.json").exists()
