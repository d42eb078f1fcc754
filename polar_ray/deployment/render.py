"""Manifests for KubeRay from one base and settings: `polar-ray cluster render`.

The templates are in `templates/`, `ray_cluster.yaml` being the base. They are text, not merged mappings, so that what
is rendered keeps the comments that say why; every value goes in as JSON, which is YAML that means nothing else.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from importlib.resources import files
from typing import Any, Literal

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from polar_ray.config import ScoreConfig, ServeConfig, TrainConfig, validate
from polar_ray.deployment.settings import (
    DeploymentConfig,
    JobDeploymentConfig,
    ScoreDeploymentConfig,
    ServeDeploymentConfig,
    TrainDeploymentConfig,
)
from polar_ray.errors import ConfigError

Kind = Literal["serve", "score", "train"]

SETTINGS: dict[Kind, type[DeploymentConfig]] = {
    "serve": ServeDeploymentConfig,
    "score": ScoreDeploymentConfig,
    "train": TrainDeploymentConfig,
}

TOKENS_FOLDER = "/etc/polar_ray"
"""Where the secret with callers' tokens is mounted."""

HEAD_SHARED_MEMORY_GIB = 2
"""Only numbers and reports pass through the head's object store."""

OBJECT_STORE_SHARE = 0.75
"""Of /dev/shm; the rest is for ranks of one engine."""

GIB = 1 << 30


def render(config: DeploymentConfig) -> str:
    """The manifests of a deployment, as YAML documents.

    Raises `ConfigError` for settings of the endpoint or the job that polar_ray itself would refuse, and for engines
    that no node of the cluster could ever hold.
    """
    values: dict[str, Any] = {
        **dict(config),
        "kind": kind_of(config),
        "head_shared_memory_gib": HEAD_SHARED_MEMORY_GIB,
        "head_object_store_bytes": int(HEAD_SHARED_MEMORY_GIB * GIB * OBJECT_STORE_SHARE),
        "worker_object_store_bytes": int(config.workers.shared_memory_gib * GIB * OBJECT_STORE_SHARE),
    }
    environment = Environment(
        loader=PackageLoader("polar_ray.deployment"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    if isinstance(config, ServeDeploymentConfig):
        values |= {"serve_config": serve_config(config), "tokens_folder": TOKENS_FOLDER}
        text = environment.get_template("serve.yaml").render(values)
    else:
        assert isinstance(config, JobDeploymentConfig)
        text = environment.get_template("job.yaml").render(values, entrypoint=entrypoint(config))
    lines = [line.rstrip() for line in text.splitlines()]
    return "\n".join(line for line in lines if line) + "\n"


def kind_of(config: DeploymentConfig) -> Kind:
    """Which deployment `config` describes."""
    return next(kind for kind, settings in SETTINGS.items() if isinstance(config, settings))


def serve_config(config: ServeDeploymentConfig) -> str:
    """The Serve config file, as KubeRay hands it to Ray: cluster/serve/polar.yaml with `config.serve` over its args."""
    text = files("polar_ray.deployment").joinpath("templates", "serve_config.yaml").read_text("utf-8")
    content = yaml.safe_load(text)
    (application,) = content["applications"]
    tokens = {"auth": {"tokens_file": f"{TOKENS_FOLDER}/tokens"}}
    application["args"] = _merged(_merged(application["args"], tokens), config.serve)
    settings = validate(ServeConfig, application["args"], source="serve")
    if settings.auth.mode == "none":
        raise ConfigError("serve.auth.mode = 'none': an endpoint on a cluster wants tokens; leave it at required")
    gpus = settings.engine.gpus
    cpus = settings.replica_cpus or settings.engine.threads or 1
    _refuse_what_never_fits(config, "serve", settings.replica_range[1], gpus, cpus)
    return str(yaml.safe_dump(content, sort_keys=False))


def entrypoint(config: JobDeploymentConfig) -> str:
    """The shell command that runs on the head: `polar-ray score` or `polar-ray train`."""
    settings = config.settings
    words = ["polar-ray", kind_of(config), *config.inputs, "--output", config.output]
    words += ["--config", config.config] if config.config else []
    if isinstance(config, ScoreDeploymentConfig):
        score = validate(ScoreConfig, settings, source="settings")
        if "actors" not in settings:
            settings = {**settings, "actors": _actors(config, score)}
    else:
        workers = validate(TrainConfig, settings, source="settings").workers
        if "workers" not in settings:
            workers = config.workers.most * max(1, config.workers.gpus)
            settings = {**settings, "workers": workers}
        _refuse_what_never_fits(config, "settings", workers, min(1, config.workers.gpus), 1)
    for key, value in _flattened(settings):
        words += ["--set", f"{key}={value if isinstance(value, str) else json.dumps(value)}"]
    return shlex.join(words)


def _actors(config: JobDeploymentConfig, score: ScoreConfig) -> str:
    """One for each set of GPUs that a node has, or one a node without GPUs, as nodes come and go."""
    fewest, most = config.workers.fewest, config.workers.most
    per_node = max(1, config.workers.gpus // score.engine.tensor_parallel_size)
    gpus = score.engine.tensor_parallel_size if config.workers.gpus else 0
    _refuse_what_never_fits(config, "settings", 1, gpus, score.engine.threads or 1)
    return f"{max(1, fewest * per_node)}:{most * per_node}"


def _refuse_what_never_fits(config: DeploymentConfig, section: str, engines: int, gpus: int, cpus: float) -> None:
    """Raise `ConfigError` where Kubernetes would be waited for in vain."""
    workers = config.workers
    if gpus > workers.gpus:
        raise ConfigError(
            f"{section}: one engine asks for {gpus} GPUs and workers.gpus = {workers.gpus}; raise that, or lower "
            "engine.tensor_parallel_size, or set engine.device = cpu"
        )
    if cpus > workers.cpus:
        raise ConfigError(f"{section}: one engine asks for {cpus:g} CPUs and workers.cpus = {workers.cpus}; raise that")
    by_gpus = workers.gpus // gpus if gpus else engines
    room = workers.most * min(by_gpus, int(workers.cpus // cpus))
    if engines > room:
        raise ConfigError(
            f"{section}: {engines} engines were asked for and {workers.most} nodes hold {room}; raise workers.spot or "
            "workers.steady, or ask for fewer"
        )


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`, section by section."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _flattened(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted key and value of every setting."""
    return [
        pair
        for key, value in settings.items()
        for pair in (
            _flattened(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
        )
    ]
