"""How a job shows itself while it runs: a live line on a terminal, a plain line every ten seconds without one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from polar_ray.corpus.tracker import Snapshot
from polar_ray.report.wording import duration, number, percent

LINE_SECONDS = 10.0
"""Between two lines of a log."""

Show = Callable[[Snapshot], None]
"""Called a few times a second with the state of the run."""


class JobProgress(Protocol):
    """What a job reports to while it works."""

    def stage(self, text: str) -> AbstractContextManager[None]: ...

    def counted(self, text: str, total: int) -> AbstractContextManager[Callable[[], None]]:
        """A stage of `total` steps; the function it gives is called after each, from any thread."""
        ...

    def scoring(self, rows: int, rows_before: int, actors: int) -> AbstractContextManager[Show]:
        """The main stage: `rows` in the whole job, of which earlier runs did `rows_before`."""
        ...


class SilentProgress:
    """Shows nothing."""

    @contextmanager
    def stage(self, text: str) -> Iterator[None]:
        yield

    @contextmanager
    def counted(self, text: str, total: int) -> Iterator[Callable[[], None]]:
        yield lambda: None

    @contextmanager
    def scoring(self, rows: int, rows_before: int, actors: int) -> Iterator[Show]:
        yield lambda snapshot: None


class TerminalProgress:
    """Bars and one live line, drawn by rich; they vanish when their stage is over."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def stage(self, text: str) -> Iterator[None]:
        with self._console.status(text):
            yield

    @contextmanager
    def counted(self, text: str, total: int) -> Iterator[Callable[[], None]]:
        with self._bar() as bar:
            task = bar.add_task(text, total=total, note="")
            yield lambda: bar.advance(task)

    @contextmanager
    def scoring(self, rows: int, rows_before: int, actors: int) -> Iterator[Show]:
        with self._bar() as bar:
            task = bar.add_task("scoring", total=rows, completed=rows_before, note="starting the engine")
            rate = _Rate(rows, rows_before, actors)
            yield lambda snapshot: bar.update(task, completed=rows_before + snapshot.rows, note=rate.describe(snapshot))

    def _bar(self) -> Progress:
        return Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            transient=True,
        )


class LogProgress:
    """Lines for a log file."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def stage(self, text: str) -> Iterator[None]:
        self._console.print(text, highlight=False)
        yield

    @contextmanager
    def counted(self, text: str, total: int) -> Iterator[Callable[[], None]]:
        self._console.print(f"{text}: {total}", highlight=False)
        yield lambda: None

    @contextmanager
    def scoring(self, rows: int, rows_before: int, actors: int) -> Iterator[Show]:
        rate = _Rate(rows, rows_before, actors)
        printed_at, stage = time.monotonic(), ""

        def show(snapshot: Snapshot) -> None:
            nonlocal printed_at, stage
            if snapshot.stage != stage and not snapshot.actors:
                stage = snapshot.stage
                self._console.print(stage, highlight=False)
            note = rate.describe(snapshot)
            if time.monotonic() - printed_at >= LINE_SECONDS:
                printed_at = time.monotonic()
                self._console.print(
                    f"scoring {rows_before + snapshot.rows}/{rows} rows, {note}", highlight=False, soft_wrap=True
                )

        yield show


class _Rate:
    """Speeds since the first actor was up, and what they promise."""

    def __init__(self, rows: int, rows_before: int, actors: int) -> None:
        self._todo = rows - rows_before
        self._actors = actors
        self._since: float | None = None

    def describe(self, snapshot: Snapshot) -> str:
        now = time.monotonic()
        if snapshot.actors == 0:
            return snapshot.stage or "starting the engine"
        self._since = self._since or now
        seconds = now - self._since
        if not snapshot.rows or not seconds:
            return f"{snapshot.actors} of {self._actors} engines up"
        rows_per_s = snapshot.rows / seconds
        saved = 1 - snapshot.computed_tokens / snapshot.tokens if snapshot.tokens else 0.0
        left_s = (self._todo - snapshot.rows) / rows_per_s
        parts = [
            f"{number(rows_per_s)} rows/s",
            f"{number(snapshot.computed_tokens / seconds)} tokens/s computed, {percent(saved)} saved",
            f"{duration(left_s)} left ({left_s * self._actors / 3600:.2g} engine-hours)",
        ]
        if snapshot.quarantined:
            parts.append(f"{snapshot.quarantined} rows quarantined")
        return ", ".join(parts)
