"""Where people watch a run: TensorBoard's event files, below the output."""

from __future__ import annotations

from typing import Any

from polar_ray.corpus.manifest import FOLDER
from polar_ray.corpus.storage import Location
from polar_ray.training.tracker import StepReport

SCALARS = {
    "loss": "loss",
    "accuracy": "accuracy",
    "margin": "margin",
    "chosen_reward": "reward/chosen",
    "rejected_reward": "reward/rejected",
    "gradient_norm": "gradient_norm",
    "learning_rate": "learning_rate",
    "computed_tokens": "tokens/computed",
    "tokens": "tokens/all",
    "pairs": "pairs",
}
"""Field of a report to its name on the board."""


class Board:
    """Takes the reports of one run's steps, from the first on: a run that goes on tells of its earlier steps again."""

    def __init__(self, output: Location) -> None:
        """Event files go to a local disk alone: they are appended to."""
        self.reports: list[StepReport] = []
        self._writer: Any = None
        folder = output.join(FOLDER, "tensorboard")
        if folder.is_local:
            from tensorboardX import SummaryWriter

            folder.delete()
            self._writer = SummaryWriter(folder.path)

    @property
    def last_step(self) -> int:
        return self.reports[-1].step if self.reports else 0

    def add(self, reports: list[StepReport]) -> None:
        """Show new steps, in order."""
        self.reports += reports
        if self._writer is None or not reports:
            return
        for report in reports:
            for field, name in SCALARS.items():
                self._writer.add_scalar(name, getattr(report, field), report.step)
        self._writer.flush()
