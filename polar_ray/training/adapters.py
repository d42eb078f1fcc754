"""LoRA through peft: adapters into a model, and their product merged into the weights that are written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from polar_ray.config.training import LoraConfig
from polar_ray.errors import ConfigError
from polar_ray.model.polar import PolarForReward


def add_adapters(model: PolarForReward, config: LoraConfig) -> None:
    """Adapters in place; they and the value head are trained, nothing else is.

    Raises `ConfigError` for targets that the model does not have, or when peft is not installed.
    """
    try:
        import peft
    except ImportError:
        raise ConfigError("lora.rank: adapters need peft; install polar_ray[train]") from None
    settings = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=list(config.targets))
    try:
        peft.inject_adapter_in_model(settings, model.model)
    except ValueError as error:
        raise ConfigError(f"lora.targets = {list(config.targets)}: {error}") from None
    model.v_head.weight.requires_grad_(True)
    for name, weight in model.named_parameters():
        if "lora_" not in name and not name.startswith("v_head"):
            weight.requires_grad_(False)


@torch.no_grad()
def merged(layer: str, weights: Mapping[str, Tensor], scale: float) -> Tensor:
    """An adapted layer's weight with its adapter's product added, in float32; from `weights` by peft's names."""
    down, up = (weights[f"{layer}.lora_{part}.default.weight"].float() for part in "AB")
    return weights[f"{layer}.base_layer.weight"].float() + scale * (up @ down)


def scalings(model: PolarForReward) -> dict[str, float]:
    """What each adapted layer's product counts, by the layer's name."""
    found: dict[str, float] = {}
    for name, module in model.named_modules():
        values: Any = getattr(module, "scaling", None)
        if isinstance(values, dict):
            found[name] = float(values["default"])
    return found
