"""From TOML files, assignments, flags and mappings to checked settings."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from polar_ray.errors import ConfigError

T = TypeVar("T", bound=BaseModel)


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
