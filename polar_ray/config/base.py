"""What all settings have in common: immutable, unknown keys refused, field docstrings as help."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]
RopeBase = Literal["hf", "sglang-static"]
Quantization = Literal["int8", "fp8"]
CutSide = Literal["right", "left"]

EMBEDDED_MODEL = "embedded"
"""The name under which the checkpoint that ships with polar_ray is loaded."""


class Settings(BaseModel):
    """The common ground: immutable, unknown keys refused, field docstrings as help."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def parse_range(given: int | str) -> tuple[int, int]:
    """(fewest, most) of a number or of `MIN:MAX`. Raises `ValueError` for anything else."""
    fewest, _, most = str(given).partition(":")
    return int(fewest), int(most or fewest)


def check_range(name: str, given: int | str, fewest: int, words: str = "a number or MIN:MAX") -> None:
    """Raise `ValueError` unless `given` is a number or MIN:MAX with at least `fewest`, and at least one at most."""
    try:
        low, high = parse_range(given)
    except ValueError:
        raise ValueError(f"{name}: expected {words}, found {given!r}") from None
    if not fewest <= low <= high or high < 1:
        raise ValueError(f"{name}: expected at least {max(fewest, 1)} and MIN <= MAX, found {given!r}")
