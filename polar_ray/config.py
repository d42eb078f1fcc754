"""All settings of polar_ray: frozen pydantic models, TOML in, JSON out.

Values come from, later wins: defaults, a TOML file, `--set section.key=value` (flags are short forms of it). Nothing
else; the environment is read for addresses and secrets only. The docstring under a field is its help text everywhere.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from polar_ray.errors import ConfigError

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]
RopeBase = Literal["hf", "sglang-static"]
CutSide = Literal["right", "left"]

T = TypeVar("T", bound=BaseModel)

EMBEDDED_MODEL = "embedded"
"""The name under which the checkpoint that ships with polar_ray is loaded."""


class Settings(BaseModel):
    """The common ground: immutable, unknown keys refused, field docstrings as help."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


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


class ColumnsConfig(Settings):
    """Which input columns are the fields of a triple, and what the output columns are called."""

    prompt: str = "prompt"
    """Column of the prompt: strings, or conversations as lists of role and content."""

    reference: str = "reference"
    """Column of the reference."""

    output: str = "output"
    """Column of the output to score."""

    wrapper: str = "wrapper"
    """Column of the wrapper (`sft` or `pretrain`). Need not exist: then every row is `sft`."""

    reward: str = "reward"
    """Column of the reward; `_status`, `_detail`, `_tokens` and `_cut_tokens` are appended for the other four."""

    message_json: Literal["auto", "always", "never"] = "auto"
    """Whether strings are JSON text of message lists. `auto` looks at each column's first rows, once for the whole
    job, and takes a column as JSON only if every one of them is such a list."""

    @property
    def fields(self) -> dict[str, str]:
        """Field of a triple to its column."""
        return {"prompt": self.prompt, "reference": self.reference, "output": self.output}

    @property
    def written(self) -> tuple[str, ...]:
        """The columns a job adds, in order."""
        return (self.reward, *(f"{self.reward}_{part}" for part in ("status", "detail", "tokens", "cut_tokens")))

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [self.prompt, self.reference, self.output, self.wrapper, *self.written]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"column {twice[0]!r} is named for two things; every column has one meaning")
        return self


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
            _check_range("actors", self.actors, fewest=1, words="auto, a number or MIN:MAX")
        return self


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
        _check_range("replicas", self.replicas, fewest=0)
        return self


def parse_range(given: int | str) -> tuple[int, int]:
    """(fewest, most) of a number or of `MIN:MAX`. Raises `ValueError` for anything else."""
    fewest, _, most = str(given).partition(":")
    return int(fewest), int(most or fewest)


def _check_range(name: str, given: int | str, fewest: int, words: str = "a number or MIN:MAX") -> None:
    """Raise `ValueError` unless `given` is a number or MIN:MAX with at least `fewest`, and at least one at most."""
    try:
        low, high = parse_range(given)
    except ValueError:
        raise ValueError(f"{name}: expected {words}, found {given!r}") from None
    if not fewest <= low <= high or high < 1:
        raise ValueError(f"{name}: expected at least {max(fewest, 1)} and MIN <= MAX, found {given!r}")


def tokens_from_environment() -> tuple[str, ...]:
    """The endpoint's tokens in POLAR_RAY_TOKENS, separated by commas."""
    given = os.environ.get("POLAR_RAY_TOKENS", "")
    return tuple(token for token in (part.strip() for part in given.split(",")) if token)


def endpoint_address() -> str | None:
    """The endpoint to ask, from POLAR_RAY_ADDRESS."""
    return os.environ.get("POLAR_RAY_ADDRESS") or None


def endpoint_token() -> str | None:
    """The token to show an endpoint, from POLAR_RAY_TOKEN."""
    return os.environ.get("POLAR_RAY_TOKEN") or None


def ray_address() -> str | None:
    """The cluster to connect to, from RAY_ADDRESS; None: start one on this machine for the time being."""
    return os.environ.get("RAY_ADDRESS") or None


def load_config(kind: type[T], file: Path | None = None, assignments: Iterable[str] = (), **flags: Any) -> T:
    """Settings of `kind` from a TOML file, then `section.key=value` assignments, then `flags`.

    A flag is a dotted key with `__` for the dot (`engine__dtype`); one that is None was not given. Values of
    assignments are read as TOML where they are TOML (`2`, `true`, `"x"`), else as plain strings.
    Raises `ConfigError` naming the key, the value and what would be allowed.
    """
    values: dict[str, Any] = {}
    if file is not None:
        try:
            values = tomllib.loads(file.read_text())
        except OSError as error:
            raise ConfigError(f"{file}: cannot be read ({error.strerror}); give an existing TOML file") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file}: not valid TOML: {error}") from None
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {assignment}: expected section.key=value, such as limits.max_tokens=8192")
        _assign(values, key.strip(), _parse_value(text.strip()))
    for name, value in flags.items():
        if value is not None:
            _assign(values, name.replace("__", "."), value)
    return validate(kind, values, source=str(file) if file else "settings")


def config_from_arguments(kind: type[T], arguments: Mapping[str, Any]) -> T:
    """Settings of `kind` from a mapping whose keys may be dotted and whose strings may be TOML values.

    That is what `serve run app:build key=value` gives; a Serve config file's `args` are nested already.
    Raises `ConfigError` as `load_config` does.
    """
    values: dict[str, Any] = {}
    for key, value in arguments.items():
        _assign(values, key, _parse_value(value) if isinstance(value, str) else value)
    return validate(kind, values, source="args")


def validate(kind: type[T], values: Mapping[str, Any], *, source: str) -> T:
    """`values` as settings of `kind`. Raises `ConfigError` with one line per fault."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_describe(kind, fault, source) for fault in error.errors())) from None


def _describe(kind: type[BaseModel], fault: Any, source: str) -> str:
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return f"{source}: unknown setting {key!r}; known here: {', '.join(_known_keys(kind, fault['loc'][:-1]))}"
    message = fault["msg"].removeprefix("Value error, ")
    return f"{source}: {key} = {fault['input']!r}: {message}" if key else f"{source}: {message}"


def _known_keys(kind: type[BaseModel], path: tuple[str | int, ...]) -> list[str]:
    for part in path:
        inner = kind.model_fields[str(part)].annotation
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        kind = inner
    return list(kind.model_fields)


def _assign(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{key}: {section!r} is a value, not a section")
        values = inner
    values[name] = value


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
