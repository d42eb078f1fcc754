"""The benchmark runs from the command line and writes what a results file must hold."""

import json

import pytest
from typer.testing import CliRunner

from polar_ray.bench.workload import SHAPES, random_groups, write_random_checkpoint
from polar_ray.cli.bench import app
from polar_ray.model.checkpoint import Checkpoint
from polar_ray.planning import plan


def test_all_methods_are_measured_and_agree(tmp_path):
    file = tmp_path / "results" / "engine.json"
    arguments = ["engine", "--shape", "tiny", "--dtype", "float32", "--groups", "1", "--rounds", "2", "-o", str(file)]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    content = json.loads(file.read_text())
    assert content["command"].startswith("polar-ray bench engine --shape tiny --dtype float32 --groups 1")
    assert content["versions"]["torch"]
    assert content["hardware"]["cpus"] >= 1
    (result,) = content["results"]
    assert [row["method"] for row in result["methods"]] == ["readme", "sorted", "unshared", "shared", "deterministic"]
    for row in result["methods"]:
        assert len(row["cpu_s"]) == len(row["wall_s"]) == 2
        assert row["max_error"] < 1e-3
        assert row["method"] in done.output
    shared = result["methods"][-1]
    assert shared["computed_tokens"] < shared["tokens"] * 0.6
    assert str(tmp_path) not in file.read_text()


def test_groups_have_the_lengths_of_encoded_gsm8k_triples():
    sequences = random_groups(16, 4, 8192)
    assert all(491 <= len(ids) <= 735 for ids in sequences)
    shared = plan(sequences, token_budget=4096).computed_tokens / sum(map(len, sequences))
    assert shared == pytest.approx(0.5, abs=0.05)
    assert all((a == b).all() for a, b in zip(sequences, random_groups(16, 4, 8192), strict=True))


def test_a_random_checkpoint_opens(tmp_path):
    write_random_checkpoint(tmp_path, SHAPES["tiny"])
    assert Checkpoint.open(tmp_path).config.vocab_size == 8192
