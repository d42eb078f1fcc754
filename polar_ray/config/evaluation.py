"""Settings of an evaluation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from polar_ray.config.base import EMBEDDED_MODEL, Settings
from polar_ray.config.pairs import PairColumnsConfig
from polar_ray.config.scoring import EngineConfig, LimitsConfig

Layout = Literal["pairs", "triples"]
"""How an evaluation's input is laid out: a chosen and a rejected output a row, or one output and its label."""


class EvaluateColumnsConfig(PairColumnsConfig):
    """Which input columns are the fields of a preference pair, or of a triple with a label."""

    chosen: str = "chosen"
    """Of pairs: column of the better output, or of several (lists of strings or conversations)."""

    rejected: str = "rejected"
    """Of pairs: column of the worse output, or of several. Every chosen output then has to beat every rejected one."""

    output: str = "output"
    """Of triples: column of the output."""

    label: str = "label"
    """Of triples: column of how good the output is: booleans, or numbers of which the higher is the better."""

    group: str = "group"
    """Column that says what belongs together: of triples, which outputs are compared with one another; of pairs, which
    the bootstrap draws together. Need not exist: then it is the prompt, of triples prompt and reference."""

    @property
    def triple_fields(self) -> dict[str, str]:
        """Field of a triple to its column."""
        return {"prompt": self.prompt, "reference": self.reference, "output": self.output}


class EvaluateConfig(Settings):
    """One evaluation: everything but its inputs and its output folder."""

    model: str = EMBEDDED_MODEL
    """As in a corpus job: a checkpoint's folder, a hub name, or `embedded`."""

    revision: str | None = None
    """Commit of a hub model. Pin it for figures that must be repeatable."""

    engine: EngineConfig = EngineConfig()
    limits: LimitsConfig = LimitsConfig()
    columns: EvaluateColumnsConfig = EvaluateColumnsConfig()

    layout: Literal["auto", "pairs", "triples"] = "auto"
    """`auto`: pairs where there are a chosen and a rejected column, triples where there are an output and a label."""

    by: tuple[str, ...] = ()
    """Columns by whose values everything is also told apart, each value for itself."""

    best_of: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Of triples: how many outputs of a group the best is picked from. Left out: 2, 4, 8 and so on, as long as half of
    the groups have so many."""

    resamples: int = Field(2000, ge=100, le=100_000)
    """Of the bootstrap that confidence intervals come from."""

    seed: int = Field(0, ge=0)
    """Of the bootstrap."""
