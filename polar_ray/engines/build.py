"""From settings to an engine: the only place that chooses, and where heavy libraries are first imported."""

from __future__ import annotations

from pathlib import Path

from polar_ray.config import EngineConfig
from polar_ray.engines.base import Engine
from polar_ray.errors import ConfigError

DEFAULT_TOKEN_BUDGET = {"cpu": 4096, "cuda": 32768}
"""Computed tokens per call. On a CPU more gains nothing and falls out of the cache; a GPU needs tens of thousands to
fill its matrix units, and 32768 keeps the widest activations of POLAR-7B under 2 GB."""


def resolve_engine(engine: EngineConfig, folder: Path, *, has_gpu: bool) -> EngineConfig:
    """`engine` with every `auto` replaced by what it means here, so that it can go into a receipt.

    Raises `ConfigError` for combinations that no engine supports.
    """
    refuse_unsupported(engine)
    device = engine.device if engine.device != "auto" else ("cuda" if has_gpu else "cpu")
    dtype = engine.dtype if engine.dtype != "auto" else (_checkpoint_dtype(folder) if device == "cuda" else "float32")
    if device == "cpu" and dtype == "float16":
        raise ConfigError("engine.dtype = 'float16': CPUs have no float16 matrix units; use bfloat16 or float32")
    budget = engine.token_budget or DEFAULT_TOKEN_BUDGET[device]
    return engine.model_copy(update={"device": device, "dtype": dtype, "token_budget": budget})


def refuse_unsupported(engine: EngineConfig) -> None:
    """Raise `ConfigError` for what no machine would make possible."""
    if engine.tensor_parallel_size > 1:
        raise ConfigError(
            f"engine.tensor_parallel_size = {engine.tensor_parallel_size}: engine {engine.kind!r} runs on one device; "
            "leave it at 1 and use more actors"
        )


def build_engine(engine: EngineConfig, folder: Path) -> Engine:
    """The engine that resolved settings name, loaded. Raises `CheckpointError` or `EngineStartError`."""
    budget = engine.token_budget or DEFAULT_TOKEN_BUDGET["cpu"]
    if engine.kind == "fake":
        from polar_ray.engines.fake import FakeEngine

        return FakeEngine(token_budget=budget)
    from polar_ray.engines.torch.engine import TorchEngine

    return TorchEngine.load(
        folder,
        dtype=engine.dtype,
        device=engine.device,
        token_budget=budget,
        rope_base=engine.rope_base,
        threads=engine.threads,
    )


def weights_digest(engine: EngineConfig, folder: Path) -> str:
    """sha256 over the tensors that `engine` would load; empty for one that loads none."""
    if engine.kind == "fake":
        return ""
    from polar_ray.model.checkpoint import weights_digest as digest

    return digest(folder)


def _checkpoint_dtype(folder: Path) -> str:
    from polar_ray.model.checkpoint import Checkpoint

    return str(Checkpoint.open(folder).dtype).removeprefix("torch.")
