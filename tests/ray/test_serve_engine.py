"""A corpus job that uses a running endpoint's engine: the same rewards and the same receipt as with an engine here."""

import pyarrow.parquet as pq
import pytest

from polar_ray import score_parquet
from polar_ray.config import ScoreConfig
from polar_ray.errors import EngineUnavailable
from tests.ray.conftest import make_table, read_scored
from tests.support.endpoint import running_endpoint, serve_config

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]


@pytest.fixture
def corpus(tmp_path):
    pq.write_table(make_table(12), tmp_path / "in.parquet")
    return tmp_path / "in.parquet"


def config(**engine):
    return ScoreConfig.model_validate({"unit_rows": 16, "actors": 2, "engine": engine})


def test_a_job_through_an_endpoint_equals_one_with_the_engine_here(corpus, tmp_path):
    here = score_parquet(corpus, tmp_path / "here", config(kind="fake", device="cpu", dtype="float32"))
    with running_endpoint(serve_config()) as address:
        there = score_parquet(corpus, tmp_path / "there", config(kind="serve", address=address))
    assert there.receipt_id == here.receipt_id
    assert there.ok == 48
    assert read_scored(tmp_path / "there").equals(read_scored(tmp_path / "here"))


def test_an_endpoint_that_is_not_there_stops_a_job_before_it_starts(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("polar_ray.engines.serve.CONNECT_S", 0.3)
    with pytest.raises(EngineUnavailable, match="nobody answers"):
        score_parquet(corpus, tmp_path / "out", config(kind="serve", address="127.0.0.1:9"))
    assert not (tmp_path / "out" / "_polar_ray" / "manifest.json").exists()
