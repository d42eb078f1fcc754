"""From settings to an engine: the only place that chooses, and where heavy libraries are first imported."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Protocol, cast

from polar_ray.config import OTHER_ENGINES, EngineConfig, endpoint_address
from polar_ray.encoding.tokenizer import PolarTokenizer
from polar_ray.engines.base import Engine
from polar_ray.engines.threads import in_passing_thread
from polar_ray.errors import CheckpointError, ConfigError, ReceiptMismatch
from polar_ray.stages import stage

MODULES: Mapping[str, str] = {
    "torch": "polar_ray.engines.torch.engine",
    "vllm": "polar_ray.engines.vllm",
    "sglang": "polar_ray.engines.sglang",
    "lmdeploy": "polar_ray.engines.lmdeploy",
    "serve": "polar_ray.engines.serve",
    "fake": "polar_ray.engines.fake",
}
"""Where each `engine.kind` lives: an `EngineModule`."""

DEFAULT_TOKEN_BUDGET = {"cpu": 4096, "cuda": 32768}
"""Computed tokens per call. On a CPU more gains nothing and falls out of the cache; a GPU needs tens of thousands to
fill its matrix units, and 32768 keeps the widest activations of POLAR-7B under 2 GB."""

OTHER_TOKEN_BUDGET = {"cpu": 16384, "cuda": 131072}
"""Of a call to an engine that batches by itself: several of its own batches, so that it never waits for us."""

HAVE_NO_WEIGHTS = ("fake", "serve")
"""Engines that load none; a running endpoint has passed the parity gate where it started."""


class EngineModule(Protocol):
    """What the module of an engine offers."""

    def start(self, folder: Path, engine: EngineConfig) -> Engine:
        """The engine that resolved settings name, loaded. Raises `CheckpointError`, `ConfigError`, `EngineStartError`
        or, of one that runs elsewhere, `EngineUnavailable`."""
        ...

    def engine_version(self, engine: EngineConfig) -> str:
        """What computes, with its version, for the receipt. May ask an engine that runs elsewhere."""
        ...


def engine_module(kind: str) -> EngineModule:
    return cast(EngineModule, importlib.import_module(MODULES[kind]))


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
    on_gpu = has_gpu or engine.is_elsewhere  # one that runs elsewhere is a GPU's unless the settings say otherwise
    device = engine.device if engine.device != "auto" else ("cuda" if on_gpu else "cpu")
    dtype = engine.dtype if engine.dtype != "auto" else (_checkpoint_dtype(folder) if device == "cuda" else "float32")
    if device == "cpu" and dtype == "float16":
        raise ConfigError("engine.dtype = 'float16': CPUs have no float16 matrix units; use bfloat16 or float32")
    if engine.quantization is not None:
        _refuse_quantization(engine, device)
    if engine.kind == "torch" and engine.tensor_parallel_size > 1:
        _refuse_uneven(engine, folder)
    others = engine.kind in OTHER_ENGINES
    budget = engine.token_budget or (OTHER_TOKEN_BUDGET if others else DEFAULT_TOKEN_BUDGET)[device]
    resolved = engine.model_copy(update={"device": device, "dtype": dtype, "token_budget": budget})
    return _with_length(resolved, folder, max_tokens) if others else resolved


def refuse_unsupported(engine: EngineConfig) -> None:
    """Raise `ConfigError` for what no machine would make possible."""
    if engine.tensor_parallel_size > 1 and engine.kind in HAVE_NO_WEIGHTS:
        raise ConfigError(
            f"engine.tensor_parallel_size = {engine.tensor_parallel_size}: engine {engine.kind!r} has no weights to "
            "divide; leave it at 1"
        )
    if engine.deterministic:
        _refuse_nondeterministic(engine)
    if engine.quantization is not None:
        _refuse_quantized(engine)
    if engine.kind == "lmdeploy" and not (engine.address or engine.python):
        raise ConfigError(
            "engine.kind = 'lmdeploy': runs as a server only; set engine.python to the interpreter that has lmdeploy, "
            "or engine.address to a server that runs"
        )


def build_engine(engine: EngineConfig, folder: Path) -> Engine:
    """The engine that resolved settings name, loaded, and held against the weights' own rewards.

    Raises what `EngineModule.start` raises, and `EngineStartError` if it does not pass the parity gate.
    """
    if engine.kind in HAVE_NO_WEIGHTS:
        return engine_module(engine.kind).start(folder, engine)
    from polar_ray.engines.parity import check_parity
    from polar_ray.model.checkpoint import Checkpoint

    start = partial(engine_module(engine.kind).start, folder, engine)
    # Others have threads of their own, or end with the one that has started them.
    computes_here = engine.kind == "torch" and engine.device == "cpu" and engine.tensor_parallel_size == 1
    size_mb = Checkpoint.open(folder).size_bytes / 1e6
    with stage(f"{_how(engine)} {engine.kind}, {size_mb:,.0f} MB of weights"):
        built = in_passing_thread(start) if computes_here else start()
    try:
        with stage(f"holding {engine.kind} to float32 of the weights"):
            check = partial(check_parity, built, engine, folder)
            in_passing_thread(check) if computes_here else check()
    except BaseException:
        built.close()
        raise
    return built


def describe_engine(engine: EngineConfig, folder: Path) -> dict[str, str]:
    """What of a reward's receipt is the engine's: `weights_digest`, `engine`, `engine_version`, `dtype`, `device` and
    `rope_base`, by field. A running endpoint's are its own.

    `tensor_parallel_size` is none of it: like `token_budget` and `threads` it moves a reward by rounding alone.

    The first to ask on a node reads all weights to hash them. Raises `CheckpointError` for weights that are incomplete.
    """
    if engine.kind == "serve":
        from polar_ray.engines.serve import describe_endpoint

        return describe_endpoint(engine.address)
    arguments = [f"{name}={value}" for name, value in sorted(engine.arguments.items())]
    mode = ["deterministic"] if engine.deterministic else []
    mode += [engine.quantization] if engine.quantization is not None else []
    return {
        "weights_digest": _weights_digest(engine, folder),
        "engine": engine.kind,
        "engine_version": ", ".join([engine_module(engine.kind).engine_version(engine), *mode, *arguments]),
        "dtype": engine.dtype,
        "device": engine.device,
        "rope_base": engine.rope_base,
    }


def _how(engine: EngineConfig) -> str:
    if engine.is_elsewhere:
        return "connecting to"
    return "starting a server of" if engine.python is not None else "loading"


def _refuse_quantized(engine: EngineConfig) -> None:
    name = f"engine.quantization = {engine.quantization!r}"
    if engine.kind in OTHER_ENGINES:
        raise ConfigError(f"{name}: is for engine.kind = 'torch'; give {engine.kind} its own by engine.arguments")
    if engine.kind != "torch":
        raise ConfigError(f"{name}: engine {engine.kind!r} computes nothing here; leave it out")
    if engine.deterministic:
        raise ConfigError(
            f"{name}: not with engine.deterministic, which is tried for float32 and bfloat16 products only"
        )
    if engine.tensor_parallel_size > 1:
        raise ConfigError(
            f"{name}: not with engine.tensor_parallel_size = {engine.tensor_parallel_size}; leave one out"
        )


def _refuse_quantization(engine: EngineConfig, device: str) -> None:
    device_of = {"int8": "cpu", "fp8": "cuda"}
    if engine.quantization is not None and device_of[engine.quantization] != device:
        other = next(name for name, its in device_of.items() if its == device)
        raise ConfigError(
            f"engine.quantization = {engine.quantization!r}: is for engine.device = "
            f"{device_of[engine.quantization]!r}; on {device!r} it is {other!r}"
        )


def _refuse_nondeterministic(engine: EngineConfig) -> None:
    if engine.kind not in ("torch", "vllm", "sglang"):
        instead = "set it where the endpoint is served" if engine.kind == "serve" else "set engine.kind = 'torch'"
        raise ConfigError(f"engine.deterministic: engine {engine.kind!r} has no such mode; {instead}, or leave it out")
    if engine.kind == "torch" and engine.tensor_parallel_size > 1:
        raise ConfigError(
            f"engine.deterministic: not with engine.tensor_parallel_size = {engine.tensor_parallel_size}, as sums over "
            "ranks are rounded otherwise; leave one of the two out"
        )


def _refuse_uneven(engine: EngineConfig, folder: Path) -> None:
    from polar_ray.engines.torch.shard import refuse_uneven
    from polar_ray.model.checkpoint import Checkpoint

    refuse_uneven(Checkpoint.open(folder).config, engine.tensor_parallel_size)


def _with_length(engine: EngineConfig, folder: Path, max_tokens: int | None) -> EngineConfig:
    """`engine` set up for the longest sequence that it will be asked for. Raises `ConfigError` if it has no such."""
    from polar_ray.model.checkpoint import Checkpoint
    from polar_ray.model.llama import refuse_longer

    longest = engine.max_tokens or max_tokens
    config = Checkpoint.open(folder).config
    if longest is None:
        return engine.model_copy(update={"max_tokens": config.max_position_embeddings})
    if max_tokens is not None and longest < max_tokens:
        raise ConfigError(
            f"engine.max_tokens = {longest}: triples of up to limits.max_tokens = {max_tokens} tokens would not fit; "
            "raise it, or lower the limit"
        )
    refuse_longer(config, longest, engine.kind)
    return engine.model_copy(update={"max_tokens": longest})


def _resolve_endpoint(engine: EngineConfig, folder: Path, max_tokens: int | None) -> EngineConfig:
    """What the endpoint has, pinned by its receipt; refused where the settings or the tokenizer say otherwise."""
    from polar_ray.engines.serve import DEFAULT_TOKEN_BUDGET as ENDPOINT_TOKEN_BUDGET
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
    """sha256 over the tensors that `engine` would load, from the node's cache; empty for one that loads none."""
    if engine.kind == "fake":
        return ""
    from polar_ray.model.cache import kept
    from polar_ray.model.checkpoint import Checkpoint, weights_digest

    def make(aside: Path) -> None:
        with stage("hashing the weights, once a node"):
            (aside / "sha256").write_text(weights_digest(folder))

    return (kept(Checkpoint.open(folder), "digest", "1", make) / "sha256").read_text()


def _checkpoint_dtype(folder: Path) -> str:
    from polar_ray.model.checkpoint import Checkpoint

    return str(Checkpoint.open(folder).dtype).removeprefix("torch.")
