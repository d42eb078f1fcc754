"""The endpoint's benchmark: its arithmetic, its checks, and one small run over a real HTTP connection."""

import json

import httpx
import pytest
from typer.testing import CliRunner

from polar_ray.bench.calls import Load, Sample, count_reply
from polar_ray.bench.serve import SCORER, compare, summarise, within_reach
from polar_ray.cli.bench import app
from polar_ray.errors import ConfigError, EngineProtocolError, Overloaded
from polar_ray.wire import error_reply


def reply(*rewards, status=200):
    rows = [{"reward": reward} for reward in rewards]
    return httpx.Response(status, json={"rewards": rows, "usage": {"tokens": 30, "computed_tokens": 20}})


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(what was printed, what was written) of a short run against the API under uvicorn."""
    file = tmp_path_factory.mktemp("bench") / "results" / "serve.json"
    load = ["--callers", "2", "--rows", "3", "--rounds", "2", "--seconds-per-load", "0.05", "--output", str(file)]
    arguments = ["serve", "--engine", "fake", "--road", "bare", *load]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False, env={"COLUMNS": "110"})
    assert done.exit_code == 0
    return done.output, json.loads(file.read_text())


def test_a_run_measures_the_scorer_and_the_road(measured):
    output, content = measured
    (compared,) = content["results"]
    assert [row["road"] for row in compared["results"]] == ["scorer", "bare"]
    assert compared["left_out"] == {}
    assert all(row["road"] in output for row in compared["results"])
    assert content["versions"]["ray"]
    assert len(content["load_average"]["before"]) == 3
    assert content["command"].startswith("polar-ray bench serve --engine fake --model embedded --road bare --callers 2")


def test_every_figure_stands_below_its_name(measured):
    output, content = measured
    table = output[output.index("fake engine") :].splitlines()
    head = next(line for line in table if "req/s" in line)
    line = next(line for line in table if "bare" in line.split())
    bare = content["results"][0]["results"][1]
    shown = {
        name: line[: head.index(name) + len(name)].split()[-1]
        for name in ("rows/s", "p99 ms", "wall", "CPU us", "tokens")
    }
    assert shown == {
        "rows/s": f"{bare['rows_per_s']:,.4g}",
        "p99 ms": f"{bare['p99_ms']:,.1f}",
        "wall": f"{bare['overhead_percent']:,.0f}%",
        "CPU us": f"{bare['road_cpu_us_per_row']:,.0f}",
        "tokens": f"{bare['computed_tokens_per_row']:.0f}",
    }


@pytest.mark.parametrize("wire", ["json", "arrow"])
def test_of_an_engine_that_sleeps_it_is_told_what_is_left(tmp_path, wire):
    file = tmp_path / "serve.json"
    load = f"--callers 2 --rows 8 --rounds 1 --seconds-per-load 0.5 --wire {wire} --tokens-per-s 20000"
    arguments = ["serve", "--engine", "fake", "--road", "bare", *load.split(), "--output", str(file)]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False, env={"COLUMNS": "120"})
    assert done.exit_code == 0
    assert "of engine" in done.output
    content = json.loads(file.read_text())
    assert f"--wire {wire} --threads 1 --seed 0 --tokens-per-s 20000" in content["command"]
    for row in content["results"][0]["results"]:
        assert 0.05 < row["of_engine"] < 1.02
        assert row["of_engine"] == row["computed_tokens_per_row"] * row["rows_per_s"] / 20000


def test_rates_and_work_follow_from_the_rounds(measured):
    scorer, bare = measured[1]["results"][0]["results"]
    for row in (scorer, bare):
        rates = [requests / seconds for requests, seconds in zip(row["requests"], row["seconds"], strict=True)]
        assert len(rates) == 2
        assert row["requests_per_s"] == pytest.approx(sum(rates) / 2)
        assert row["rows_per_s"] == pytest.approx(3 * row["requests_per_s"])
        assert 0 < row["computed_tokens"] < row["tokens"]
        assert row["computed_tokens_per_row"] == pytest.approx(row["computed_tokens"] / (3 * sum(row["requests"])))
        assert 0 < row["p50_ms"] <= row["p99_ms"] <= 1000 * sum(row["seconds"])
        assert row["max_difference"] == 0
        assert row["speed_over_proxy"] is None
    apart_s = 1 / bare["rows_per_s"] - 1 / scorer["rows_per_s"]
    assert bare["overhead_us_per_row"] == pytest.approx(1e6 * apart_s)
    assert bare["overhead_ms_per_request"] == pytest.approx(1e3 * apart_s * 3)
    assert bare["overhead_percent"] == pytest.approx(100 * apart_s * scorer["rows_per_s"])


def test_cpu_of_the_endpoint_and_of_its_callers_is_told_apart(measured):
    _, bare = measured[1]["results"][0]["results"]
    assert all(seconds > 0 for seconds in bare["callers_cpu_s"])
    assert sum(bare["road_cpu_s"]) > 0
    assert bare["road_cpu_us_per_row"] == pytest.approx(1e6 * sum(bare["road_cpu_s"]) / (3 * sum(bare["requests"])))


def test_roads_are_compared_with_the_default_proxy():
    load = Load(callers=2, rows=10)
    taken = {SCORER: 1.0, "proxy": 4.0, "haproxy": 2.0}
    summaries = {
        road: summarise(road, load, [Sample(seconds, 10, 1000, 500, road_cpu_s=seconds, latencies_s=[seconds / 10])])
        for road, seconds in taken.items()
    }
    results = {result.road: result for result in compare(summaries)}
    assert results["haproxy"].speed_over_proxy == 2
    assert results["proxy"].speed_over_proxy == 1
    assert results["haproxy"].overhead_us_per_row == pytest.approx(10_000)
    assert results["haproxy"].overhead_ms_per_request == pytest.approx(100)
    assert results["proxy"].overhead_percent == pytest.approx(300)
    assert results["proxy"].road_cpu_us_per_row == pytest.approx(40_000)
    assert results["proxy"].cpu_overhead_us_per_row == pytest.approx(30_000)
    assert results["proxy"].cpu_overhead_ms_per_request == pytest.approx(300)
    assert results["proxy"].cpu_overhead_percent == pytest.approx(300)


def test_a_reply_with_the_right_rewards_is_counted():
    sample = Sample()
    count_reply(sample, reply(1.0, -2.00001), [1.0, -2.0], 1e-4)
    assert (sample.requests, sample.tokens, sample.computed_tokens) == (1, 30, 20)
    assert sample.max_difference == pytest.approx(5e-6)


@pytest.mark.parametrize("rewards", [(1.0, -2.1), (-2.0, 1.0), (1.0, None), (1.0,), (1.0, -2.0, 3.0)], ids=str)
def test_a_wrong_reward_ends_the_run(rewards):
    with pytest.raises(EngineProtocolError):
        count_reply(Sample(), reply(*rewards), [1.0, -2.0], 1e-4)


def test_an_error_of_the_endpoint_ends_the_run_as_itself():
    body = error_reply(Overloaded("full")).model_dump_json()
    with pytest.raises(Overloaded):
        count_reply(Sample(), httpx.Response(429, content=body), [1.0], 0.0)


def test_loads_that_would_take_minutes_are_left_out():
    loads = within_reach([1, 32], [4, 64], "torch")
    assert loads == [Load(1, 4), Load(1, 64)]


@pytest.mark.parametrize(
    "options",
    [["--road", "tunnel"], ["--engine", "steam"], ["--engine", "torch", "--callers", "64", "--rows", "512"]],
    ids=lambda options: " ".join(options),
)
def test_what_cannot_be_measured_is_refused_before_anything_starts(options):
    with pytest.raises(ConfigError, match=options[0]):
        CliRunner().invoke(app, ["serve", *options], catch_exceptions=False)
