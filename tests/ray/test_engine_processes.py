"""A job whose engines have processes of their own: one that is killed costs nothing but time."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pyarrow.parquet as pq
import pytest

from polar_ray.config import EngineConfig, ScoreConfig
from polar_ray.corpus.job import score_parquet
from polar_ray.scoring import Scorer
from polar_ray.triples import Triple
from tests.ray.conftest import make_table, read_scored
from tests.support.lmdeploy_server import open_scorer, servers_below, write_interpreter
from tests.support.ranks import are_gone, ranks_below

pytestmark = pytest.mark.ray

ENGINE = {"device": "cpu", "dtype": "float32", "token_budget": 1000}


def ranks(tmp_path):
    """(settings of the engine, what builds its scorer, what finds its processes)"""
    return EngineConfig(**ENGINE, tensor_parallel_size=2, threads=2), {}, ranks_below


def server(tmp_path):
    """As `ranks`, of LMDeploy's engine; the job takes it for another one, as it runs on GPUs only."""
    python = write_interpreter(tmp_path)
    return EngineConfig(kind="fake"), {"build_scorer": partial(open_scorer, python)}, servers_below


@pytest.mark.parametrize(
    ("engine", "n_processes"),
    [pytest.param(ranks, 2, id="rank"), pytest.param(server, 1, id="server", marks=pytest.mark.slow)],
)
def test_a_process_killed_in_a_batch_loses_no_row_and_leaves_none(cluster, tmp_path, engine, n_processes):
    import ray

    free = ray.available_resources()["CPU"]
    source, target = tmp_path / "in.parquet", tmp_path / "out"
    table = make_table(60)
    pq.write_table(table, source)
    settings, builder, processes_below = engine(tmp_path)
    config = ScoreConfig(engine=settings, actors=1, unit_rows=40)
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(score_parquet, source, target, config, **builder)
        while len(list(target.glob("part-*.parquet"))) < 1 and not job.done():
            time.sleep(0.02)
        first = processes_below(os.getpid())
        first[-1].suspend()
        time.sleep(0.5)
        assert len(first) == n_processes
        assert not job.done()
        first[-1].kill()
        assert are_gone(first)
        while len(second := processes_below(os.getpid())) < n_processes and not job.done():
            time.sleep(0.02)
        summary = job.result(120)
    assert (summary.rows, summary.ok) == (240, 240)
    assert are_gone(second, 20)
    found = read_scored(target)
    assert found["row"].equals(table["row"])
    rows = [Triple(row["prompt"], row["reference"], row["output"]) for row in table.to_pylist()]
    with Scorer.open(engine=EngineConfig(**ENGINE)) as scorer:
        expected = [row.reward for row in scorer.score(rows)]
    assert found["reward"].to_pylist() == pytest.approx(expected, abs=1e-4)
    deadline = time.monotonic() + 20
    while ray.available_resources().get("CPU", 0) < free and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ray.available_resources()["CPU"] == free
    assert not ray.util.placement_group_table()
