"""The comparison of engines: what it counts, that one runs at a time, and a small run from the command line."""

import json
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from polar_ray.bench.engines import bench_engines
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


def test_each_engine_is_measured_shared_and_unshared(tmp_path):
    file = tmp_path / "engines.json"
    command = "engines --engine torch --shape tiny --workload gsm8k --groups 1 --group-size 3 --rounds 2"
    arguments = [*command.split(), "--set", "engine.threads=1", "-o", str(file)]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    content = json.loads(file.read_text())
    assert content["command"].startswith(
        "polar-ray bench engines --engine torch --shape tiny --workload gsm8k --groups 1 --group-size 3"
    )
    shared, unshared = content["results"]
    assert (shared["share_prefixes"], unshared["share_prefixes"]) == (True, False)
    assert shared["planned_tokens"] < unshared["planned_tokens"] == unshared["tokens"]
    for row in content["results"]:
        assert len(row["cpu_s"]) == len(row["wall_s"]) == 2
        assert min(row["cpu_s"]) > 0
        assert row["max_error"] < 1e-3
        assert row["memory_bytes"] > 10 << 20
        assert row["version"].startswith("polar_ray ")
    assert "unshared" in done.output
    assert str(tmp_path) not in file.read_text()


def test_an_engine_that_does_not_start_says_why():
    missing = EngineConfig(kind="vllm", python=sys.executable, device="cpu")
    with pytest.raises(EngineStartError, match="has no vllm"):
        bench_engines(EMBEDDED_FOLDER, [missing], random_groups(WORKLOADS["gsm8k"], 1, 1000, group_size=2), rounds=1)


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
        bench_engines(
            EMBEDDED_FOLDER,
            [EngineConfig(**engine)],
            random_groups(WORKLOADS["gsm8k"], 1, 1000, group_size=2),
            rounds=1,
        )
