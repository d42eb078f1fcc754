"""The losses, beside what upstream's formulas give by hand, and the learning rate's way."""

import math

import pytest
import torch

from polar_ray.config import LossConfig, OptimizerConfig
from polar_ray.training.loss import pair_losses
from polar_ray.training.schedule import rate_at

CHOSEN = torch.tensor([1.0, -2.0, 0.5, 6.0, 40.0])
REJECTED = torch.tensor([0.0, 1.0, 0.5, -7.0, -40.0])


def test_the_ranking_loss_is_bradley_and_terry_s():
    expected = [math.log1p(math.exp(-(c - r))) for c, r in zip(CHOSEN.tolist(), REJECTED.tolist(), strict=True)]
    assert pair_losses(CHOSEN, REJECTED, LossConfig()).tolist() == pytest.approx(expected, abs=1e-6)


def test_the_focal_loss_counts_pairs_that_are_right_less():
    ranking = pair_losses(CHOSEN, REJECTED, LossConfig())
    focal = pair_losses(CHOSEN, REJECTED, LossConfig(kind="focal"))
    right = torch.sigmoid(CHOSEN - REJECTED)
    expected = ranking * torch.where(right > 0.5, (2 - 2 * right) ** 2, torch.ones(5))
    assert torch.allclose(focal, expected, atol=1e-6)


@pytest.mark.parametrize("penalty", ["log-barrier", "l2"])
def test_penalties_add_what_both_rewards_cost(penalty):
    plain = pair_losses(CHOSEN, REJECTED, LossConfig())
    with_penalty = pair_losses(CHOSEN, REJECTED, LossConfig(penalty=penalty, penalty_weight=0.5))

    def cost(reward: float) -> float:
        if penalty == "l2":
            return reward**2
        inside = min(max(reward, -4.999), 4.999)
        return -math.log(5 - inside) - math.log(inside + 5)

    expected = [0.5 * (cost(c) + cost(r)) for c, r in zip(CHOSEN.tolist(), REJECTED.tolist(), strict=True)]
    assert (with_penalty - plain).tolist() == pytest.approx(expected, rel=1e-4)


def test_the_learning_rate_rises_and_falls():
    config = OptimizerConfig(warmup_fraction=0.1, final_fraction=0.1)
    rates = [rate_at(step, 100, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10] == max(rates) == 1.0
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx((1 + 0.1) / 2)
    assert 0.1 <= rates[99] < 0.102


def test_a_single_step_is_taken_at_full_rate():
    assert rate_at(0, 1, OptimizerConfig()) == 1.0
