"""Metrics on Ray's own agents, where its Prometheus service discovery finds them.

Every sample becomes a gauge of Ray's, whatever its kind: Ray's histograms take no bound below zero, where rewards are,
and would want each reward by itself. Prometheus' functions do not look at the kind. Ray puts `ray_` before each name;
the scrape configuration in `cluster/observability` takes it away again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from prometheus_client.metrics_core import Metric
from ray.util.metrics import Gauge

PERIOD_S = 2.0
"""Ray's agents forget a gauge that was not set for some 20 s, and workers tell them every 10 s."""


class RayExport:
    """Sets Ray's gauges to what `collect` gives, whenever `flush` is called."""

    def __init__(self, collect: Callable[[], Sequence[Metric]]) -> None:
        self._collect = collect
        self._gauges: dict[str, Gauge] = {}

    def flush(self) -> None:
        for family in self._collect():
            for sample in family.samples:
                if not sample.name.endswith("_created"):  # prometheus_client's own, of no use to any query here
                    self._gauge(sample.name, family.documentation, sample.labels).set(sample.value, sample.labels)

    def _gauge(self, name: str, text: str, labels: dict[str, str]) -> Gauge:
        if name not in self._gauges:
            self._gauges[name] = Gauge(name, text, tag_keys=tuple(labels))
        return self._gauges[name]


def keep_exporting(collect: Callable[[], Sequence[Metric]]) -> Callable[[], None]:
    """Keep what `collect` gives on this node's agent, until the function that this gives is called.

    `collect` is called in a thread of its own.
    """
    export, is_over = RayExport(collect), threading.Event()

    def keep() -> None:
        while not is_over.wait(PERIOD_S):
            export.flush()
        export.flush()

    def stop() -> None:
        is_over.set()
        thread.join()

    thread = threading.Thread(target=keep, name="polar-ray-metrics", daemon=True)
    thread.start()
    return stop


@contextmanager
def exported(collect: Callable[[], Sequence[Metric]]) -> Iterator[None]:
    """`keep_exporting` for the time being; what there is at the end goes out as well."""
    stop = keep_exporting(collect)
    try:
        yield
    finally:
        stop()
