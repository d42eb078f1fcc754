"""From settings to a Serve application: `serve run polar_ray.serving.app:build model=internlm/POLAR-7B replicas=2`.

Ray validates none of this: a misspelt key in a Serve config file's `args` would pass, so `build` checks them all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray
from ray import serve
from ray.serve import Application

from polar_ray.cluster import has_gpu
from polar_ray.config import ServeConfig, config_from_arguments
from polar_ray.encoding.tokenizer import PolarTokenizer
from polar_ray.engines.build import DEFAULT_TOKEN_BUDGET, refuse_unsupported, resolve_engine
from polar_ray.errors import ConfigError
from polar_ray.model.locate import locate_model
from polar_ray.serving.auth import Gate
from polar_ray.serving.autoscaling import PendingTokensPolicy
from polar_ray.serving.replica import ScoringReplica
from polar_ray.serving.service import Model

DEPLOYMENT = "ScoringReplica"

MAX_ONGOING_REQUESTS = 1024
"""Of one replica. Waiting costs nothing there, and admission counts tokens; Serve's own bound is a backstop."""

CPUS_PER_ENGINE = 8.0
"""Threads that one CPU engine makes good use of."""

TARGET_ENGINE_CALLS = 8
"""Engine calls' worth of tokens per replica that call for no change, where the settings do not say."""

CONSTRUCTOR_RETRIES = 3
"""A checkpoint that does not load will not load the twentieth time either."""


def build(args: dict[str, Any]) -> Application:
    """The application for `serve run` and `serve deploy`. Raises `ConfigError` or `CheckpointError`."""
    if "http" in args or any(key.startswith("http.") for key in args):
        raise ConfigError("args: http is for polar-ray serve; a Serve config file has http_options for that")
    return build_application(config_from_arguments(ServeConfig, args))


def build_application(config: ServeConfig, load_model: Callable[[ServeConfig], Model] = Model.load) -> Application:
    """The application that `config` describes, everything checked that can be before a replica starts.

    Each replica calls `load_model` once; another one puts an engine of one's own behind the endpoint.
    """
    refuse_unsupported(config.engine)
    folder = locate_model(config.model, config.revision)
    PolarTokenizer(folder)
    config = _resolve(config)
    on_gpu = config.engine.device == "cuda"
    resolve_engine(config.engine, folder, has_gpu=on_gpu, max_tokens=config.limits.max_tokens)  # for what it refuses
    fewest, most = config.replica_range
    options: dict[str, Any] = {"num_replicas": fewest} if fewest == most else {"autoscaling_config": _scaling(config)}
    deployment = serve.deployment(
        ScoringReplica,
        name=DEPLOYMENT,
        ray_actor_options=_resources(config),
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        max_queued_requests=MAX_ONGOING_REQUESTS,
        backpressure_config={"status_code": 429, "retry_after_s": 1},
        graceful_shutdown_timeout_s=config.drain_timeout_s,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=5,
        health_check_timeout_s=30,
        max_constructor_retry_count=CONSTRUCTOR_RETRIES,
        **options,
    )
    return deployment.bind(config, load_model)


def _resolve(config: ServeConfig) -> ServeConfig:
    """Settings that mean the same in a replica's process."""
    engine, auth = config.engine, config.auth
    if engine.device == "auto":
        if not ray.is_initialized():
            raise ConfigError("engine.device = 'auto': not connected to a cluster to look at; set cpu or cuda")
        engine = engine.model_copy(update={"device": "cuda" if has_gpu() else "cpu"})
    if engine.threads is None:
        cpus = _resources(config.model_copy(update={"engine": engine}))["num_cpus"]
        engine = engine.model_copy(update={"threads": max(1, int(cpus))})
    if auth.mode == "auto" and not Gate(auth).is_open:
        # A replica on a node where the tokens are missing must not come up open.
        auth = auth.model_copy(update={"mode": "required"})
    return config.model_copy(update={"engine": engine, "auth": auth})


def _resources(config: ServeConfig) -> dict[str, float]:
    on_gpu = config.engine.device == "cuda"
    cpus = config.replica_cpus or config.engine.threads or (1.0 if on_gpu else _default_cpus(config))
    return {"num_cpus": cpus, "num_gpus": config.engine.tensor_parallel_size if on_gpu else 0}


def _default_cpus(config: ServeConfig) -> float:
    """As many as an engine makes good use of, and no more than lets all replicas fit into the cluster as it is."""
    nodes = (
        [float(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        if ray.is_initialized()
        else []
    )
    share = sum(nodes) / config.replica_range[1]
    return max(0.1, min(CPUS_PER_ENGINE, share, max(nodes))) if nodes else 1.0


def _scaling(config: ServeConfig) -> dict[str, Any]:
    fewest, most = config.replica_range
    scaling = config.autoscaling
    budget = config.engine.token_budget or DEFAULT_TOKEN_BUDGET["cuda" if config.engine.device == "cuda" else "cpu"]
    target = scaling.target_pending_tokens or TARGET_ENGINE_CALLS * budget
    return {
        "min_replicas": fewest,
        "max_replicas": most,
        "upscale_delay_s": scaling.upscale_delay_s,
        "downscale_delay_s": scaling.downscale_delay_s,
        "look_back_period_s": scaling.look_back_period_s,
        "metrics_interval_s": scaling.interval_s,
        "policy": {
            "policy_function": f"{PendingTokensPolicy.__module__}:{PendingTokensPolicy.__name__}",
            "policy_kwargs": {"target_pending_tokens": target},
        },
    }
