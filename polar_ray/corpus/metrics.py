"""A running job's metrics, as `polar_ray/metrics.py` names them: of this run, from what its units report.

A unit reports once, when its file is there, so the counts are those of the summary whoever died on the way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from polar_ray import metrics as table
from polar_ray.corpus.summary import UnitReport, add_to
from polar_ray.corpus.tracker import Snapshot
from polar_ray.health import REWARD_BIN, RecentHealth
from polar_ray.metrics import RECEIPT_ID_DIGITS, MetricSpec

JOB_ID_DIGITS = 12

SUMS: Mapping[MetricSpec, Callable[[UnitReport], float]] = {
    table.TOKENS_OF_ROWS: lambda report: report.tokens,
    table.COMPUTED_TOKENS: lambda report: report.computed_tokens,
    table.ENGINE_CALLS: lambda report: report.engine_calls,
    table.BUDGET_TOKENS: lambda report: report.budget_tokens,
    table.ENGINE_SECONDS: lambda report: report.engine_seconds,
    table.CUT_ROWS: lambda report: report.cut_rows,
    table.CUT_TOKENS: lambda report: report.cut_tokens,
    table.CONTROL_TOKEN_ROWS: lambda report: report.control_token_rows,
    table.REMOVED_CONTROL_TOKENS: lambda report: report.removed_control_tokens,
    table.GROUPS: lambda report: report.spread.groups,
    table.ZERO_SPREAD_GROUPS: lambda report: report.spread.zero_groups,
}
"""Counters of each node that are one number of a report."""

COUNTS_OF_RUN: Mapping[MetricSpec, Callable[[Snapshot], float]] = {
    table.UNITS_REPEATED: lambda snapshot: snapshot.repeated_units,
    table.PROCESS_DEATHS: lambda snapshot: snapshot.deaths,
    table.QUARANTINED_ROWS: lambda snapshot: snapshot.quarantined,
    table.ENGINES_STARTED: lambda snapshot: snapshot.actors,
}


class JobMetrics:
    """One run's counts so far. Safe in any thread."""

    def __init__(self, job_id: str, receipt_id: str, units_left: int) -> None:
        self._job = job_id[:JOB_ID_DIGITS]
        self._receipt = receipt_id[:RECEIPT_ID_DIGITS]
        self._units_left = units_left
        self._units: dict[str, int] = {}
        self._by_node: dict[str, UnitReport] = {}
        self._health = RecentHealth()
        self._snapshot: Snapshot | None = None
        self._lock = threading.Lock()

    def add(self, node: str, report: UnitReport) -> None:
        """A unit was finished on `node`."""
        with self._lock:
            total = self._by_node.setdefault(node, UnitReport())
            add_to(total, report)
            total.finished.clear()  # a moment for each unit is of no use here, and there can be many
            self._units[node] = self._units.get(node, 0) + 1
            self._units_left -= 1
            self._health.add(report.reward_bins, report.health)

    def watch(self, snapshot: Snapshot) -> None:
        """The state of the run now."""
        self._snapshot = snapshot

    def collect(self) -> list[Metric]:
        """All families with their samples, as they stand."""
        with self._lock:
            return [*self._of_run(), *self._of_nodes()]

    def _of_run(self) -> list[Metric]:
        families: list[Metric] = [
            self._gauge(table.RECEIPT_INFO, 1, self._receipt),
            self._gauge(table.UNITS_LEFT, self._units_left),
        ]
        health = (
            (table.REWARD_DRIFT, self._health.drift, ()),
            (table.REWARD_LENGTH_CORRELATION, self._health.length_correlation, ("rows",)),
            (table.REWARD_LENGTH_CORRELATION, self._health.length_correlation_in_groups, ("groups",)),
        )
        families += [self._gauge(spec, value, *labels) for spec, value, labels in health if value is not None]
        if self._snapshot is None:
            return families
        families.append(self._gauge(table.SECONDS_SINCE_PROGRESS, self._snapshot.seconds_since_progress))
        for spec, read in COUNTS_OF_RUN.items():
            family = CounterMetricFamily(spec.full_name, spec.text, labels=["job_id"])
            family.add_metric([self._job], read(self._snapshot))
            families.append(family)
        return families

    def _of_nodes(self) -> list[Metric]:
        families: list[Metric] = []
        for spec, read in SUMS.items():
            families.append(self._counter(spec, {(node,): read(total) for node, total in self._by_node.items()}))
        known = {node: total for node, total in self._by_node.items() if total.peak_flops}
        families.append(self._counter(table.FLOPS, {(node,): total.flops for node, total in known.items()}))
        families.append(self._counter(table.PEAK_FLOPS, {(node,): total.peak_flops for node, total in known.items()}))
        families.append(self._counter(table.UNITS, {(node,): count for node, count in self._units.items()}))
        by_status: dict[tuple[str, ...], float] = {
            (node, status): count for node, total in self._by_node.items() for status, count in total.by_status.items()
        }
        families.append(self._counter(table.ROWS, by_status))
        echoes: dict[tuple[str, ...], float] = {}
        for node, total in self._by_node.items():
            echoes[node, "equal"] = total.health.equal_echoes
            echoes[node, "contained"] = total.health.contained_echoes
        families.append(self._counter(table.ECHO_ROWS, echoes))
        rewards = HistogramMetricFamily(table.REWARD.full_name, table.REWARD.text, labels=["job_id", "node"])
        for node, total in self._by_node.items():
            rewards.add_metric([self._job, node], _buckets(total.reward_bins), None)
            rewards.add_sample(
                f"{rewards.name}_count", {"job_id": self._job, "node": node}, sum(total.reward_bins.values())
            )
        return [*families, rewards]

    def _gauge(self, spec: MetricSpec, value: float, *labels: str) -> GaugeMetricFamily:
        family = GaugeMetricFamily(spec.full_name, spec.text, labels=["job_id", *spec.labels])
        family.add_metric([self._job, *labels], value)
        return family

    def _counter(self, spec: MetricSpec, values: Mapping[tuple[str, ...], float]) -> CounterMetricFamily:
        """`values` by node, and by the labels of `spec`."""
        family = CounterMetricFamily(spec.full_name, spec.text, labels=["job_id", "node", *spec.labels])
        for labels, value in values.items():
            family.add_metric([self._job, *labels], value)
        return family


def _buckets(reward_bins: Mapping[int, int]) -> list[tuple[str, float]]:
    """Rewards below each bound, and all of them."""
    below = [
        (str(bound), float(sum(count for place, count in reward_bins.items() if (place + 1) * REWARD_BIN <= bound)))
        for bound in table.REWARD.buckets
    ]
    return [*below, ("+Inf", float(sum(reward_bins.values())))]
