"""Which columns of a file are the fields of a preference pair: for evaluation and for training."""

from __future__ import annotations

from polar_ray.config.columns import RowColumnsConfig


class PairColumnsConfig(RowColumnsConfig):
    """Which input columns are the fields of a preference pair."""

    chosen: str = "chosen"
    """Column of the better output."""

    rejected: str = "rejected"
    """Column of the worse output."""

    @property
    def fields(self) -> dict[str, str]:
        """Field of a preference pair to its column."""
        return {
            "prompt": self.prompt,
            "reference": self.reference,
            "chosen": self.chosen,
            "rejected": self.rejected,
        }
