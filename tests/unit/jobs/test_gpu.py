"""The benchmark of one GPU runs on a CPU as well, needs no Ray, and says what did not fit."""

import json
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from polar_ray.bench import gpu as bench
from polar_ray.bench import rates
from polar_ray.bench.gpu import GPU_SHAPES, LOADS, Row, ShapeResult, bench_shape, goals
from polar_ray.bench.workload import RandomCheckpoint, config_of
from polar_ray.engines.torch.decoder import Decoder
from polar_ray.errors import EngineError
from polar_ray.model.cost import bytes_of_batches
from polar_ray.model.polar import build_polar
from polar_ray.planning import Batch, plan

SCRIPT = Path(__file__).resolve().parents[3] / "jobs" / "bench" / "gpu.py"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch):
    monkeypatch.setattr(rates, "PRODUCT_REPEATS", 1)
    monkeypatch.setattr(rates, "COPY_REPEATS", 1)


@pytest.fixture(scope="module")
def script():
    spec = spec_from_file_location("gpu_script", SCRIPT)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def invoke(script, *arguments):
    app = script.typer.Typer()
    app.command()(script.main)
    return CliRunner().invoke(app, ["--device", "cpu", "--shape", "tiny", "--shorter", "64", *arguments])


def test_one_command_measures_every_method_and_writes_what_a_results_file_must_hold(script, tmp_path):
    file = tmp_path / "results" / "gpu.json"
    parts = ["--workload", "1k", "--workload", "groups", "--rounds", "2", "--profile"]
    done = invoke(script, *parts, "--output", str(file))
    assert done.exit_code == 0, done.output
    content = json.loads(file.read_text())
    assert content["command"] == (
        "python jobs/bench/gpu.py --device cpu --shape tiny --workload 1k --workload groups --rounds 2 --shorter 64 "
        "--profile"
    )
    assert content["versions"]["torch"]
    assert content["warnings"] == []
    assert str(tmp_path) not in file.read_text()
    (result,) = content["results"]
    assert [(row["workload"], row["method"]) for row in result["rows"]] == [
        ("1k", "transformers"),
        ("1k", "eager unshared"),
        ("1k", "compiled unshared"),
        ("1k", "fp8 unshared"),
        ("groups", "transformers"),
        ("groups", "eager unshared"),
        ("groups", "eager shared"),
        ("groups", "compiled unshared"),
        ("groups", "compiled shared"),
        ("groups", "fp8 unshared"),
        ("groups", "fp8 shared"),
    ]
    for row in result["rows"]:
        assert row["error"] is None
        assert len(row["seconds"]) == 2
        assert row["max_error"] < (1.5 if row["method"].startswith("fp8") else 0.3)
        assert row["flops"] > 0
        assert row["bytes"] > 0
        assert row["effective_tokens_per_s"] == row["tokens"] / row["median_s"]
        assert sum(kernel["share"] for kernel in row["kernels"]) == pytest.approx(1, abs=0.1)
    shared, unshared = result["rows"][-1], result["rows"][-2]
    assert shared["tokens"] == unshared["computed_tokens"] > 2 * shared["computed_tokens"]
    assert {goal["is_met"] for goal in content["goals"]} <= {True, False, None}
    assert "effective tokens/s of groups of 8" in done.output


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--shape", "70b"], "70b: expected one of 1.8b, 7b, tiny"), (["--workload", "8k"], "8k: expected one of 1k")],
    ids=["shape", "workload"],
)
def test_a_part_that_is_not_there_is_refused(script, arguments, named):
    done = invoke(script, *arguments)
    assert done.exit_code == 2
    assert named in done.output


def test_the_script_needs_no_ray_and_no_installation(tmp_path):
    code = (
        f"import sys, runpy; sys.path = [path for path in sys.path if path]; runpy.run_path({str(SCRIPT)!r}); "
        "print([name for name in ('ray', 'fastapi') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "error", [EngineError("a batch failed: CUDA out of memory"), torch.OutOfMemoryError("CUDA out of memory\nadvice")]
)
def test_what_does_not_fit_is_a_row_and_the_run_goes_on(monkeypatch, error):
    rewards = Decoder.rewards

    def with_little_memory(decoder, packed):
        if packed.ids_T.numel() > 100 and decoder._embedding.dtype == torch.bfloat16:
            raise error
        return rewards(decoder, packed)

    monkeypatch.setattr(Decoder, "rewards", with_little_memory)
    loads = {"batch-64k": LOADS["batch-64k"].shorter(256), "row-16k": LOADS["row-16k"].shorter(256)}
    result = bench_shape("tiny", loads, CPU, rounds=1)
    failed = {(row.workload, row.method): row.error for row in result.rows if row.error}
    assert set(failed) == {("batch-64k", f"{engine} unshared") for engine in ("eager", "compiled", "fp8")}
    assert all("CUDA out of memory" in said and "\n" not in said for said in failed.values())
    assert all(row.median_s is None for row in result.rows if row.error)
    assert all(row.max_error is not None for row in result.rows if not row.error)
    assert {goal.what.split(": ")[1].split()[0]: goal.is_met for goal in goals([result]) if "fits" in goal.what} == {
        "row-16k": True,
        "batch-64k": False,
    }


def test_goals_are_open_where_a_figure_is_missing_and_take_the_least():
    def row(load, method, share, rate):
        done = Row("7b", load, "", method, 1, 1, 1.0, 1.0)
        done.fraction_of_matmul_rate, done.effective_tokens_per_s = share, rate
        return done

    rows = [row(load, "compiled unshared", share, 10.0) for load, share in (("1k", 0.7), ("2k", 0.66))]
    rows += [row("groups", "compiled unshared", 0.7, 10.0), row("groups", "compiled shared", 0.7, 24.0)]
    found = goals([ShapeResult("7b", 1, 1.0, 1.0, [], rows)])
    assert [(goal.figure, goal.is_met) for goal in found[:3]] == [(None, None), (2.4, False), (None, None)]
    rows += [row("4k", "compiled unshared", 0.64, 10.0)]
    rows += [row(load, "fp8 unshared", 0.7, rate) for load, rate in (("1k", 15.0), ("2k", 16.0), ("4k", 14.0))]
    found = goals([ShapeResult("7b", 1, 1.0, 1.0, [], rows)])
    assert [(goal.figure, goal.is_met) for goal in found[:3]] == [(0.64, False), (2.4, False), (1.4, True)]


def test_shapes_have_polar_s_parameters_and_loads_the_lengths_they_state():
    parameters = {
        name: RandomCheckpoint.of(shape).size_bytes / 2e9 for name, shape in GPU_SHAPES.items() if name != "tiny"
    }
    assert parameters == {"1.8b": pytest.approx(1.70, abs=0.01), "7b": pytest.approx(7.36, abs=0.01)}
    others = {"groups": 128_000, "row-16k": 16_384, "batch-64k": 65_536}
    for name, load in LOADS.items():
        sequences = bench.random_groups(load.workload, load.n_groups, 1000)
        assert sum(map(len, sequences)) == pytest.approx(others.get(name, 32_768), rel=0.06)
    (batch,) = plan(sequences, token_budget=LOADS["batch-64k"].token_budget).batches
    assert batch.computed_tokens == 65_536


def test_random_weights_are_the_same_in_every_dtype_and_form():
    checkpoint = RandomCheckpoint.of(GPU_SHAPES["tiny"])
    name = "model.layers.1.feed_forward.w1.weight"
    narrow, wide = (checkpoint.read(name, dtype) for dtype in (torch.bfloat16, torch.float32))
    assert torch.equal(narrow.float(), wide)
    assert wide.std() == pytest.approx(128**-0.5, rel=0.02)
    assert torch.equal(checkpoint.read(name, torch.float32, "cpu", (slice(8),)), wide[:8])
    assert not torch.equal(checkpoint.read("model.layers.2.feed_forward.w1.weight", torch.float32), wide)
    ids = np.arange(40, dtype=np.int32)
    model = build_polar(checkpoint, dtype=torch.float32)
    engine = bench._Models(checkpoint, CPU).engine(torch.float32, {})
    (reward,) = engine.score(Batch.unshared([ids]))
    with torch.inference_mode():
        assert float(model(torch.from_numpy(ids.astype(np.int64))[None])) == pytest.approx(reward, abs=1e-4)


def test_bytes_are_weights_for_each_chunk_and_the_rest_for_each_token():
    config = config_of(GPU_SHAPES["7b"])
    layer_weights = RandomCheckpoint.of(GPU_SHAPES["7b"]).size_bytes - 2 * 92544 * 4096

    def moved(n_sequences, n_tokens, chunk_tokens):
        batch = Batch.unshared([np.zeros(n_tokens, dtype=np.int32)] * n_sequences)
        return bytes_of_batches(config, [batch], chunk_tokens)

    assert moved(1, 1000, 500) - moved(1, 1000, 1000) == pytest.approx(layer_weights, rel=1e-3)
    assert moved(2, 1000, 2000) - moved(1, 1000, 2000) == pytest.approx(moved(1, 1000, 1000) - layer_weights, rel=1e-3)
    per_token_and_layer = (moved(1, 2000, 8192) - moved(1, 1000, 8192)) / 1000 / 32
    assert 28 * 4096 + 10 * 14336 < per_token_and_layer < 80 * 4096 + 14 * 14336
