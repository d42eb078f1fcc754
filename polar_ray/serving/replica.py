"""What Ray Serve runs: one replica with ingress, batcher and engine in one process.

One deployment and not three: each hop between deployments costs a Ray call per request (2 to 4 times the latency).
"""

from __future__ import annotations

from collections.abc import Callable

from fastapi import FastAPI
from ray import serve

from polar_ray.config import ServeConfig
from polar_ray.ray_export import keep_exporting
from polar_ray.serving.api import build_api
from polar_ray.serving.autoscaling import PENDING_TOKENS
from polar_ray.serving.fleet import FleetMetrics
from polar_ray.serving.service import Model, RewardService, freeze_heap
from polar_ray.serving.starting import telling
from polar_ray.wire import ModelReply


@serve.ingress()
class ScoringReplica:
    """Loads the model, then answers. Serve asks `check_health` and replaces a replica that raises."""

    def __init__(self, config: ServeConfig, load_model: Callable[[ServeConfig], Model] = Model.load) -> None:
        """Runs in the event loop that requests will run in, of which there are none yet."""
        context = serve.get_replica_context()
        with telling(context.app_name):
            model = load_model(config)
        replica = context.replica_id.unique_id
        self._service = RewardService(model, config, replica=replica)
        self._fleet = FleetMetrics(context.app_name, replica, self._service.metrics.collect)
        self._exporting = keep_exporting(self._service.metrics.collect)
        freeze_heap()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self._service, self._fleet.collect)

    async def describe(self) -> ModelReply:
        """The model, its receipt and its limits."""
        return self._service.describe()

    async def check_health(self) -> None:
        self._service.check_health()

    def record_autoscaling_stats(self) -> dict[str, float]:
        return {PENDING_TOKENS: float(self._service.pending_tokens)}
