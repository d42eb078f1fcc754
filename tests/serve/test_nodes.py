"""A node of the cluster is lost while callers ask."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray

PROJECT = Path(__file__).parents[2]
DEADLINE_S = 150


@pytest.mark.slow
def test_a_raylet_killed_under_load_costs_no_row(tmp_path):
    answer = tmp_path / "told.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.serve.lose_a_node", str(answer)],
        cwd=PROJECT, capture_output=True, text=True, timeout=DEADLINE_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(answer.read_text())
    assert told["nodes"] == 2, "each replica was to have a node of its own"
    assert told["rows"] > 100
    assert set(told["errors"]) <= {"unavailable"}
