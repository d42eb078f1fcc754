"""What training minimises: Bradley and Terry's ranking loss, and upstream's variants of it.

Source: xtuner 0.2.0, `xtuner/model/reward.py`, lines 374 to 474. Letters: N pairs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from polar_ray.config.training import LossConfig

BARRIER = 5.0
"""Where the log-barrier penalty would be infinite, on either side."""

BARRIER_CLAMP = 1e-3
"""How near to the barrier the penalty goes on rising. Beyond, it is constant and has no gradient."""

FOCAL_POWER = 2.0


def pair_losses(chosen_N: Tensor, rejected_N: Tensor, config: LossConfig) -> Tensor:
    """float32 `[N]`: each pair's loss, penalty included, from its two rewards."""
    difference_N = chosen_N - rejected_N
    losses_N = -F.logsigmoid(difference_N)
    if config.kind == "focal":
        # Upstream differentiates through the factor as well.
        losses_N = losses_N * (1 - 2 * F.relu(difference_N.sigmoid() - 0.5)) ** FOCAL_POWER
    if config.penalty == "none":
        return losses_N
    penalty_N = sum(_penalty(rewards_N, config) for rewards_N in (chosen_N, rejected_N))
    return losses_N + config.penalty_weight * penalty_N


def _penalty(rewards_N: Tensor, config: LossConfig) -> Tensor:
    if config.penalty == "l2":
        return rewards_N.square()
    inside_N = rewards_N.clamp(-BARRIER + BARRIER_CLAMP, BARRIER - BARRIER_CLAMP)
    return -torch.log(BARRIER - inside_N) - torch.log(inside_N + BARRIER)
