"""A job on a cluster of several nodes, submitted from outside; and one of them is lost."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.ray.conftest import make_table, read_scored

pytestmark = pytest.mark.ray

PROJECT = Path(__file__).parents[2]
DEADLINE_S = 180


@pytest.fixture
def nodes():
    """A head without CPUs and two workers, each a raylet of its own."""
    from ray.cluster_utils import Cluster

    quick_to_notice = {
        "health_check_initial_delay_ms": 0,
        "health_check_period_ms": 500,
        "health_check_failure_threshold": 3,
    }
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": quick_to_notice},
    )
    workers = [cluster.add_node(num_cpus=1, object_store_memory=80 << 20) for _ in range(2)]
    yield cluster, workers
    cluster.shutdown()


def test_a_submitted_job_survives_the_loss_of_a_node(nodes, tmp_path):
    cluster, workers = nodes
    source, target = tmp_path / "in.parquet", tmp_path / "out"
    pq.write_table(make_table(24), source, row_group_size=8)
    environment = {**os.environ, "RAY_ADDRESS": cluster.address}
    job = subprocess.Popen(
        [sys.executable, "-m", "tests.support.slow_job", str(source), str(target), "0.5"],
        cwd=PROJECT, env=environment, stderr=subprocess.PIPE,
    )  # fmt: skip
    deadline = time.monotonic() + DEADLINE_S
    while len(list(target.glob("part-*.parquet"))) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    cluster.remove_node(workers[0], allow_graceful=False)
    _, complaints = job.communicate(timeout=DEADLINE_S)
    assert job.returncode == 0, complaints.decode()[-2000:]
    assert read_scored(target)["row"].to_pylist() == list(range(96))
    assert read_scored(target)["reward"].null_count == 0


def test_the_entry_point_for_submission_is_the_command_line(tmp_path):
    source = tmp_path / "in.parquet"
    pq.write_table(make_table(2), source)
    done = subprocess.run(
        [sys.executable, "jobs/score_corpus.py", str(source), "--output", str(tmp_path / "out"), "--engine", "fake"],
        cwd=PROJECT, capture_output=True, text=True, timeout=DEADLINE_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "8 rewarded" in done.stdout
