"""Settings of a corpus job, and of what it shares with an endpoint: limits, engine, columns."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from polar_ray.config.base import EMBEDDED_MODEL, CutSide, Device, Dtype, RopeBase, Settings, check_range, parse_range
from polar_ray.config.columns import RowColumnsConfig


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

    kind: Literal["torch", "serve", "fake"] = "torch"
    """`torch`: our own engine. `serve`: a running endpoint, asked in bulk. `fake`: a hash of the ids, for dry runs and
    tests of everything around the model."""

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

    tensor_parallel_size: int = Field(1, ge=1)
    """GPUs of one engine."""

    threads: int | None = Field(None, ge=1)
    """CPU threads of one engine. Left out: the CPUs its actor was given."""

    address: str | None = None
    """Of `serve`: the endpoint, as host:port or a URL. Left out: POLAR_RAY_ADDRESS. A token comes from POLAR_RAY_TOKEN,
    which must be set where actors run."""

    expect_receipt: str | None = None
    """Of `serve`: the endpoint's `receipt_id`; another is refused. Left out: the one it has when the job begins."""

    max_in_flight: int = Field(4, ge=1)
    """Of `serve`: requests of one actor that are under way at a time."""

    @model_validator(mode="after")
    def _address_is_of_an_endpoint(self) -> Self:
        if self.kind != "serve" and (self.address is not None or self.expect_receipt is not None):
            raise ValueError("engine.address and engine.expect_receipt are for engine.kind = serve")
        if self.address is not None and "@" in self.address:
            raise ValueError("engine.address: has a name or a token in it; put the token into POLAR_RAY_TOKEN")
        return self

    @property
    def gpus(self) -> int:
        """GPUs that an engine needs where it runs; a running endpoint has its own."""
        return self.tensor_parallel_size if self.device == "cuda" and self.kind != "serve" else 0


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
