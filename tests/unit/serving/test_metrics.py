"""An endpoint's metrics: operations where the peak is known, and no series for what is not known."""

from polar_ray.metrics import SPECS
from polar_ray.scoring import Usage
from polar_ray.serving.metrics import Metrics
from polar_ray.triples import Scored, Triple


def names(metrics):
    """Names of the series that there are."""
    return {sample.name for family in metrics.collect() for sample in family.samples}


def test_operations_have_series_only_where_the_peak_is_known():
    metrics = Metrics("a", "0" * 64)
    metrics.count_engine_work(Usage(3, 30, 20, 0, 0.5, 1, 64))
    assert not {"polar_ray_flops_total", "polar_ray_peak_flops_total"} & names(metrics)
    metrics.count_engine_work(Usage(3, 30, 20, 0, 0.5, 1, 64, 1e9, 4e9))
    assert metrics.registry.get_sample_value("polar_ray_peak_flops_total", {"replica": "a"}) == 4e9
    assert metrics.registry.get_sample_value("polar_ray_budget_tokens_total", {"replica": "a"}) == 128


def test_an_engines_failures_are_counted_from_nothing():
    metrics = Metrics("a", "0" * 64)
    where = {"replica": "a", "status": "engine_failed"}
    assert metrics.registry.get_sample_value("polar_ray_rows_total", where) == 0
    metrics.count_rows([Triple("p", "r", "o")], [Scored(None, "engine_failed", "x")], 0.1)
    assert metrics.registry.get_sample_value("polar_ray_rows_total", where) == 1


def test_what_is_no_longer_known_has_no_series():
    metrics = Metrics("a", "0" * 64)
    triples = [Triple("p", "r", "x" * n) for n in range(1, 601)]
    metrics.count_rows(triples, [Scored(n / 100) for n in range(600)], 0.1)
    assert "polar_ray_reward_length_correlation" in names(metrics)
    for _ in range(100):
        metrics.count_rows([Triple("p", "r", "x")] * 600, [Scored(1.0)] * 600, 0.1)
    assert "polar_ray_reward_length_correlation" not in names(metrics)


def test_an_endpoint_has_the_metrics_of_the_table():
    expected = {spec.full_name for spec in SPECS if "endpoint" in spec.places}
    assert {family.name for family in Metrics("a", "0" * 64).collect()} == expected
