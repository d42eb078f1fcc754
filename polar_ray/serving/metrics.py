"""One replica's metrics, as `polar_ray/metrics.py` names them."""

from __future__ import annotations

import threading
from collections import Counter as Counted
from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import Metric

from polar_ray import metrics as table
from polar_ray.errors import EngineError, error_kinds
from polar_ray.health import RecentHealth, examine, reward_bin
from polar_ray.metrics import ENDPOINT_LABELS, RECEIPT_ID_DIGITS, SPECS, MetricSpec
from polar_ray.scoring import Usage
from polar_ray.triples import STATUS_OK, Row, Scored

ENGINE_FAILURES = tuple(code for code, kind in error_kinds().items() if issubclass(kind, EngineError))


class Metrics:
    """One replica's metrics. Texts, tokens of callers and addresses are in none of them."""

    def __init__(self, replica: str, receipt_id: str = "") -> None:
        """`replica` is a label of every series, for a scrape reaches all replicas through one address."""
        self.registry = CollectorRegistry()
        self._replica = replica
        self._health = RecentHealth()
        self._lock = threading.Lock()
        specs = [spec for spec in SPECS if "endpoint" in spec.places]
        self._counters = {spec: Counter(*self._signature(spec)) for spec in specs if spec.kind == "counter"}
        self._gauges = {spec: Gauge(*self._signature(spec)) for spec in specs if spec.kind == "gauge"}
        self._histograms = {
            spec: Histogram(*self._signature(spec), buckets=spec.buckets) for spec in specs if spec.kind == "histogram"
        }
        for spec in self._counters:
            if not spec.labels and spec not in (table.FLOPS, table.PEAK_FLOPS):
                self._counters[spec].labels(replica)
        for code in (STATUS_OK, *ENGINE_FAILURES):  # a counter that begins with a failure hides it from increase()
            self._counters[table.ROWS].labels(replica, code)
        self._gauges[table.RECEIPT_INFO].labels(replica, receipt_id[:RECEIPT_ID_DIGITS]).set(1)

    def watch_pending(self, priority: str, read: Callable[[], int]) -> None:
        """Have `read` called for the pending tokens of a priority at every scrape."""
        self._gauges[table.PENDING_TOKENS].labels(self._replica, priority).set_function(read)

    def count_request(self, route: str, code: str, seconds: float) -> None:
        self._add(table.REQUESTS, 1, route, code)
        self._observe(table.REQUEST_SECONDS, seconds, route)

    def count_dropped(self) -> None:
        self._add(table.DROPPED_REQUESTS, 1)

    def count_rows(self, rows: Sequence[Row], scored: Sequence[Scored], queue_s: float) -> None:
        """One request's `rows`, and what became of each."""
        self._observe(table.QUEUE_SECONDS, queue_s)
        for status, count in Counted(row.status for row in scored).items():
            self._add(table.ROWS, count, status)
        given = self._histograms[table.REWARD].labels(self._replica)
        for row in scored:
            if row.reward is not None:
                given.observe(row.reward)
        self._add(table.TOKENS_OF_ROWS, sum(row.tokens for row in scored))
        self._add(table.CUT_ROWS, sum(row.cut_tokens > 0 for row in scored))
        self._add(table.CUT_TOKENS, sum(row.cut_tokens for row in scored))
        self._add(table.CONTROL_TOKEN_ROWS, sum(row.removed_control_tokens > 0 for row in scored))
        self._add(table.REMOVED_CONTROL_TOKENS, sum(row.removed_control_tokens for row in scored))

        self._count_health(rows, scored)

    def _count_health(self, rows: Sequence[Row], scored: Sequence[Scored]) -> None:
        found, spread = examine(rows, scored)
        self._add(table.GROUPS, spread.groups)
        self._add(table.ZERO_SPREAD_GROUPS, spread.zero_groups)
        self._add(table.ECHO_ROWS, found.equal_echoes, "equal")
        self._add(table.ECHO_ROWS, found.contained_echoes, "contained")
        with self._lock:
            self._health.add(Counted(reward_bin(row.reward) for row in scored if row.reward is not None), found)

    def count_engine_work(self, used: Usage) -> None:
        """What the scorer did for one batch of callers' rows."""
        self._add(table.COMPUTED_TOKENS, used.computed_tokens)
        self._add(table.ENGINE_CALLS, used.engine_calls)
        self._add(table.BUDGET_TOKENS, used.budget_tokens)
        self._add(table.ENGINE_SECONDS, used.engine_seconds)
        self._observe(table.BATCH_TOKENS, used.computed_tokens)
        self._add(table.FLOPS, used.flops)
        self._add(table.PEAK_FLOPS, used.peak_flops)

    def collect(self) -> list[Metric]:
        """All families with their samples, as they stand; they pickle. Safe in any thread."""
        with self._lock:
            self._set(table.REWARD_DRIFT, self._health.drift)
            self._set(table.REWARD_LENGTH_CORRELATION, self._health.length_correlation, "rows")
            self._set(table.REWARD_LENGTH_CORRELATION, self._health.length_correlation_in_groups, "groups")
        return list(self.registry.collect())

    def _signature(self, spec: MetricSpec) -> tuple[str, str, tuple[str, ...], str, str, str, CollectorRegistry]:
        return spec.full_name, spec.text, (*ENDPOINT_LABELS, *spec.labels), "", "", "", self.registry

    def _add(self, spec: MetricSpec, amount: float, *labels: str) -> None:
        if amount:  # most are nothing in most requests; and operations, whose peak is not known, have no series
            self._counters[spec].labels(self._replica, *labels).inc(amount)

    def _set(self, spec: MetricSpec, value: float | None, *labels: str) -> None:
        """What is not known has no series."""
        if value is None:
            self._gauges[spec].remove(self._replica, *labels)
        else:
            self._gauges[spec].labels(self._replica, *labels).set(value)

    def _observe(self, spec: MetricSpec, value: float, *labels: str) -> None:
        self._histograms[spec].labels(self._replica, *labels).observe(value)
