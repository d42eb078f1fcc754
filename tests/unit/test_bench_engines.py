"""The comparison of engines: what it counts, that one runs at a time, and a small run from the command line."""

import json
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from polar_ray.bench.engines import bench_engines, contestants
from polar_ray.bench.processes import ProcessTree
from polar_ray.bench.workload import WORKLOADS, random_groups
from polar_ray.cli.bench import app
from polar_ray.config import EngineConfig
from polar_ray.errors import ConfigError, EngineStartError
from polar_ray.model.locate import EMBEDDED_FOLDER

BUSY = "import time\nwhile True: pass"
PARENT = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {BUSY!r}]); time.sleep(60)"


@pytest.fixture
def tree():
    """A process that sleeps, whose child never rests."""
    process = subprocess.Popen([sys.executable, "-c", PARENT])
    tree = ProcessTree(process.pid)
    yield tree
    tree.resume()
    tree.kill()
    process.wait()


def spent_in(tree, seconds):
    before = tree.cpu_s()
    time.sleep(seconds)
    return tree.cpu_s() - before


def wait_until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_descendants_count_and_stand_still_while_paused(tree):
    wait_until(lambda: spent_in(tree, 0.1) > 0)
    assert tree.memory() > 1 << 20
    tree.pause()
    assert spent_in(tree, 0.3) == 0
    tree.resume()
    wait_until(lambda: spent_in(tree, 0.1) > 0)


def test_an_ended_process_has_nothing():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    tree = ProcessTree(process.pid)
    assert tree.cpu_s() == tree.memory() == 0
    tree.pause()
    tree.kill()


SETTINGS = ["--set", "engine.threads=1", "--set", "engine.device=cpu"]


def test_every_method_is_measured_on_every_workload(tmp_path):
    file = tmp_path / "engines.json"
    methods = ["readme", "torch", "torch-int8"]
    command = "--shape tiny --workload gsm8k --workload references --tokens 2500 --rounds 2"
    arguments = [*(f"--engine={name}" for name in methods), *command.split(), "--profile", *SETTINGS, "-o", str(file)]
    done = CliRunner().invoke(app, ["engines", *arguments], catch_exceptions=False)
    assert done.exit_code == 0
    content = json.loads(file.read_text())
    assert content["command"].startswith(
        f"polar-ray bench engines --engine {' --engine '.join(methods)} {command} --seed 0 --profile --set"
    )
    assert content["versions"]["torch"]
    assert content["hardware"]["cpus"] >= 1
    assert str(tmp_path) not in file.read_text()
    assert set(content["product_rates"]) == {"float32", "int8"}
    assert min(content["product_rates"].values()) > 1e8

    ways = ["readme", "torch", "torch", "torch-int8"]
    assert [row["method"] for row in content["results"]] == ways * 2
    assert {row["workload"]: row["tokens"] for row in content["results"]} == {
        name: work["tokens"] for name, work in content["workloads"].items()
    }
    for row in content["results"]:
        assert len(row["cpu_s"]) == len(row["wall_s"]) == len(row["plan_cpu_s"]) == 2
        assert min(row["cpu_s"]) > 0
        assert row["max_error"] < (0.5 if row["arithmetic"] == "int8" else 1e-3)
        assert row["memory_bytes"] > 10 << 20
        assert row["start_s"] > 0
        assert row["speedup_over_readme"] > 0
        assert row["fraction_of_product_rate"] > 0
        assert 0 < sum(operator["share"] for operator in row["profile"]) <= 1.001
        assert row["method"] in done.output
    for workload in content["workloads"]:
        padded, shared, unshared, _ = (row for row in content["results"] if row["workload"] == workload)
        assert (shared["share_prefixes"], unshared["share_prefixes"]) == (True, False)
        assert shared["computed_tokens"] < unshared["computed_tokens"] == unshared["tokens"] < padded["computed_tokens"]
        assert shared["flops"] < unshared["flops"] < padded["flops"]


def bench(**engine):
    sequences = random_groups(WORKLOADS["gsm8k"], 1, 1000, group_size=2)
    return bench_engines(EMBEDDED_FOLDER, {"torch": EngineConfig(**engine)}, {"gsm8k": sequences}, rounds=1)


def test_an_engine_that_does_not_start_says_why():
    with pytest.raises(EngineStartError, match="has no vllm"):
        bench(kind="vllm", python=sys.executable, device="cpu")


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"kind": "vllm", "address": "127.0.0.1:1"}, "what is measured is started here"),
        ({"kind": "serve"}, "what is measured is started here"),
        ({"kind": "fake"}, "computes no rewards"),
    ],
)
def test_what_is_not_started_here_is_refused(engine, message):
    with pytest.raises(ConfigError, match=message):
        bench(**engine)


def test_padded_batches_are_left_to_another_benchmark_on_gpus():
    with pytest.raises(ConfigError, match=r"--engine readme: .*jobs/bench/gpu\.py"):
        contestants({"readme": EngineConfig(device="cuda")}, EMBEDDED_FOLDER, 1024)


def test_a_method_that_is_none_is_refused_by_its_name():
    done = CliRunner().invoke(app, ["engines", "--engine", "torch-int4"])
    assert isinstance(done.exception, ConfigError)
    assert "torch-int4" in str(done.exception)
