"""A job's metrics are the sum of what its units reported, by node."""

from polar_ray.corpus.metrics import JobMetrics
from polar_ray.corpus.summary import UnitReport
from polar_ray.corpus.tracker import JobTracker
from polar_ray.health import RewardHealth, Spread
from polar_ray.metrics import REWARD, SPECS

JOB, RECEIPT = "0123456789abcdef", "fedcba9876543210"
REPORT = UnitReport(
    rows=5,
    ok=4,
    by_status={"ok": 4, "triple_empty": 1},
    tokens=100,
    computed_tokens=60,
    engine_calls=2,
    budget_tokens=128,
    engine_seconds=0.5,
    cut_rows=2,
    cut_tokens=30,
    control_token_rows=1,
    removed_control_tokens=3,
    reward_bins={-48: 1, -4: 2, 15: 1},
    spread=Spread(groups=2, zero_groups=1, bins={0: 1, 4: 1}),
    health=RewardHealth(rows=4, equal_echoes=1, contained_echoes=2),
    finished=[(1.0, 5, 100, 60)],
)


def values(metrics):
    """Value by name, node and further labels."""
    return {
        (
            sample.name.removeprefix("polar_ray_"),
            *(value for label, value in sample.labels.items() if label != "job_id"),
        ): (sample.value)
        for family in metrics.collect()
        for sample in family.samples
    }


def test_counts_add_up_by_node():
    metrics = JobMetrics(JOB, RECEIPT, units_left=10)
    for node in ("a", "b", "a"):
        metrics.add(node, REPORT)
    found = values(metrics)
    assert (found["tokens_total", "a"], found["tokens_total", "b"]) == (200, 100)
    assert (found["units_total", "a"], found["units_total", "b"], found[("units_left",)]) == (2, 1, 7)
    assert found["rows_total", "a", "triple_empty"] == 2
    assert (found["echo_rows_total", "b", "equal"], found["echo_rows_total", "b", "contained"]) == (1, 2)
    assert (found["groups_total", "a"], found["zero_spread_groups_total", "a"]) == (4, 2)
    assert found["receipt_info", RECEIPT[:12]] == 1
    assert {sample.labels["job_id"] for family in metrics.collect() for sample in family.samples} == {JOB[:12]}


def test_buckets_hold_what_is_below_their_bounds():
    metrics = JobMetrics(JOB, RECEIPT, units_left=1)
    metrics.add("a", REPORT)
    found = values(metrics)
    counts = [found["reward_bucket", "a", str(bound)] for bound in REWARD.buckets]
    assert counts == [0, *[1] * 7, *[3] * 5, 4], "rewards from -12 to -11.75, from -1 to -0.75 and from 3.75 to 4"
    assert found["reward_bucket", "a", "+Inf"] == found["reward_count", "a"] == 4


def test_operations_have_series_only_where_the_peak_is_known():
    metrics = JobMetrics(JOB, RECEIPT, units_left=2)
    metrics.add("cpu", REPORT)
    metrics.add("gpu", REPORT.model_copy(update={"flops": 3e9, "peak_flops": 9e9}))
    found = values(metrics)
    assert {key: value for key, value in found.items() if "flops" in key[0]} == {
        ("flops_total", "gpu"): 3e9,
        ("peak_flops_total", "gpu"): 9e9,
    }


def test_the_state_of_the_run_is_the_trackers():
    tracker, metrics = JobTracker(), JobMetrics(JOB, RECEIPT, units_left=1)
    assert ("units_repeated_total",) not in values(metrics)
    tracker.started()
    tracker.begin(0, 5)
    tracker.begin(0, 5)
    metrics.watch(tracker.snapshot())
    found = values(metrics)
    assert (found[("units_repeated_total",)], found[("process_deaths_total",)], found[("engines_started_total",)]) == (
        1,
        1,
        1,
    )


def test_a_job_has_the_metrics_of_the_table():
    metrics = JobMetrics(JOB, RECEIPT, units_left=30)
    metrics.watch(JobTracker().snapshot())
    for _ in range(30):
        metrics.add("a", REPORT.model_copy(update={"peak_flops": 1.0, "reward_bins": {-4: 99}}))
    named = {family.name for family in metrics.collect()}
    expected = {spec.full_name for spec in SPECS if "job" in spec.places}
    assert expected - named == {"polar_ray_reward_length_correlation"}, "lengths that do not vary have none"
    assert named <= expected
