"""Settings of an endpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from polar_ray.config.base import EMBEDDED_MODEL, Settings, check_range, parse_range
from polar_ray.config.scoring import EngineConfig, LimitsConfig


class QueueConfig(Settings):
    """What a replica takes on, and in which order it works."""

    max_queued_tokens: int | None = Field(None, ge=1)
    """Tokens that one replica may have to compute before a request; one that finds more before it is refused with 429
    and the time to come back. `bulk` requests are refused at half of it. Left out: 64 engine calls' worth."""

    batch_wait_s: float = Field(0.005, ge=0, le=10)
    """How long an idle engine waits for company after a first request, so that callers that come together share."""

    bulk_share: float = Field(0.125, gt=0, le=1)
    """The part of the engine that `bulk` requests get while `interactive` ones wait. An idle engine is all theirs."""

    default_deadline_s: float = Field(300, gt=0)
    """Deadline of a request that names none."""


class RequestConfig(Settings):
    """How large one request may be."""

    max_rows: int = Field(16384, ge=1)
    """Rows of one request."""

    max_body_bytes: int = Field(64 << 20, ge=1024)
    """Bytes of one request's body, as sent and as unpacked."""

    max_text_characters: int = Field(262144, ge=1)
    """Characters of one text; a row with a longer one is `triple_too_long`. A replica stands still while one text is
    tokenised, for about a second per million."""


class AuthConfig(Settings):
    """Who may ask."""

    mode: Literal["auto", "required", "none"] = "auto"
    """`auto`: callers need a token if there are any. `required`: a replica that finds no tokens does not start."""

    tokens_file: Path | None = None
    """One token a line, `#` for comments; any of them opens. Read again when it changes, so tokens can be rotated.
    Naming one means `required`, unless the mode is `none`. Tokens may also come in POLAR_RAY_TOKENS, separated by
    commas."""


class AutoscalingConfig(Settings):
    """How fast the number of replicas follows the queue, where `replicas` is MIN:MAX."""

    target_pending_tokens: int | None = Field(None, ge=1)
    """Tokens waiting or in work per replica that call for no change. Left out: 8 engine calls' worth."""

    upscale_delay_s: float = Field(10, ge=0)
    """How long more replicas must be called for before they are started."""

    downscale_delay_s: float = Field(300, ge=0)
    """How long fewer must be called for before some are stopped; a start costs a model's load."""

    look_back_period_s: float = Field(10, gt=0)
    """Of the average that decides."""

    interval_s: float = Field(2, gt=0)
    """Between two reports of a replica."""


class HttpConfig(Settings):
    """Where `polar-ray serve` listens. A cluster's own Serve config says it in `http_options`."""

    host: str = "127.0.0.1"
    """Loopback unless told otherwise; any other address wants tokens."""

    port: int = Field(8000, ge=1, le=65535)
    """TCP port."""


class ServeConfig(Settings):
    """One endpoint: everything that `polar-ray serve` and `polar_ray.serving.app:build` need to know."""

    model: str = EMBEDDED_MODEL
    """As in a corpus job: a checkpoint's folder, a hub name, or `embedded`."""

    revision: str | None = None
    """Commit of a hub model. Pin it: replicas that start later must load the same."""

    engine: EngineConfig = EngineConfig()
    limits: LimitsConfig = LimitsConfig()

    replicas: int | str = 1
    """Engines behind the endpoint: a number, or `MIN:MAX` to follow the queue."""

    replica_cpus: float | None = Field(None, gt=0)
    """CPUs that one replica asks of Ray. Left out: `engine.threads`, or 1 beside a GPU, or up to 8 without one."""

    queue: QueueConfig = QueueConfig()
    requests: RequestConfig = RequestConfig()
    auth: AuthConfig = AuthConfig()
    autoscaling: AutoscalingConfig = AutoscalingConfig()
    http: HttpConfig = HttpConfig()

    drain_timeout_s: float = Field(60, gt=0)
    """How long a replica that is replaced may take to finish what it has accepted."""

    engine_timeout_s: float = Field(600, gt=0)
    """A replica whose engine call takes longer is taken for hung and replaced."""

    @property
    def replica_range(self) -> tuple[int, int]:
        """(fewest, most) replicas."""
        return parse_range(self.replicas)

    @model_validator(mode="after")
    def _replicas_make_sense(self) -> Self:
        check_range("replicas", self.replicas, fewest=0)
        return self
