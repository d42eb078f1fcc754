"""Every metric of an endpoint: names, units and labels, in one table."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import Metric

from polar_ray.triples import Scored

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
TOKENS = (128, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
REWARDS = (-12.0, -10.0, -8.0, -6.0, -4.0, -3.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 4.0)
"""Where POLAR's published rewards lie: from about -12 to about 1."""


class Metrics:
    """One replica's metrics. Texts, tokens of callers and addresses are in none of them."""

    def __init__(self, replica: str) -> None:
        """`replica` is a label of every series, for a scrape reaches all replicas through one address."""
        self.registry = CollectorRegistry()
        self._replica = replica

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"polar_ray_{name}", text, ("replica", *labels), registry=self.registry)

        def histogram(name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
            return Histogram(f"polar_ray_{name}", text, ("replica", *labels), registry=self.registry, buckets=buckets)

        self._requests = counter(
            "requests", "Requests answered, by route and code (ok or an error's).", "route", "code"
        )
        self._rows = counter("rows", "Rows answered, by status (ok, or the code of an error).", "status")
        self._tokens = counter("tokens", "Tokens of the rows that were computed.")
        self._computed = counter("computed_tokens", "Tokens that went through the model; what rows share counts once.")
        self._cut = counter("cut_tokens", "Tokens that limits removed.")
        self._removed = counter("removed_control_tokens", "Control tokens that stood in texts and were taken out.")
        self._engine_seconds = counter("engine_seconds", "Seconds that the engine computed.")
        self._dropped = counter("dropped_requests", "Requests whose caller went away before the answer.")
        self._request_seconds = histogram("request_seconds", "From arrival to answer.", SECONDS, "route")
        self._queue_seconds = histogram("queue_seconds", "From the queue to the engine.", SECONDS)
        self._batch_tokens = histogram("batch_tokens", "Computed tokens of one engine call.", TOKENS)
        self._rewards = histogram("reward", "Rewards given: their drift is the first sign of a broken run.", REWARDS)
        self._pending = Gauge(
            "polar_ray_pending_tokens",
            "Tokens that wait or are computed.",
            ("replica", "priority"),
            registry=self.registry,
        )

    def watch_pending(self, priority: str, read: Callable[[], int]) -> None:
        """Have `read` called for the pending tokens of a priority at every scrape."""
        self._pending.labels(self._replica, priority).set_function(read)

    def count_request(self, route: str, code: str, seconds: float) -> None:
        self._requests.labels(self._replica, route, code).inc()
        self._request_seconds.labels(self._replica, route).observe(seconds)

    def count_dropped(self) -> None:
        self._dropped.labels(self._replica).inc()

    def count_rows(self, scored: Sequence[Scored], queue_s: float) -> None:
        self._queue_seconds.labels(self._replica).observe(queue_s)
        rewards = self._rewards.labels(self._replica)
        for row in scored:
            self._rows.labels(self._replica, row.status).inc()
            if row.reward is not None:
                rewards.observe(row.reward)
        self._tokens.labels(self._replica).inc(sum(row.tokens for row in scored))
        self._cut.labels(self._replica).inc(sum(row.cut_tokens for row in scored))
        self._removed.labels(self._replica).inc(sum(row.removed_control_tokens for row in scored))

    def count_engine_call(self, computed_tokens: int, seconds: float) -> None:
        self._computed.labels(self._replica).inc(computed_tokens)
        self._engine_seconds.labels(self._replica).inc(seconds)
        self._batch_tokens.labels(self._replica).observe(computed_tokens)

    def collect(self) -> list[Metric]:
        """All families with their samples, as they stand; they pickle."""
        return list(self.registry.collect())
