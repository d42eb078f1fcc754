"""Asking a running endpoint for rewards: `RewardClient`, and `AsyncRewardClient` for event loops."""

from polar_ray.client.aio import AsyncRewardClient
from polar_ray.client.sync import RewardClient

__all__ = ["AsyncRewardClient", "RewardClient"]
