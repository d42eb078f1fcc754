"""Padded batches through transformers: what engines are compared with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from polar_ray.model.polar import PolarForReward
from polar_ray.planning import Ids, Rewards

README_BATCH = 8
"""Sequences of a padded batch in POLAR's own examples."""


@torch.inference_mode()
def padded_rewards(model: PolarForReward, sequences: Sequence[Ids], batches: Sequence[Sequence[int]]) -> Rewards:
    """One reward per sequence, in order, from padded batches on the model's device."""
    rewards = np.empty(len(sequences), dtype=np.float32)
    for batch in batches:
        shape = (len(batch), max(len(sequences[row]) for row in batch))
        ids, mask = torch.full(shape, model.checkpoint_config.pad_token_id), torch.zeros(shape, dtype=torch.int64)
        for place, row in enumerate(batch):
            ids[place, : len(sequences[row])] = torch.from_numpy(sequences[row].astype(np.int64))
            mask[place, : len(sequences[row])] = 1
        rewards[batch] = model(ids.to(model.device), mask.to(model.device)).cpu().numpy()
    return rewards


def padded_widths(sequences: Sequence[Ids], batches: Sequence[Sequence[int]]) -> list[list[int]]:
    """Tokens of each sequence with its padding, batch by batch."""
    return [[max(len(sequences[row]) for row in batch)] * len(batch) for batch in batches]


def readme_batches(sequences: Sequence[Ids]) -> list[list[int]]:
    """Rows in arrival order, `README_BATCH` at a time."""
    rows = range(len(sequences))
    return [list(rows[start : start + README_BATCH]) for start in range(0, len(rows), README_BATCH)]


def sorted_batches(sequences: Sequence[Ids], token_budget: int) -> list[list[int]]:
    """Rows in batches of like lengths, of `token_budget` tokens with their padding."""
    batches: list[list[int]] = []
    for row in sorted(range(len(sequences)), key=lambda row: len(sequences[row])):
        if not batches or (len(batches[-1]) + 1) * len(sequences[row]) > token_budget:
            batches.append([])
        batches[-1].append(row)
    return batches
