"""Training on a real Ray cluster: a checkpoint that scores, and the same trajectory whatever dies on the way."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from polar_ray.config import EngineConfig, TrainConfig
from polar_ray.errors import ConfigError, ManifestConflict, OutputError, TooManyFailures, TrainingError
from polar_ray.model.locate import EMBEDDED_FOLDER
from polar_ray.scoring import Scorer
from polar_ray.training import claim
from polar_ray.training.job import train
from polar_ray.training.progress import SilentTrainProgress
from polar_ray.triples import Triple
from tests.support.checkpoints import write_checkpoint

pytestmark = pytest.mark.ray

PROJECT = Path(__file__).parents[2]
DEADLINE_S = 200

SETTINGS = {
    "precision": "float32",
    "max_packed_tokens": 128,
    "packs_per_step": 2,
    "checkpoint_every_steps": 3,
    "shuffle": "groups",
    "threads": 1,
    "optimizer": {"learning_rate": 1e-3},
}


def make_pairs(n: int) -> list[dict[str, str]]:
    return [
        {
            "prompt": f"How many pears are {k} and {k + 1}?",
            "reference": f"{2 * k + 1} pears.",
            "chosen": f"There are {2 * k + 1}.",
            "rejected": f"There are {2 * k + 1 + extra}.",
        }
        for k in range(n)
        for extra in (1, 3)
    ]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_checkpoint(
        tmp_path_factory.mktemp("base") / "checkpoint", tokenizer=EMBEDDED_FOLDER, vocab_size=4096, reward_token_id=133
    )


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """JSON Lines as upstream has them, with three lines of no use among them, and Parquet."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = make_pairs(40)
    lines = [json.dumps(row) for row in rows[:40]]
    conversation = {name: [{"role": "user", "content": text}] for name, text in rows[40].items()}
    lines += [json.dumps(conversation), "{", json.dumps({**rows[0], "rejected": rows[0]["chosen"]})]
    lines.append(json.dumps({**rows[0], "reference": ""}))
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
    pq.write_table(pa.Table.from_pylist(rows[41:]), folder / "b.parquet", row_group_size=10)
    return folder


def steps_of(output: Path) -> list[tuple[int, float, float]]:
    steps = json.loads((output / "metrics.json").read_text())["steps"]
    return [(step["step"], step["loss"], step["gradient_norm"]) for step in steps]


def assert_same_trajectory(found, expected):
    assert [step for step, _, _ in found] == [step for step, _, _ in expected]
    for (_, loss, norm), (_, expected_loss, expected_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-3)
        assert norm == pytest.approx(expected_norm, rel=1e-2)


@pytest.fixture(scope="module")
def trained(cluster, base, pairs, tmp_path_factory):
    """A run on one worker that nothing disturbed."""
    output = tmp_path_factory.mktemp("trained") / "out"
    return output, train(pairs, output, TrainConfig(model=str(base), **SETTINGS))


def test_a_run_reports_what_it_did(trained):
    output, summary = trained
    assert summary.pairs == 80
    assert summary.skipped == {"row_unreadable": 1, "triple_empty": 1, "triple_invalid": 1}
    skipped = [json.loads(line) for line in (output / "_polar_ray" / "skipped.jsonl").read_text().splitlines()]
    assert [(Path(row["file"]).name, row["row"]) for row in skipped] == [
        ("a.jsonl", 41),
        ("a.jsonl", 42),
        ("a.jsonl", 43),
    ]
    assert "same to the model" in skipped[1]["detail"]
    assert summary.computed_tokens < 0.7 * summary.tokens
    assert summary.steps == len(steps_of(output)) > 3
    assert summary.starts == 1
    board = EventAccumulator(str(output / "_polar_ray" / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [
        (step, pytest.approx(loss)) for step, loss, _ in steps_of(output)
    ]


def test_the_result_is_a_checkpoint_with_a_receipt(trained, base):
    output, summary = trained
    receipt = json.loads((output / "receipt.json").read_text())
    assert receipt["weights_digest"] == summary.weights_digest != receipt["base_weights_digest"]
    assert receipt["config"]["optimizer"]["learning_rate"] == 1e-3
    triples = [
        Triple(pair["prompt"], pair["reference"], pair[name])
        for pair in make_pairs(40)
        for name in ("chosen", "rejected")
    ]
    accuracies = []
    for folder in (base, output):
        with Scorer.open(str(folder), engine=EngineConfig(device="cpu")) as scorer:
            rewards = [row.reward for row in scorer.score(triples)]
        accuracies.append(sum(c > r for c, r in zip(rewards[::2], rewards[1::2], strict=True)) / 80)
    assert accuracies[1] > max(0.7, accuracies[0] + 0.1)
    config = json.loads((output / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"


def test_a_second_start_does_nothing_and_other_settings_are_refused(trained, base, pairs):
    output, summary = trained
    before = (output / "model.safetensors").stat().st_mtime_ns
    config = TrainConfig(model=str(base), **SETTINGS)
    assert train(pairs, output, config) == summary
    assert (output / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ManifestConflict, match=r"config\.optimizer\.learning_rate: was 0\.001, is 0\.01"):
        train(pairs, output, TrainConfig(model=str(base), **{**SETTINGS, "optimizer": {"learning_rate": 0.01}}))
    for fresh in (False, True):
        with pytest.raises(OutputError, match="is the model to start from"):
            train(pairs, base, config, fresh=fresh)
    assert (base / "model.safetensors").exists()


def test_more_workers_than_fit_are_refused(cluster, base, pairs, tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match=r"workers = 16: this machine has \d+ places of 1 CPUs"):
        train(pairs, tmp_path / "out", TrainConfig(model=str(base), workers=16, **{**SETTINGS, "packs_per_step": 16}))


def test_too_many_bad_pairs_stop_a_run_before_it_starts(cluster, base, tmp_path):
    (tmp_path / "bad.jsonl").write_text("\n".join([json.dumps(make_pairs(1)[0]), "{", "{"]) + "\n")
    with pytest.raises(TooManyFailures, match=r"2 of 3 pairs.*row_unreadable.*skipped\.jsonl"):
        train(tmp_path / "bad.jsonl", tmp_path / "out", TrainConfig(model=str(base), **SETTINGS))


def test_weights_that_run_away_end_the_run_at_once(cluster, base, pairs, tmp_path):
    settings = {**SETTINGS, "optimizer": {"learning_rate": 1e30}}
    with pytest.raises(TrainingError, match=r"gradient's norm.*learning_rate"):
        train(pairs, tmp_path / "out", TrainConfig(model=str(base), **settings))
    assert_all_is_free()


class OnFirstStep(SilentTrainProgress):
    """Calls something, once, in the middle of a run."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call

    @contextmanager
    def training(self):
        def show(reports):
            if reports and (call := self._call):
                self._call = None
                call()

        yield show


def training_workers(driver: int) -> list[psutil.Process]:
    """Below a process that started its own cluster."""
    found = []
    for process in psutil.Process(driver).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it ended just now
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def refused_a_second_run(pairs: Path, output: Path, config: TrainConfig) -> Callable[[], None]:
    def start_again() -> None:
        with pytest.raises(OutputError, match="another run is training into it"):
            train(pairs, output, config)

    return start_again


def assert_all_is_free():
    """No CPU is taken, nor waited for, by a run that has ended."""
    import ray

    deadline = time.monotonic() + 20
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
        assert time.monotonic() < deadline, ray.available_resources()
        time.sleep(0.1)
    states = {group["state"] for group in ray.util.placement_group_table().values()}
    assert states <= {"REMOVED"}


@pytest.mark.slow
def test_an_interrupted_run_is_alone_leaves_nothing_and_goes_on(trained, cluster, base, pairs, tmp_path):
    """On two workers that divide the weights among them, whose trajectory is that of one."""
    config = TrainConfig(model=str(base), workers=2, parallel="fsdp", **SETTINGS)
    start_again = refused_a_second_run(pairs, tmp_path / "out", config)

    def interrupt() -> None:
        start_again()
        assert training_workers(os.getpid())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(pairs, tmp_path / "out", config, progress=OnFirstStep(interrupt))
    deadline = time.monotonic() + DEADLINE_S
    while training_workers(os.getpid()):
        assert time.monotonic() < deadline, "a worker is still there"
        time.sleep(0.1)
    assert_all_is_free()
    train(pairs, tmp_path / "out", config)
    assert_same_trajectory(steps_of(tmp_path / "out"), steps_of(trained[0]))


@pytest.mark.slow
def test_a_run_starts_over_when_asked_and_takes_only_what_was_its_own(
    trained, cluster, base, pairs, tmp_path, monkeypatch
):
    monkeypatch.setattr(claim, "_lock", lambda output, held: None)  # as for an output in an object store
    before, first = trained
    output = tmp_path / "out"
    shutil.copytree(before, output)
    (output / "notes.txt").write_text("kept")
    config = TrainConfig(model=str(base), **SETTINGS, max_steps=3, seed=1)
    start_again = refused_a_second_run(pairs, output, config)
    second = train(pairs, output, config, fresh=True, progress=OnFirstStep(start_again))
    assert second.steps == 3 == len(steps_of(output))
    assert first.weights_digest != second.weights_digest
    assert (output / "notes.txt").read_text() == "kept"


def start(base: Path, pairs: Path, output: Path, *, workers: int = 1) -> subprocess.Popen:
    """The run as its own driver, with its own cluster."""
    (output.parent / "settings.toml").write_text(
        "".join(f"{name} = {json.dumps(value)}\n" for name, value in SETTINGS.items() if name != "optimizer")
        + f"max_failures = 3\nworkers = {workers}\n[optimizer]\nlearning_rate = 1e-3\n"
    )
    command = [sys.executable, "-m", "polar_ray", "train", str(pairs), "-o", str(output), "--model", str(base)]
    return subprocess.Popen(
        [*command, "--config", str(output.parent / "settings.toml"), "--json"],
        cwd=PROJECT,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def wait_for_a_checkpoint(run: subprocess.Popen, output: Path) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not list(output.glob("_polar_ray/checkpoints/run/checkpoint_*/steps.jsonl")):
        assert time.monotonic() < deadline, "no checkpoint was written"
        assert run.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)


def finish(run: subprocess.Popen) -> dict:
    printed, complaints = run.communicate(timeout=DEADLINE_S)
    assert run.returncode == 0, complaints.decode()[-2000:]
    return json.loads(printed)


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_follows_the_same_trajectory(trained, base, pairs, tmp_path):
    run = start(base, pairs, tmp_path / "out", workers=2)
    wait_for_a_checkpoint(run, tmp_path / "out")
    workers = training_workers(run.pid)
    assert workers, "no training process was found"
    workers[0].kill()
    summary = finish(run)
    assert summary["starts"] == 2
    assert_same_trajectory(steps_of(tmp_path / "out"), steps_of(trained[0]))


@pytest.mark.slow
def test_a_killed_driver_is_resumed_on_the_same_trajectory(trained, base, pairs, tmp_path):
    run = start(base, pairs, tmp_path / "out")
    wait_for_a_checkpoint(run, tmp_path / "out")
    os.kill(run.pid, signal.SIGKILL)
    run.communicate()
    assert not (tmp_path / "out" / "config.json").exists()
    finish(start(base, pairs, tmp_path / "out"))
    assert_same_trajectory(steps_of(tmp_path / "out"), steps_of(trained[0]))
