"""What a run has done so far, told by its first worker and asked for by its driver: a Ray actor, kept free of Ray."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from polar_ray.errors import PolarRayError


class StepReport(BaseModel):
    """One step of all workers together: means over its pairs, and what it computed."""

    step: int
    """Counted from 1."""

    n_steps: int
    pairs: int
    loss: float
    accuracy: float
    """Share of the pairs whose chosen output had the higher reward, before the step."""

    margin: float
    """Reward of the chosen output less that of the rejected one."""

    chosen_reward: float
    rejected_reward: float
    gradient_norm: float | None
    """Before it was clipped; None where float16 overflowed and the step was left out."""

    learning_rate: float
    tokens: int
    """Of all sequences, each computed whole."""

    computed_tokens: int
    seconds: float
    """Of the first worker, from its packs to the step's end."""


class TrainingTracker:
    """Keeps the reports of a run's steps. What is reported again, after a fall back to a checkpoint, counts as last."""

    def __init__(self) -> None:
        self._reports: dict[int, StepReport] = {}
        self._starts = 0
        self._placements: list[Any] = []
        self._finished = False
        self._error: PolarRayError | None = None

    def placed(self, placement: Any) -> None:
        """The workers have `placement`, Ray's placement group, for their own."""
        self._placements.append(placement)

    def placements(self) -> list[Any]:
        """All that workers of the run have had."""
        return self._placements

    def started(self, history: list[StepReport]) -> None:
        """The workers are up; `history` are the steps that led to the checkpoint they go on from."""
        self._starts += 1
        self._reports |= {report.step: report for report in history}

    def step(self, report: StepReport) -> None:
        """One more step is done."""
        self._reports[report.step] = report

    def finish(self) -> None:
        """The trained weights are written."""
        self._finished = True

    def fail(self, error: PolarRayError) -> None:
        """The run is over: another try would end alike."""
        self._error = self._error or error

    def poll(self, after: int) -> tuple[list[StepReport], int, bool, PolarRayError | None]:
        """Reports of the steps beyond `after`; how often workers were started; whether they are done, and how."""
        news = [report for step, report in sorted(self._reports.items()) if step > after]
        return news, self._starts, self._finished, self._error
