"""Which columns of a file are the fields of a preference pair: for evaluation and for training."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from polar_ray.config.base import Settings


class PairColumnsConfig(Settings):
    """Which input columns are the fields of a preference pair."""

    prompt: str = "prompt"
    """Column of the prompt: strings, or conversations as lists of role and content."""

    reference: str = "reference"
    """Column of the reference."""

    chosen: str = "chosen"
    """Column of the better output."""

    rejected: str = "rejected"
    """Column of the worse output."""

    wrapper: str = "wrapper"
    """Column of the wrapper (`sft` or `pretrain`). Need not exist: then every row is `sft`."""

    message_json: Literal["auto", "always", "never"] = "auto"
    """Whether strings are JSON text of message lists. `auto` looks at each column's first rows, and takes a column as
    JSON only if every one of them is such a list."""

    @property
    def fields(self) -> dict[str, str]:
        """Field of a preference pair to its column."""
        return {
            "prompt": self.prompt,
            "reference": self.reference,
            "chosen": self.chosen,
            "rejected": self.rejected,
        }

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [value for name, value in self if name != "message_json"]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"column {twice[0]!r} is named for two things; every column has one meaning")
        return self
