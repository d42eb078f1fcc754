"""The Slurm script with Ray's real symmetric-run: one node, and a shim for Slurm."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
]

PROJECT = Path(__file__).parents[2]
SCRIPT = "cluster/slurm/polar_ray.sbatch"
SRUN = 'while [[ $1 == --* ]]; do shift; done\nexec "$@"\n'
SCONTROL = 'echo "$3"\n'

ALONE = ["unshare", "--net", "--pid", "--fork", "--mount-proc"]
"""symmetric-run starts on fixed ports and ends with `ray stop`: in namespaces of its own it meets no other Ray."""


@pytest.fixture
def short_folder():
    """Ray's sockets are in it, whose paths may have 107 characters."""
    with tempfile.TemporaryDirectory() as folder:
        yield folder


def test_a_corpus_is_scored_by_an_allocation(tmp_path, short_folder):
    if subprocess.run([*ALONE, "true"], capture_output=True).returncode != 0:
        pytest.skip("this machine allows no namespaces of one's own")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, body in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}")
        (programs / name).chmod(0o755)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PATH": os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(PROJECT),
        "HOME": str(tmp_path),
        "RAY_TMPDIR": short_folder,
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "127.0.0.1",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_CPUS_PER_TASK": "2",
        "SLURM_GPUS_ON_NODE": "0",
    }
    arguments = ["jobs/demo/triples.parquet", "--output", str(tmp_path / "scored"), "--set", "engine.kind=fake"]
    done = subprocess.run(
        [*ALONE, "bash", "-c", 'ip link set lo up && exec bash "$@"', "bash", SCRIPT, "score", *arguments],
        cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "Ray's head is 127.0.0.1:6379" in done.stdout
    assert pq.read_table(tmp_path / "scored")["reward_status"].to_pylist() == ["ok"] * 43
    assert not list(tmp_path.glob(".polar_ray-*"))
