"""Where people watch a run: TensorBoard's event files, below the output."""

from __future__ import annotations

from typing import Any

from polar_ray.corpus.manifest import FOLDER
from polar_ray.corpus.storage import Location
from polar_ray.errors import ConfigError
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
    """Takes the reports of one run's steps, from the first on: a run that goes on tells of its earlier steps again.

    Event files go to a local disk alone, because they are appended to; a run with its output elsewhere has no board.
    """

    def __init__(self, output: Location) -> None:
        """Raises `ConfigError` where the writer is not installed."""
        self.last_step = 0
        self._folder = output.join(FOLDER, "tensorboard")
        self._writer: Any = None
        try:
            import tensorboardX
        except ImportError:
            raise ConfigError("training needs tensorboardX, to show how it goes; install polar_ray[train]") from None
        self._open = tensorboardX.SummaryWriter

    def add(self, reports: list[StepReport]) -> None:
        """Show new steps, in order."""
        if not reports:
            return
        self.last_step = reports[-1].step
        if not self._folder.is_local:
            return
        if self._writer is None:
            self._folder.delete()
            self._writer = self._open(self._folder.path)
        for report in reports:
            for field, name in SCALARS.items():
                if (value := getattr(report, field)) is not None:
                    self._writer.add_scalar(name, value, report.step)
            self._writer.add_scalar("tokens/computed_per_second", report.computed_tokens / report.seconds, report.step)
        self._writer.flush()

    def close(self) -> None:
        """Nothing more will be shown."""
        if self._writer is not None:
            self._writer.close()
