"""A real local Ray cluster for the whole folder, and small corpora to score on it."""

import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("AWS_ACCESS_KEY_ID", "for-a-test-server")
os.environ.setdefault("AWS_SECRET_ACCESS_KEY", "for-a-test-server")


@pytest.fixture(scope="session")
def cluster():
    """Four logical CPUs, whatever the machine has."""
    import ray

    ray.init(
        address="local", num_cpus=4, include_dashboard=False, object_store_memory=128 << 20, log_to_driver=False,
        logging_level="ERROR", _system_config={"metrics_report_interval_ms": 500},
    )  # fmt: skip
    yield
    ray.shutdown()


def make_table(n_groups: int, outputs_per_group: int = 4, *, first: int = 0) -> pa.Table:
    """Groups that share prompt and reference, with columns that are none of a job's business."""
    rows = [
        {
            "row": first + group * outputs_per_group + n,
            "prompt": f"Question {first}-{group}: how many apples are in {group} baskets of {n_apples(group)} each?",
            "reference": f"There are {group * n_apples(group)} apples: {group} times {n_apples(group)}.",
            "output": f"I count {group * n_apples(group) + n} apples in all.",
            "tags": [{"name": "n", "value": n}],
        }
        for group in range(n_groups)
        for n in range(outputs_per_group)
    ]
    return pa.Table.from_pylist(rows)


def n_apples(group: int) -> int:
    return 3 + group % 7


def read_scored(output) -> pa.Table:
    """Every row of a job's output, in order."""
    return pq.read_table(output)
