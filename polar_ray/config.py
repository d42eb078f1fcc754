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

    kind: Literal["torch", "fake"] = "torch"
    """`torch`: our own engine. `fake`: a hash of the ids, for dry runs and tests of everything around the model."""

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
    """Engines working in parallel: a number, or `MIN:MAX` to grow with the cluster. `auto`: one per GPU set, or on
    CPUs one per eight cores."""

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
        if self.actors == "auto":
            return None
        fewest, _, most = str(self.actors).partition(":")
        return int(fewest), int(most or fewest)

    @model_validator(mode="after")
    def _actors_make_sense(self) -> Self:
        try:
            given = self.actor_range
        except ValueError:
            raise ValueError(f"actors: expected auto, a number or MIN:MAX, found {self.actors!r}") from None
        if given is not None and not 1 <= given[0] <= given[1]:
            raise ValueError(f"actors: expected at least 1 and MIN <= MAX, found {self.actors!r}")
        return self


def ray_address() -> str | None:
    """The cluster to connect to, from RAY_ADDRESS; None: start one on this machine for the time being."""
    return os.environ.get("RAY_ADDRESS") or None


def load_score_config(file: Path | None = None, assignments: Iterable[str] = (), **flags: Any) -> ScoreConfig:
    """The settings of a job from a TOML file, then `section.key=value` assignments, then `flags`.

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
    return validate(ScoreConfig, values, source=str(file) if file else "settings")


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
