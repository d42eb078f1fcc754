"""The proof that the rewards teach, run as a reader would run it."""

import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "jobs" / "grpo_demo.py"
STEPS = 60


@pytest.mark.timeout(300)
def test_a_policy_learns_from_the_endpoints_rewards(address, tmp_path):
    command = [sys.executable, SCRIPT, "--address", address, "--output", tmp_path, "--steps", str(STEPS)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads((tmp_path / "grpo.json").read_text())
    rewards, right = found["rewards"], found["right"]
    assert len(rewards) == len(right) == STEPS
    assert fmean(rewards[-5:]) > fmean(rewards[:5])
    assert fmean(right[-5:]) > fmean(right[:5]) + 0.2, "rewards alone told the policy which answers are right"
    assert (tmp_path / "grpo.png").read_bytes().startswith(b"\x89PNG")
    assert f"{STEPS} steps" in run.stdout
