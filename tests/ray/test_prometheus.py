"""A real Prometheus, with the configuration that ships, on a real endpoint and a real job."""

import json
import math
import shutil
import subprocess
import time
from contextlib import contextmanager

import httpx
import pyarrow.parquet as pq
import pytest
import ray
import yaml

from polar_ray.config import ScoreConfig
from polar_ray.corpus.job import score_parquet
from polar_ray.encoding.encode import Encoder
from polar_ray.encoding.tokenizer import PolarTokenizer
from polar_ray.engines.fake import FakeEngine
from polar_ray.model.locate import EMBEDDED_FOLDER
from polar_ray.scoring import Scorer
from tests.observability.files import CONDITIONAL, FOLDER, SERIES, alerts, names_of, panels
from tests.ray.conftest import make_table
from tests.serve.conftest import free_port
from tests.support.endpoint import running_endpoint

pytestmark = [
    pytest.mark.ray,
    pytest.mark.usefixtures("cluster"),
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed"),
]

START_S = 30
SECONDS_PER_TOKEN = 6e-5


def slow_scorer(config):
    """The fake engine at a pace that leaves time for some scrapes."""
    encoder = Encoder(PolarTokenizer(EMBEDDED_FOLDER), config.limits)
    return Scorer(encoder, FakeEngine(token_budget=1024, seconds_per_token=SECONDS_PER_TOKEN))


@contextmanager
def running_prometheus(folder, endpoint):
    """Address of a Prometheus that scrapes `endpoint` and Ray, as `prometheus.yaml` has it, once a second."""
    config = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(FOLDER / "alerts.yaml")]
    by_name = {scraped["job_name"]: scraped for scraped in config["scrape_configs"]}
    by_name["polar-ray-endpoint"]["static_configs"] = [{"targets": [endpoint]}]
    agents = [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in ray.nodes() if node["Alive"]]
    found = folder / "found.json"  # as Ray's dashboard writes it
    found.write_text(json.dumps([{"labels": {"job": "ray"}, "targets": agents}]))
    by_name["polar-ray-jobs"]["file_sd_configs"] = [{"files": [str(found)]}]
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    command = ["prometheus", f"--config.file={folder / 'prometheus.yaml'}", f"--storage.tsdb.path={folder / 'data'}"]
    process = subprocess.Popen([*command, f"--web.listen-address={address}", "--log.level=error"])
    try:
        end = time.monotonic() + START_S
        while not is_ready(address):
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait(START_S)


def is_ready(address) -> bool:
    try:
        return httpx.get(f"http://{address}/-/ready").is_success
    except httpx.TransportError:
        return False


def ask(address, expression) -> list[tuple[dict, float]]:
    """(labels, value) of each series of an instant query."""
    reply = httpx.get(f"http://{address}/api/v1/query", params={"query": expression}, timeout=30).json()
    assert reply["status"] == "success", (expression, reply)
    return [(series["metric"], float(series["value"][1])) for series in reply["data"]["result"]]


def call(endpoint, outputs):
    body = {"prompt": "What is the capital of China?", "reference": "Beijing.", "outputs": outputs}
    httpx.post(f"http://{endpoint}/v1/rewards", json=body, timeout=60).raise_for_status()


def test_prometheus_sees_every_metric_and_every_panel_has_data(tmp_path):
    pq.write_table(make_table(500), tmp_path / "in.parquet")
    config = ScoreConfig.model_validate(
        {"engine": {"kind": "fake", "device": "cpu", "dtype": "float32"}, "unit_rows": 100, "actors": 1}
    )
    with running_endpoint() as endpoint, running_prometheus(tmp_path, endpoint) as prometheus:
        call(endpoint, [f"{n} times {n}" for n in range(1200)])
        httpx.post(f"http://{endpoint}/v1/rewards", content=b"{")
        call(endpoint, ["", "Beijing."])
        summary = score_parquet(tmp_path / "in.parquet", tmp_path / "out", config, build_scorer=slow_scorer)
        call(endpoint, [f"{n} times {n}" for n in range(600)])
        httpx.post(f"http://{endpoint}/v1/rewards", content=b"{")
        call(endpoint, ["", "Beijing."])
        time.sleep(3)

        names = httpx.get(f"http://{prometheus}/api/v1/label/__name__/values").json()["data"]
        seen = {name for name in names if name.startswith("polar_ray_") and not name.endswith("_created")}
        assert seen == set(SERIES) - CONDITIONAL
        assert not [name for name in names if name.startswith("ray_polar_ray_")]
        assert ask(prometheus, "sum (polar_ray_rows_total{job_id!=''})")[0][1] == summary.rows
        assert ask(prometheus, "sum (polar_ray_rows_total{replica!=''})")[0][1] == 1804
        ((labels, _),) = ask(prometheus, "polar_ray_units_left")
        assert labels.keys() == {"__name__", "instance", "job", "job_id"}

        for panel in panels():
            for target in panel["targets"]:
                asked = (
                    target["expr"].replace("$__rate_interval", "1m").replace("$endpoint", ".+").replace("$job", ".+")
                )
                values = [value for _, value in ask(prometheus, asked)]
                if not names_of([asked]) & CONDITIONAL:
                    assert any(math.isfinite(value) for value in values), (panel["title"], asked, values)
        for rule in alerts():
            ask(prometheus, rule["expr"])
        firing = {labels["alertname"] for labels, _ in ask(prometheus, 'ALERTS{alertstate="firing"}')}
        assert not firing
