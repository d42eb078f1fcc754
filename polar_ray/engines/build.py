"""From settings to an engine: the only place that chooses, and where heavy libraries are first imported."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from polar_ray.config import EngineConfig, endpoint_address
from polar_ray.encoding.tokenizer import PolarTokenizer
from polar_ray.engines.base import Engine
from polar_ray.errors import CheckpointError, ConfigError, ReceiptMismatch

DEFAULT_TOKEN_BUDGET = {"cpu": 4096, "cuda": 32768}
"""Computed tokens per call. On a CPU more gains nothing and falls out of the cache; a GPU needs tens of thousands to
fill its matrix units, and 32768 keeps the widest activations of POLAR-7B under 2 GB."""

ENDPOINT_TOKEN_BUDGET = 262144
"""Of a call to a running endpoint: enough requests to keep `max_in_flight` of them under way."""


def resolve_engine(engine: EngineConfig, folder: Path, *, has_gpu: bool, max_tokens: int | None = None) -> EngineConfig:
    """`engine` with every `auto` replaced by what it means here, so that it can go into a receipt.

    `max_tokens` is the longest sequence that it will be asked for.

    Raises `ConfigError` for combinations that no engine supports; for a running endpoint also for one that takes no
    such sequences, `CheckpointError` where its tokenizer is not `folder`'s, `ReceiptMismatch` where it is not the
    expected one, and `EngineUnavailable`.
    """
    refuse_unsupported(engine)
    if engine.kind == "serve":
        return _resolve_endpoint(engine, folder, max_tokens)
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
    if engine.kind == "serve":
        from polar_ray.engines.serve import ServeEngine

        return ServeEngine.connect(
            engine.address,
            max_in_flight=engine.max_in_flight,
            token_budget=budget,
            expect_receipt=engine.expect_receipt,
        )
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


def describe_engine(engine: EngineConfig, folder: Path) -> dict[str, str]:
    """What of a reward's receipt is the engine's: `weights_digest`, `engine`, `engine_version`, `dtype`, `device` and
    `rope_base`, by field. A running endpoint's are its own.

    Reads all weights once to hash them. Raises `CheckpointError` for weights that are incomplete.
    """
    if engine.kind == "serve":
        from polar_ray.engines.serve import describe_endpoint

        return describe_endpoint(engine.address)
    return {
        "weights_digest": _weights_digest(engine, folder),
        "engine": engine.kind,
        "engine_version": _engine_version(engine),
        "dtype": engine.dtype,
        "device": engine.device,
        "rope_base": engine.rope_base,
    }


def _resolve_endpoint(engine: EngineConfig, folder: Path, max_tokens: int | None) -> EngineConfig:
    """What the endpoint has, pinned by its receipt; refused where the settings or the tokenizer say otherwise."""
    from polar_ray.engines.serve import ask_model

    found = ask_model(engine.address)
    if found.receipt["tokenizer_digest"] != PolarTokenizer(folder).digest:
        raise CheckpointError(
            "the endpoint's tokenizer is not this model's; name the model that is served there, for its tokenizer"
        )
    for name in ("dtype", "device", "rope_base"):
        if getattr(engine, name) not in ("auto", found.receipt[name]):
            raise ConfigError(
                f"engine.{name} = {getattr(engine, name)!r}: the endpoint has {found.receipt[name]!r}; set that, or "
                "another endpoint"
            )
    if max_tokens is not None and max_tokens > found.limits.max_tokens:
        raise ConfigError(
            f"limits.max_tokens = {max_tokens}: the endpoint takes {found.limits.max_tokens} at most; set that "
            "here, or more there"
        )
    if engine.expect_receipt not in (None, found.receipt_id):
        raise ReceiptMismatch(f"expected an endpoint of receipt {engine.expect_receipt}, found {found.receipt_id}")
    return engine.model_copy(
        update={
            **{name: found.receipt[name] for name in ("dtype", "device", "rope_base")},
            "token_budget": engine.token_budget or ENDPOINT_TOKEN_BUDGET,
            "threads": engine.threads or 1,
            "address": engine.address or endpoint_address(),
            "expect_receipt": found.receipt_id,
        }
    )


def _weights_digest(engine: EngineConfig, folder: Path) -> str:
    """sha256 over the tensors that `engine` would load; empty for one that loads none."""
    if engine.kind == "fake":
        return ""
    from polar_ray.model.checkpoint import weights_digest

    return weights_digest(folder)


def _engine_version(engine: EngineConfig) -> str:
    ours = f"polar_ray {version('polar_ray')}"
    return f"{ours}, torch {version('torch')}" if engine.kind == "torch" else ours


def _checkpoint_dtype(folder: Path) -> str:
    from polar_ray.model.checkpoint import Checkpoint

    return str(Checkpoint.open(folder).dtype).removeprefix("torch.")
