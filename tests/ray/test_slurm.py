"""The Slurm script with Ray's real symmetric-run, on two nodes: network namespaces with a cable between them."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.ray.conftest import make_table

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
]

PROJECT = Path(__file__).parents[2]
SCRIPT = "cluster/slurm/polar_ray.sbatch"

ALONE = ["unshare", "--net", "--pid", "--fork", "--mount", "--mount-proc"]
"""symmetric-run ends with `ray stop`: in namespaces of its own it meets no other Ray."""

NODES = """
mkdir -p /run/netns && mount -t tmpfs tmpfs /run/netns
ip netns add a && ip netns add b
ip link add cable_a type veth peer name cable_b
for node in a b; do ip link set "cable_$node" netns "$node" && ip -n "$node" link set lo up; done
ip -n a addr add 10.9.0.1/24 dev cable_a && ip -n b addr add 10.9.0.2/24 dev cable_b
for node in a b; do ip -n "$node" link set "cable_$node" up; done
ip -n a route add default via 10.9.0.2 && ip -n b route add default via 10.9.0.1
exec bash "$@"
"""
"""Two of them, and what follows on the outside."""

SRUN = """
while [[ $1 == --* ]]; do shift; done
on() {
    node=$1; shift
    ip netns exec "$node" unshare --pid --fork --mount --mount-proc \\
        bash -c 'mount -t tmpfs tmpfs "$RAY_TMPDIR" && exec "$@"' bash "$@"
}
on b "$@" & on a "$@"; code=$?; wait; exit $code
"""
SCONTROL = "echo 10.9.0.1; echo 10.9.0.2\n"


@pytest.fixture
def short_folder():
    """Ray's sockets are in it, whose paths may have 107 characters."""
    with tempfile.TemporaryDirectory() as folder:
        yield folder


def test_a_corpus_is_scored_by_an_allocation(tmp_path, short_folder):
    if subprocess.run([*ALONE, "ip", "netns", "list"], capture_output=True).returncode != 0:
        pytest.skip("this machine allows no namespaces of one's own, or has no `ip`")
    programs, corpus = tmp_path / "bin", tmp_path / "corpus"
    programs.mkdir()
    corpus.mkdir()
    for name, body in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}")
        (programs / name).chmod(0o755)
    for n in range(4):
        pq.write_table(make_table(50, first=1000 * n), corpus / f"{n}.parquet")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PATH": os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(PROJECT),
        "HOME": str(tmp_path),
        "RAY_TMPDIR": short_folder,
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "a,b",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_GPUS_ON_NODE": "0",
    }
    settings = ["engine.kind=fake", "engine.threads=1", "actors=2", "unit_rows=50"]
    arguments = [corpus, "--output", tmp_path / "scored", *(word for one in settings for word in ("--set", one))]
    done = subprocess.run(
        [*ALONE, "bash", "-euc", NODES, "bash", SCRIPT, "score", *map(str, arguments)],
        cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "On worker node. Connecting to Ray cluster at 10.9.0.1:6379" in done.stdout
    assert pq.read_table(tmp_path / "scored")["reward_status"].to_pylist() == ["ok"] * 800
    assert not list(tmp_path.glob(".polar_ray-*"))
