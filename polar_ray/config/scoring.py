"""Settings of a corpus job, and of what it shares with an endpoint: limits, engine, columns."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from polar_ray.config.base import (
    EMBEDDED_MODEL,
    CutSide,
    Device,
    Dtype,
    Quantization,
    RopeBase,
    Settings,
    check_range,
    parse_range,
)
from polar_ray.config.columns import RowColumnsConfig

EngineKind = Literal["torch", "vllm", "sglang", "lmdeploy", "serve", "fake"]

OTHER_ENGINES = ("vllm", "sglang", "lmdeploy")
"""Engines of other projects: they batch and share prefixes by themselves."""


class LimitsConfig(Settings):
    """How long a triple may be, and what happens to one that is longer or empty."""

    max_tokens: int = Field(16384, ge=8)
    """Longest encoded triple. The prompt, which appears twice, gets half of what reference and output leave."""

    max_response_tokens: int = Field(4096, ge=1)
    """Longest reference and longest output, each; counted with the beginning-of-sequence token, as upstream does."""

    cut_side: CutSide = "right"
    """Which end of an over-long reference or output is lost: `right` as in training and in the POLAR repository's
    client, `left` as in xtuner 0.2's client. An over-long prompt always keeps its end."""

    on_too_long: Literal["cut", "error"] = "cut"
    """`cut` shortens and reports the tokens cut on the row; `error` gives the row no reward."""

    on_empty: Literal["error", "score"] = "error"
    """`error` gives a row with an empty prompt, reference or output no reward; `score` computes it as upstream does."""


class EngineConfig(Settings):
    """What turns token ids into rewards."""

    kind: EngineKind = "torch"
    """`torch`: our own engine. `vllm`, `sglang`, `lmdeploy`: theirs, in the actor's own process, as a server beside it
    (`python`) or as one that runs already (`address`). `serve`: a running endpoint of ours, asked in bulk. `fake`: a
    hash of the ids, for dry runs and tests of everything around the model."""

    dtype: Dtype = "auto"
    """Arithmetic of the model. `auto`: float32 on a CPU, the checkpoint's own dtype on a GPU."""

    device: Device = "auto"
    """`auto`: GPUs if the cluster has any, else CPUs."""

    token_budget: int | None = Field(None, ge=1)
    """Computed tokens per engine call. Left out: 4096 on a CPU, 32768 on a GPU. More needs more memory."""

    share_prefixes: bool = True
    """Compute what rows have in common once."""

    rope_base: RopeBase = "hf"
    """`hf`: the rotary base as trained. `sglang-static` exists to reproduce the rewards on POLAR's model card."""

    deterministic: bool = False
    """Give a triple the same bits alone, in any batch, in any order, shared or not, in a job and from an endpoint: on
    the same kind of device, with the same versions. Of `torch` without tensor parallelism, on CPUs and GPUs; of `vllm`
    and `sglang` their own modes, on GPUs only, which promise what they promise."""

    quantization: Quantization | None = None
    """Of `torch`: weights and activations of the linear layers rounded to 8 bits, each row by its own scale, as it
    comes. `int8` on CPUs, `fp8` (e4m3) on GPUs of compute capability 8.9 or more. Faster, and less exact: what it costs
    is measured at the start, and by polar-ray verify. Other engines have theirs in `arguments`."""

    tensor_parallel_size: int = Field(1, ge=1)
    """GPUs of one engine, each with a part of every layer: for models that one GPU does not hold, or not fast enough.
    Without GPUs `torch` runs as many processes that share `threads`. It must divide the model's num_key_value_heads and
    intermediate_size, and moves rewards by rounding alone."""

    max_tokens: int | None = Field(None, ge=1)
    """Of `vllm`, `sglang` and `lmdeploy`: the longest sequence they are set up for. Left out: limits.max_tokens."""

    threads: int | None = Field(None, ge=1)
    """CPU threads of one engine. Left out: the CPUs its actor was given."""

    address: str | None = None
    """Of `serve`: the endpoint, as host:port or a URL. Left out: POLAR_RAY_ADDRESS. A token comes from POLAR_RAY_TOKEN,
    which must be set where actors run. Of `vllm`, `sglang` and `lmdeploy`: a server of theirs that runs already; its
    token comes from POLAR_RAY_ENGINE_TOKEN."""

    python: str | None = None
    """Of `vllm`, `sglang` and `lmdeploy`: the Python interpreter that has the engine installed. Each actor then starts
    a server with it, on the loopback of its node, and ends it. Left out, and without `address`: the engine runs in the
    actor's process, whose environment must have it."""

    arguments: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Of `vllm`, `sglang` and `lmdeploy`: more of the engine's own arguments, by its names for them in Python
    (`gpu_memory_utilization = 0.8`). They are part of the receipt. Of `fake`: `tokens_per_s`, the speed of the engine
    that it stands in for, by sleeping."""

    start_timeout_s: float = Field(900, gt=0)
    """Of a server or ranks of the actor's own: how long they may take to load the model and answer."""

    parity_tolerance: float | None = Field(None, ge=0)
    """How far an engine may be from float32 on the parity panel at its start: root mean square over the spread of the
    panel's rewards. Left out: what rounding in `dtype` explains. Raise it for a quantisation that is meant."""

    expect_receipt: str | None = None
    """Of `serve`: the endpoint's `receipt_id`; another is refused. Left out: the one it has when the job begins."""

    max_in_flight: int = Field(4, ge=1)
    """Of `serve`: requests of one actor that are under way at a time."""

    @model_validator(mode="after")
    def _fields_are_of_this_kind(self) -> Self:
        others = self.kind in OTHER_ENGINES
        if self.expect_receipt is not None and self.kind != "serve":
            raise ValueError("engine.expect_receipt is for engine.kind = serve")
        if self.address is not None and not (others or self.kind == "serve"):
            raise ValueError(f"engine.address is for engine.kind = serve, {', '.join(OTHER_ENGINES)}")
        if self.kind == "fake" and self.arguments:
            self._stands_in_for_a_speed()
        for name in ("python", "max_tokens", *(() if self.kind == "fake" else ("arguments",))):
            if getattr(self, name) and not others:
                raise ValueError(f"engine.{name} is for engine.kind = {', '.join(OTHER_ENGINES)}")
        if self.address is not None and (self.python or self.arguments):
            raise ValueError(
                "engine.address: names a server that runs already; engine.python and engine.arguments are for one that "
                "is started, so leave them out, or the address"
            )
        if self.address is not None and "@" in self.address:
            token = "POLAR_RAY_ENGINE_TOKEN" if others else "POLAR_RAY_TOKEN"
            raise ValueError(f"engine.address: has a name or a token in it; put the token into {token}")
        return self

    def _stands_in_for_a_speed(self) -> None:
        unknown = sorted(set(self.arguments) - {"tokens_per_s"})
        speed = self.arguments.get("tokens_per_s")
        if unknown:
            raise ValueError(f"engine.arguments.{unknown[0]}: engine.kind = fake has tokens_per_s and no other")
        if not isinstance(speed, int | float) or isinstance(speed, bool) or not 0 < speed < math.inf:
            raise ValueError(f"engine.arguments.tokens_per_s: expected a positive number, found {speed!r}")

    @property
    def is_elsewhere(self) -> bool:
        """Whether the engine runs already, with processors of its own."""
        return self.kind == "serve" or self.address is not None

    @property
    def gpus(self) -> int:
        """GPUs that an engine needs where its actor runs."""
        return self.tensor_parallel_size if self.device == "cuda" and not self.is_elsewhere else 0


class ColumnsConfig(RowColumnsConfig):
    """Which input columns are the fields of a triple, and what the output columns are called."""

    output: str = "output"
    """Column of the output to score."""

    reward: str = "reward"
    """Column of the reward; `_status`, `_detail`, `_tokens` and `_cut_tokens` are appended for the other four."""

    @property
    def fields(self) -> dict[str, str]:
        """Field of a triple to its column."""
        return {"prompt": self.prompt, "reference": self.reference, "output": self.output}

    @property
    def written(self) -> tuple[str, ...]:
        """The columns a job adds, in order."""
        return (self.reward, *(f"{self.reward}_{part}" for part in ("status", "detail", "tokens", "cut_tokens")))

    @property
    def columns(self) -> list[str]:
        """As elsewhere, and the columns that a job adds."""
        return [*super().columns, *self.written[1:]]


class ScoreConfig(Settings):
    """One corpus job: everything but its inputs and its output folder."""

    model: str = EMBEDDED_MODEL
    """Folder of an InternLM2-layout checkpoint, or its name on the Hugging Face hub. `embedded`: the small one that
    ships with polar_ray."""

    revision: str | None = None
    """Commit of a hub model. Pin it for work that must be repeatable."""

    engine: EngineConfig = EngineConfig()
    limits: LimitsConfig = LimitsConfig()
    columns: ColumnsConfig = ColumnsConfig()

    actors: int | str = "auto"
    """Engines working in parallel: a number, or `MIN:MAX` to grow with the cluster. `auto`: one per GPU set, on CPUs
    one per eight cores, and one to ask a running endpoint."""

    unit_rows: int = Field(4096, ge=1)
    """Rows of one unit, the atom of progress: what a crash repeats, and the rows of one output file at most. A job that
    is resumed keeps the units it was made with."""

    max_failed_fraction: float = Field(0.05, ge=0, le=1)
    """The job fails once more than this share of the rows has no reward."""

    no_progress_timeout_s: float = Field(1800, gt=0)
    """The job fails when no actor has reported progress for this long; the message says what is stuck."""

    @property
    def actor_range(self) -> tuple[int, int] | None:
        """(fewest, most) actors; None for `auto`."""
        return None if self.actors == "auto" else parse_range(self.actors)

    @model_validator(mode="after")
    def _actors_make_sense(self) -> Self:
        if self.actors != "auto":
            check_range("actors", self.actors, fewest=1, words="auto, a number or MIN:MAX")
        return self
