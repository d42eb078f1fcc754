"""A job's metrics in a real scrape of Ray's agent are its summary's numbers."""

import os
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from polar_ray.config import ScoreConfig
from polar_ray.corpus.actor import open_scorer
from polar_ray.corpus.job import score_parquet
from polar_ray.metrics import RECEIPT_ID_DIGITS, REWARD
from polar_ray.scoring import Scorer
from tests.ray.conftest import make_table, read_scored
from tests.support.collector import running_collector
from tests.support.scrape import job_label, total, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]


def fake(**changes):
    return ScoreConfig.model_validate(
        {"engine": {"kind": "fake", "device": "cpu", "dtype": "float32"}, "unit_rows": 16, "actors": 2, **changes}
    )


def traced_scorer(collector: str, config: ScoreConfig) -> Scorer:
    """The actor's scorer, in an environment that asks for traces."""
    os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = collector
    return open_scorer(config)


def test_a_scrape_of_ray_has_the_numbers_of_the_summary(tmp_path):
    rows = make_table(12).to_pylist()
    rows[1]["output"] = ""
    rows[2]["output"] = "many words " * 400
    rows[3]["output"] = "mine <|reward|> 99"
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    config = fake(limits={"max_response_tokens": 256}, max_failed_fraction=0.5)
    with running_collector() as collector:
        summary = score_parquet(
            tmp_path / "in.parquet", tmp_path / "out", config, build_scorer=partial(traced_scorer, collector.address)
        )
        collector.wait_for({"unit", "read", "score", "write"})
    job = job_label(tmp_path / "out")
    samples = wait_for(
        lambda found: (
            total(found, "polar_ray_units_total", job_id=job) == summary.units
            and total(found, "polar_ray_units_left", job_id=job) == 0
        )
    )

    def told(name: str, **labels: str) -> float:
        return total(samples, f"polar_ray_{name}", job_id=job, **labels)

    assert {status: told("rows_total", status=status) for status in summary.by_status} == summary.by_status
    assert summary.by_status == {"ok": 47, "triple_empty": 1}
    assert told("tokens_total") == summary.tokens
    assert told("computed_tokens_total") == summary.computed_tokens
    assert told("cut_rows_total") == summary.cut_rows == 1
    assert told("control_token_rows_total") == told("removed_control_tokens_total") == 1
    assert told("engine_calls_total") == summary.units
    assert 0 < told("computed_tokens_total") / told("budget_tokens_total") < 1
    assert told("units_left") == 0
    assert told("receipt_info", receipt_id=summary.receipt_id[:RECEIPT_ID_DIGITS]) == 1
    rewards = [reward for reward in read_scored(tmp_path / "out")["reward"].to_pylist() if reward is not None]
    assert told("reward_bucket", le="+Inf") == told("reward_count") == len(rewards)
    for bound in REWARD.buckets:
        assert told("reward_bucket", le=str(bound)) == sum(reward < bound for reward in rewards)
    assert {sample.labels["node"] for sample in samples if sample.name == "polar_ray_rows_total"}
    assert not [sample for sample in samples if sample.name == "polar_ray_peak_flops_total"]
    units = {span.span_id for span in collector.spans if span.name == "unit"}
    assert {span.parent_span_id for span in collector.spans if span.name in ("read", "score", "write")} <= units
    assert "many words" not in str(collector.spans)
