"""Which columns of a file are the fields of a row: what triples and pairs have in common."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from polar_ray.config.base import Settings


class RowColumnsConfig(Settings):
    """Which input columns are the fields that triples and pairs both have."""

    prompt: str = "prompt"
    """Column of the prompt: strings, or conversations as lists of role and content."""

    reference: str = "reference"
    """Column of the reference."""

    wrapper: str = "wrapper"
    """Column of the wrapper (`sft` or `pretrain`). Need not exist: then every row is `sft`."""

    message_json: Literal["auto", "always", "never"] = "auto"
    """Whether strings are JSON text of message lists. `auto` looks at each column's first rows, once for the whole
    input, and takes a column as JSON only if every one of them is such a list."""

    @property
    def columns(self) -> list[str]:
        """Every column that is named, each of which must be named once."""
        return [value for name, value in self if name != "message_json"]

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = self.columns
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"column {twice[0]!r} is named for two things; every column has one meaning")
        return self
