"""The Slurm script: what it starts, with which token, and what becomes of a failure. Slurm and Ray are small shims."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "cluster" / "slurm" / "polar_ray.sbatch"

SRUN = """
while [[ $1 == --* ]]; do echo "srun $1"; shift; done
exec "$@"
"""
SCONTROL = 'for name in ${3//,/ }; do echo "$name" || exit; sleep 0.01; done\n'
RAY = """
echo "ray $*"
stat --format "token %a %s" "$RAY_AUTH_TOKEN_PATH"
while [[ $1 != -- ]]; do shift; done
shift
exec "$@"
"""
RAY_THAT_DOES_NOT_START = "exit 0\n"
POLAR_RAY = 'echo "polar-ray [$1] [$2] at $RAY_ADDRESS with $RAY_AUTH_MODE"\n'


@pytest.fixture
def submit(tmp_path):
    """`submit(*arguments, ray=..., polar_ray=...)`: the script on two nodes, with those programs; what came of it."""
    programs = tmp_path / "bin"
    programs.mkdir()

    def run(*arguments, ray=RAY, polar_ray=POLAR_RAY):
        for name, body in {"srun": SRUN, "scontrol": SCONTROL, "ray": ray, "polar-ray": polar_ray}.items():
            (programs / name).write_text(f"#!/bin/bash\n{body}")
            (programs / name).chmod(0o755)
        environment = {
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(tmp_path),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "node1,node2",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_PER_TASK": "64",
            "SLURM_GPUS_ON_NODE": "8",
        }
        return subprocess.run(["bash", SCRIPT, *arguments], env=environment, capture_output=True, text=True)

    return run


def test_shellcheck_has_no_complaint():
    done = subprocess.run([Path(sys.executable).parent / "shellcheck", SCRIPT], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_command_runs_on_a_cluster_of_all_nodes_with_a_token_of_its_own(submit, tmp_path):
    done = submit("score", "in put", "--output", "out")
    assert done.returncode == 0, done.stderr
    started = next(line for line in done.stdout.splitlines() if line.startswith("ray symmetric-run"))
    before, _, _ = started.partition(" -- ")
    assert before == "ray symmetric-run --address node1:6379 --min-nodes 2 --num-cpus=64 --num-gpus=8"
    assert {"srun --nodes=2", "srun --ntasks-per-node=1"} <= set(done.stdout.splitlines())
    assert "token 600 65" in done.stdout
    assert "polar-ray [score] [in put] at node1:6379 with token" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


@pytest.mark.parametrize(
    ("programs", "code"), [({"polar_ray": "exit 3\n"}, 3), ({"ray": RAY_THAT_DOES_NOT_START}, 1)], ids=str
)
def test_a_failure_is_the_jobs_failure(submit, tmp_path, programs, code):
    assert submit("score", "x", **programs).returncode == code
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


def test_a_command_must_be_named(submit):
    done = submit()
    assert done.returncode == 2
    assert "name a command of polar-ray" in done.stderr


def test_its_nodes_are_its_own_and_it_comes_back():
    options = {line.split()[1] for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")}
    assert {"--exclusive", "--requeue", "--ntasks-per-node=1"} <= options
