"""The application as `serve run`, `serve deploy` and `polar-ray serve` start it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from polar_ray import RewardClient, score_parquet
from polar_ray.config import EngineConfig, ScoreConfig
from polar_ray.errors import ConfigError, DeadlineExceeded, NotFound, Unavailable
from polar_ray.receipts import Receipt
from polar_ray.scoring import Scorer
from polar_ray.wire import triple_to_json
from tests.serve.caller import GIVE_UP_S, Endpoint
from tests.serve.conftest import free_port, groups
from tests.support.tls import Certificate, make_certificate

pytestmark = pytest.mark.ray

BIN = Path(sys.executable).parent
TORCH = {"kind": "torch", "device": "cpu", "dtype": "float32", "threads": 1}


def test_rewards_over_http_are_the_scorers_and_a_corpus_jobs(cluster, tmp_path):
    from ray import serve

    from polar_ray.serving.app import build

    triples = groups(3, 4)
    serve.run(build({"engine": TORCH, "replica_cpus": 0.1}), name="torch", route_prefix="/torch")
    endpoint = Endpoint("torch", f"http://127.0.0.1:{cluster}/torch")
    endpoint.wait_until_ready(30)
    body = {"triples": [triple_to_json(triple) for triple in triples]}
    reply = endpoint.read(httpx.post(f"{endpoint.url}/v1/rewards", json=body, timeout=60))
    described = httpx.get(f"{endpoint.url}/v1/models").json()["data"][0]
    serve.delete("torch")
    with Scorer.open(engine=EngineConfig(**TORCH)) as scorer:
        expected = [row.reward for row in scorer.score(triples)]
    assert [row.reward for row in reply.rewards] == pytest.approx(expected, abs=1e-5)
    assert len(set(expected)) > 4
    assert Receipt.model_validate(described["receipt"]).receipt_id == reply.receipt_id

    source = tmp_path / "in.parquet"
    pq.write_table(pa.Table.from_pylist(body["triples"]), source)
    score_parquet(source, tmp_path / "out", ScoreConfig(engine=TORCH, actors=1))
    table = pq.read_table(tmp_path / "out")
    assert table["reward"].to_pylist() == pytest.approx(expected, abs=1e-5)
    manifest = json.loads((tmp_path / "out" / "_polar_ray" / "manifest.json").read_text())
    assert Receipt.model_validate(manifest["receipt"]).receipt_id == reply.receipt_id


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"replica": "2"}, "unknown setting 'replica'"),
        ({"queue.bulk_shares": "0.5"}, r"unknown setting 'queue\.bulk_shares'"),
        ({"http.port": "8001"}, "http_options"),
        ({"http": {"port": 8001}}, "http_options"),
        ({"replicas": "3:1"}, "MIN <= MAX"),
        ({"engine.tensor_parallel_size": "2"}, "tensor_parallel_size = 2"),
        ({"engine.kind": "torch", "engine.tensor_parallel_size": "3"}, "tensor_parallel_size = 3: does not divide"),
        ({"engine.kind": "torch", "engine.dtype": "float16"}, "engine.dtype = 'float16'"),
    ],
)
def test_settings_are_refused_before_anything_is_deployed(args, said):
    from polar_ray.serving.app import build

    with pytest.raises(ConfigError, match=said):
        build({"engine.kind": "fake", "engine.device": "cpu", **args})


def commands(folder: Path, port: int, certificate: Certificate) -> dict[str, list[str]]:
    """Two ways to start the same endpoint by hand; Ray's own behind TLS, as the README says."""
    config = {
        "http_options": {"host": "127.0.0.1", "port": port, **certificate.server},
        "applications": [
            {
                "name": "by-hand",
                "route_prefix": "/",
                "import_path": "polar_ray.serving.app:build",
                "args": {"engine": {"kind": "fake", "device": "cpu"}, "replica_cpus": 0.1},
            }
        ],
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    flags = ["--engine", "fake", "--port", str(port), "--set", "replica_cpus=0.1"]
    return {
        "polar-ray serve": [str(BIN / "polar-ray"), "serve", *flags],
        "serve run": [str(BIN / "serve"), "run", str(folder / "config.yaml")],
    }


STARTED = {"polar-ray serve": "Ctrl-C stops it.", "serve run": ""}
"""What is said when all is up; of Ray's own command it is enough that it answers."""

SCHEMES = {"polar-ray serve": "http", "serve run": "https"}


@pytest.mark.parametrize(("command", "number"), [("polar-ray serve", signal.SIGTERM), ("serve run", signal.SIGINT)])
def test_a_server_started_by_hand_answers_and_stops_when_told(command, number, tmp_path, truth):
    port, certificate = free_port(), make_certificate(tmp_path)
    arguments = commands(tmp_path, port, certificate)[command]
    client = RewardClient(f"{SCHEMES[command]}://127.0.0.1:{port}", verify=certificate.ca)
    outside = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    if command == "serve run":
        outside["RAY_ADDRESS"] = "local"  # left to itself it joins whatever cluster runs on this machine
    with (tmp_path / "said").open("wb") as said:
        server = subprocess.Popen(
            arguments, stdout=said, stderr=said, env=outside, cwd=tmp_path, preexec_fn=hear_ctrl_c
        )
    try:
        Endpoint.wait_for(
            lambda: server.poll() is not None or (is_up(client) and STARTED[command] in read_said(tmp_path))
        )
        triples = groups(2, 2)
        assert client.rewards(triples) == truth(triples)
        family = psutil.Process(server.pid).children(recursive=True)
        server.send_signal(number)
        code = server.wait(GIVE_UP_S)
    finally:
        server.kill()
        server.wait()
    text = read_said(tmp_path)
    assert family
    Endpoint.wait_for(lambda: not any(is_alive(process) for process in family))
    assert not is_up(client)
    client.close()
    if command == "polar-ray serve":
        assert (code, "Traceback" in text) == (0, False), text


def hear_ctrl_c() -> None:
    """Tests that run in a shell's background were started deaf to it, and Ray's command inherits that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def read_said(folder: Path) -> str:
    return (folder / "said").read_text()


def is_up(client: RewardClient) -> bool:
    try:
        return bool(client.model(deadline_s=1).receipt_id)
    except (Unavailable, NotFound, DeadlineExceeded):
        time.sleep(0.2)
        return False


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
