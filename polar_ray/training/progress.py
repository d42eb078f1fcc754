"""How a run shows itself while it trains: a live line on a terminal, a plain line every ten seconds without one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from polar_ray.corpus.progress import LINE_SECONDS, LogProgress, SilentProgress, TerminalProgress
from polar_ray.report.wording import duration, number, percent
from polar_ray.training.tracker import StepReport

Show = Callable[[list[StepReport]], None]
"""Called with new steps, in order."""

SMOOTHED_PAIRS = 512
"""Accuracy is shown over about so many of the latest pairs; one step has too few to say anything."""


class TrainProgress(Protocol):
    """What a run reports to while it works."""

    def stage(self, text: str) -> AbstractContextManager[None]: ...

    def counted(self, text: str, total: int) -> AbstractContextManager[Callable[[], None]]: ...

    def training(self) -> AbstractContextManager[Show]:
        """The main stage. How many steps there are is in each report."""
        ...


class SilentTrainProgress(SilentProgress):
    """Shows nothing."""

    @contextmanager
    def training(self) -> Iterator[Show]:
        yield lambda reports: None


class TerminalTrainProgress(TerminalProgress):
    """Bars and one live line."""

    @contextmanager
    def training(self) -> Iterator[Show]:
        with self._bar() as bar:
            task = bar.add_task("training", total=None, note="starting the workers")
            latest = Latest()

            def show(reports: list[StepReport]) -> None:
                if reports:
                    note = latest.describe(reports)
                    bar.update(task, total=reports[-1].n_steps, completed=reports[-1].step, note=note)

            yield show


class LogTrainProgress(LogProgress):
    """Lines for a log file."""

    @contextmanager
    def training(self) -> Iterator[Show]:
        latest, printed_at = Latest(), time.monotonic()

        def show(reports: list[StepReport]) -> None:
            nonlocal printed_at
            if not reports:
                return
            note, last = latest.describe(reports), reports[-1]
            if time.monotonic() - printed_at >= LINE_SECONDS or last.step == last.n_steps:
                printed_at = time.monotonic()
                self._console.print(f"step {last.step}/{last.n_steps}, {note}", highlight=False, soft_wrap=True)

        yield show


class Latest:
    """Loss and accuracy over the latest pairs, and speed since the first report."""

    def __init__(self) -> None:
        self._weight = self._loss = self._accuracy = 0.0
        self._since: float | None = None
        self._tokens = self._computed = self._steps = 0

    def describe(self, reports: list[StepReport]) -> str:
        """One line about the run, after it has also seen `reports`."""
        for report in reports:
            kept = max(0.0, 1 - report.pairs / SMOOTHED_PAIRS)
            self._weight = self._weight * kept + report.pairs
            self._loss = self._loss * kept + report.loss * report.pairs
            self._accuracy = self._accuracy * kept + report.accuracy * report.pairs
        last = reports[-1]
        parts = [f"loss {self._loss / self._weight:.3f}", f"accuracy {percent(self._accuracy / self._weight)}"]
        now = time.monotonic()
        if self._since is None:  # the first steps tell when it began, not how fast it is
            self._since = now
            return ", ".join(parts)
        self._steps += len(reports)
        self._tokens += sum(report.tokens for report in reports)
        self._computed += sum(report.computed_tokens for report in reports)
        seconds = now - self._since
        if seconds > 0:
            saved = 1 - self._computed / self._tokens
            parts.append(f"{number(self._computed / seconds)} tokens/s computed, {percent(saved)} saved")
            parts.append(f"{duration((last.n_steps - last.step) * seconds / self._steps)} left")
        return ", ".join(parts)
