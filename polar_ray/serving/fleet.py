"""One `/metrics` for all replicas: each pins its families to a board, and whoever is asked reads the whole board.

A scrape through the proxy reaches a replica by chance; without the board its counters would jump from one replica's
to another's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import ray
from prometheus_client.metrics_core import Metric

PIN_PERIOD_S = 1.0

STALE_S = 15.0
"""A replica that has not pinned anything for so long is gone, and its series with it."""


class MetricsBoard:
    """The latest families of every replica. A Ray actor of its own, one for each application."""

    def __init__(self) -> None:
        self._pinned: dict[str, tuple[float, Sequence[Metric]]] = {}

    def pin(self, replica: str, families: Sequence[Metric]) -> None:
        self._pinned[replica] = (time.monotonic(), families)

    def read(self) -> list[Metric]:
        """One family for each name, with the samples of all replicas that are alive."""
        fresh = time.monotonic() - STALE_S
        self._pinned = {name: pinned for name, pinned in self._pinned.items() if pinned[0] >= fresh}
        merged: dict[str, Metric] = {}
        for _, families in self._pinned.values():
            for family in families:
                if family.name not in merged:
                    merged[family.name] = Metric(family.name, family.documentation, family.type, family.unit)
                merged[family.name].samples += family.samples
        return list(merged.values())


class FleetMetrics:
    """A replica's side of the board. Metrics are never the reason that a replica fails: a lost board is made anew.

    The board lives as long as the replica that made it, which holds on to it: Ray stops an actor that nobody refers to.
    """

    def __init__(self, application: str, replica: str, collect: Callable[[], Sequence[Metric]]) -> None:
        self._name = f"polar_ray_metrics:{application}"
        self._replica = replica
        self._collect = collect
        self._board: ray.actor.ActorHandle | None = None
        self._pinning = asyncio.get_running_loop().create_task(self._keep_pinning())

    async def collect(self) -> Sequence[Metric]:
        """All replicas' families; this one's alone while there is no board."""
        try:
            board = await self._pin()
            families: Sequence[Metric] = await board.read.remote()
        except ray.exceptions.RayError:
            return self._collect()
        return families

    async def _keep_pinning(self) -> None:
        while True:
            with suppress(ray.exceptions.RayError):  # the next round finds or makes another board
                await self._pin()
            await asyncio.sleep(PIN_PERIOD_S)

    async def _pin(self) -> ray.actor.ActorHandle:
        """The board, with this replica's families on it."""
        if self._board is None:
            self._board = self._find_or_make_board()
        board = self._board
        try:
            await board.pin.remote(self._replica, self._collect())
        except ray.exceptions.RayError:
            self._board = None
            raise
        return board

    def _find_or_make_board(self) -> ray.actor.ActorHandle:
        board = ray.remote(MetricsBoard)
        return board.options(name=self._name, namespace="serve", get_if_exists=True, num_cpus=0).remote()
