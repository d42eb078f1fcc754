"""SIGKILL at any moment, run the same command again: the result is that of an undisturbed run, row for row."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from tests.ray.conftest import make_table, read_scored

pytestmark = pytest.mark.ray

PROJECT = Path(__file__).parents[2]
SECONDS_PER_BATCH = 0.3
DEADLINE_S = 120


def start_job(source: Path, target: Path, seconds: float) -> subprocess.Popen:
    """The job as its own driver, with its own cluster, in a process group of its own."""
    command = [sys.executable, "-m", "tests.support.slow_job", str(source), str(target), str(seconds)]
    return subprocess.Popen(
        command, cwd=PROJECT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def finish(job: subprocess.Popen) -> None:
    _, complaints = job.communicate(timeout=DEADLINE_S)
    assert job.returncode == 0, complaints.decode()[-2000:]


def wait_for_parts(target: Path, count: int) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while len(list(target.glob("part-*.parquet"))) < count:
        assert time.monotonic() < deadline, f"the job wrote fewer than {count} files"
        time.sleep(0.05)


def scoring_processes(job: subprocess.Popen) -> list[psutil.Process]:
    children = psutil.Process(job.pid).children(recursive=True)
    return [child for child in children if "ScoringActor" in " ".join(child.cmdline())]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Twelve units of eight rows, and what an undisturbed run makes of them."""
    folder = tmp_path_factory.mktemp("corpus")
    source = folder / "in.parquet"
    pq.write_table(make_table(24), source, row_group_size=8)
    finish(start_job(source, folder / "undisturbed", 0))
    return source, read_scored(folder / "undisturbed")


def test_a_killed_driver_is_resumed(corpus, tmp_path):
    source, expected = corpus
    target = tmp_path / "out"
    job = start_job(source, target, SECONDS_PER_BATCH)
    wait_for_parts(target, 4)
    os.kill(job.pid, signal.SIGKILL)
    job.communicate()
    kept = {file: file.stat().st_mtime_ns for file in target.glob("part-*.parquet")}
    assert 4 <= len(kept) < 12
    finish(start_job(source, target, 0))
    assert all(file.stat().st_mtime_ns == when for file, when in kept.items())
    assert len(list(target.glob("part-*.parquet"))) == 12
    assert read_scored(target).equals(expected)


def test_a_killed_worker_is_replaced_within_the_run(corpus, tmp_path):
    source, expected = corpus
    target = tmp_path / "out"
    job = start_job(source, target, SECONDS_PER_BATCH)
    wait_for_parts(target, 2)
    victims = scoring_processes(job)
    assert victims, "no scoring process was found"
    victims[0].kill()
    finish(job)
    assert read_scored(target).equals(expected)


@pytest.mark.slow
def test_a_process_that_hangs_holds_up_nobody(corpus, tmp_path):
    """Not dead, so that nothing is started anew: the other actor does its units, and the job ends without it."""
    source, expected = corpus
    target = tmp_path / "out"
    job = start_job(source, target, SECONDS_PER_BATCH)
    wait_for_parts(target, 2)
    hanging = scoring_processes(job)[0]
    hanging.suspend()
    finish(job)
    assert read_scored(target).equals(expected)
    assert not hanging.is_running()


@pytest.mark.slow
def test_the_summary_for_machines_stays_one_json_object_when_a_worker_dies(corpus, tmp_path):
    source, _ = corpus
    target = tmp_path / "out"
    command = [sys.executable, "-m", "polar_ray", "score", str(source), "-o", str(target), "--set", "unit_rows=1"]
    job = subprocess.Popen([*command, "--json"], cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for_parts(target, 2)
    for victim in scoring_processes(job):
        victim.kill()
    printed, complaints = job.communicate(timeout=DEADLINE_S)
    assert job.returncode == 0, complaints.decode()[-2000:]
    assert json.loads(printed)["ok"] == 96


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_an_interrupted_job_stops_cleanly_and_says_how_to_resume(corpus, tmp_path, number):
    source, expected = corpus
    target = tmp_path / "out"
    command = [sys.executable, "-m", "polar_ray", "score", str(source), "-o", str(target), "--set", "unit_rows=1"]
    job = subprocess.Popen(
        command, cwd=PROJECT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    wait_for_parts(target, 1)
    children = psutil.Process(job.pid).children(recursive=True)
    os.kill(job.pid, number)
    _, complaints = job.communicate(timeout=DEADLINE_S)
    assert job.returncode == 130
    assert "Run the same command again to go on" in complaints
    assert "Traceback" not in complaints
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    finished = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=DEADLINE_S, check=True)
    assert "96 rewarded" in finished.stdout
    assert read_scored(target)["row"].equals(expected["row"])
