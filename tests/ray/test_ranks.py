"""A job whose engines are ranks: one that is killed costs nothing but time."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import pyarrow.parquet as pq
import pytest

from polar_ray.config import EngineConfig, ScoreConfig
from polar_ray.corpus.job import score_parquet
from polar_ray.scoring import Scorer
from polar_ray.triples import Triple
from tests.ray.conftest import make_table, read_scored
from tests.support.ranks import are_gone, ranks_below

pytestmark = pytest.mark.ray

ENGINE = {"device": "cpu", "dtype": "float32", "token_budget": 1000}


def test_a_rank_killed_in_a_batch_loses_no_row_and_leaves_no_process(cluster, tmp_path):
    import ray

    free = ray.available_resources()["CPU"]
    source, target = tmp_path / "in.parquet", tmp_path / "out"
    table = make_table(60)
    pq.write_table(table, source)
    config = ScoreConfig(engine=EngineConfig(**ENGINE, tensor_parallel_size=2, threads=2), actors=1, unit_rows=40)
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(score_parquet, source, target, config)
        while len(list(target.glob("part-*.parquet"))) < 1 and not job.done():
            time.sleep(0.02)
        first = ranks_below(os.getpid())
        first[1].suspend()
        time.sleep(0.5)
        assert len(first) == 2
        assert not job.done()
        first[1].kill()
        assert are_gone(first)
        while len(second := ranks_below(os.getpid())) < 2 and not job.done():
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
