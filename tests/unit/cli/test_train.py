"""`polar-ray train`: what it refuses, before a cluster is started."""

import json

import pytest

from polar_ray.cli.main import main
from tests.support.checkpoints import write_checkpoint

PAIR = {"prompt": "Which city?", "reference": "Beijing.", "chosen": "Beijing!", "rejected": "Shanghai."}


@pytest.fixture
def run(capsys, tmp_path):
    """`polar-ray train` on one pair, with more arguments; its exit code and what it says."""
    (tmp_path / "pairs.jsonl").write_text(json.dumps(PAIR) + "\n")

    def call(*arguments):
        with pytest.raises(SystemExit) as done:
            main(["train", str(tmp_path / "pairs.jsonl"), *map(str, arguments)])
        said = capsys.readouterr()
        return done.value.code, said.err

    return call


def test_columns_that_are_not_there_are_named(run, tmp_path):
    code, err = run("--output", tmp_path / "out", "--chosen-column", "better")
    assert code == 2
    assert "no column 'better' for the chosen" in err
    assert "--chosen-column" in err
    assert not (tmp_path / "out").exists()


def test_a_setting_that_is_none_is_named(run, tmp_path):
    code, err = run("--output", tmp_path / "out", "--set", "optimizer.lr=1")
    assert code == 2
    assert "unknown setting 'optimizer.lr'; known here: kind, learning_rate" in err


def test_a_folder_with_another_checkpoint_is_left_alone(run, tmp_path):
    folder = write_checkpoint(tmp_path / "theirs")
    before = (folder / "config.json").read_bytes()
    code, err = run("--output", folder)
    assert code == 2
    assert "holds a checkpoint that no run of ours left there" in err
    assert (folder / "config.json").read_bytes() == before
    assert not (folder / "_polar_ray").exists()


def test_lengths_beyond_the_rotary_base_are_refused(run, tmp_path):
    code, err = run("--output", tmp_path / "out", "--set", "limits.max_tokens=40000")
    assert code == 2
    assert "limits.max_tokens = 40000: near and beyond 32768" in err


def test_a_model_that_is_nowhere_is_named(run, tmp_path):
    code, err = run("--output", tmp_path / "out", "--model", tmp_path / "nowhere")
    assert code == 2
    assert "nowhere: no such folder" in err
