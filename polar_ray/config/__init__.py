"""All settings of polar_ray: frozen pydantic models, TOML in, JSON out.

Values come from, later wins: defaults, a TOML file, `--set section.key=value` (flags are short forms of it). Nothing
else; the environment is read for addresses and secrets only. The docstring under a field is its help text everywhere.
"""

from polar_ray.config.base import EMBEDDED_MODEL, CutSide, Device, Dtype, Quantization, RopeBase, Settings
from polar_ray.config.environment import (
    endpoint_address,
    endpoint_token,
    engine_token,
    ray_address,
    tokens_from_environment,
)
from polar_ray.config.evaluation import EvaluateColumnsConfig, EvaluateConfig, Layout
from polar_ray.config.pairs import PairColumnsConfig
from polar_ray.config.reading import config_from_arguments, load_config, validate
from polar_ray.config.scoring import OTHER_ENGINES, ColumnsConfig, EngineConfig, LimitsConfig, ScoreConfig
from polar_ray.config.serving import (
    AuthConfig,
    AutoscalingConfig,
    HttpConfig,
    QueueConfig,
    RequestConfig,
    ServeConfig,
)
from polar_ray.config.training import LoraConfig, LossConfig, OptimizerConfig, TrainConfig

__all__ = [
    "EMBEDDED_MODEL",
    "OTHER_ENGINES",
    "AuthConfig",
    "AutoscalingConfig",
    "ColumnsConfig",
    "CutSide",
    "Device",
    "Dtype",
    "EngineConfig",
    "EvaluateColumnsConfig",
    "EvaluateConfig",
    "HttpConfig",
    "Layout",
    "LimitsConfig",
    "LoraConfig",
    "LossConfig",
    "OptimizerConfig",
    "PairColumnsConfig",
    "Quantization",
    "QueueConfig",
    "RequestConfig",
    "RopeBase",
    "ScoreConfig",
    "ServeConfig",
    "Settings",
    "TrainConfig",
    "config_from_arguments",
    "endpoint_address",
    "endpoint_token",
    "engine_token",
    "load_config",
    "ray_address",
    "tokens_from_environment",
    "validate",
]
