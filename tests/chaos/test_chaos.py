"""Faults in a seeded order, in the middle of real work: no row lost, none twice, none different.

Programs of their own, for each needs a cluster of several raylets, whose GCS keeps its state on disk.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PROJECT = Path(__file__).parents[2]
DEADLINE_S = 280

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "AWS_ACCESS_KEY_ID": "for-a-test-server",
    "AWS_SECRET_ACCESS_KEY": "for-a-test-server",
}


def result_of(module, *arguments, folder):
    answer = folder / "result.json"
    done = subprocess.run(
        [sys.executable, "-m", f"tests.chaos.{module}", *arguments, "--output", str(answer)],
        cwd=PROJECT, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=DEADLINE_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(answer.read_text())


@pytest.mark.s3
def test_a_job_survives_every_kind_of_fault_row_for_row(tmp_path):
    told = result_of("job", "--seed", "5", "--faults", "10", "--rows", "6000", folder=tmp_path)
    check_rows(told, 6000)
    assert set(told["faults"].values()) == {1}, "a fault found nothing that it could be done to"
    assert len(told["faults"]) == 10
    assert told["runs"] <= 3, "only a driver that was killed, or refused by its store, is started again"


def check_rows(told, rows):
    """All of them, as often, as right and in the order of an undisturbed run."""
    assert (told["rows_lost"], told["rows_duplicated"], told["rows_different"], told["order_kept"]) == (0, 0, 0, True)
    assert told["rows"] == rows


def test_a_full_disk_ends_a_run_and_costs_no_row(tmp_path):
    if subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True).returncode:
        pytest.skip("this process may not mount a small disk")
    told = result_of("job", "--storage", "disk", "--only", "full_disk", "--rows", "1500", folder=tmp_path)
    check_rows(told, 1500)
    assert told["faults"] == {"full_disk": 1}
    assert told["runs"] == 2
    assert "cannot be written" in told["errors"][0]


def test_an_endpoint_survives_every_kind_of_fault_and_answers_every_caller(tmp_path):
    told = result_of("endpoint", "--seed", "5", "--faults", "9", folder=tmp_path)
    assert told["rows_asked"] == told["rows_answered"] > 1000
    assert told["rows_wrong"] == 0
    assert set(told["calls_repeated"]) <= {"unavailable"}
    assert set(told["faults"].values()) == {1}


def test_a_cluster_without_workers_grows_for_a_job_and_for_an_endpoint_and_is_empty_again(tmp_path):
    told = result_of("growth", folder=tmp_path)
    assert told["workers_at_the_start"] == 0
    job, endpoint = told["job"], told["endpoint"]
    assert "no worker node yet" in job["auto_refused"]
    assert job["rows"] == job["ok"] > 0
    assert job["most_workers"] == 3
    assert endpoint["workers_with_all_replicas"] == 3
    assert endpoint["rows_answered"] > 0
    assert endpoint["calls_repeated"] == 0
