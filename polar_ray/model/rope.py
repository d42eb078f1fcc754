"""The rotary embedding of InternLM2: plain, linearly stretched, or with a base that grows with the sequence.

Dynamic NTK is a function of one sequence's own length here. Upstream's module takes the longest row of the padded
batch and keeps the enlarged base until the process ends, so that a reward there depends on what was scored before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from polar_ray.config import RopeBase
from polar_ray.model.architecture import CheckpointConfig


@dataclass(frozen=True)
class Rope:
    """Angles of one model. `head_dim` numbers are rotated in pairs `(i, i + head_dim / 2)`."""

    head_dim: int
    theta: float
    position_scale: float
    """Positions are multiplied by this: 1, or 1 / factor for linear scaling."""

    ntk_factor: float | None
    """Factor of dynamic NTK; None where the base does not depend on the length."""

    max_positions: int
    """Longest sequence that the plain base serves."""

    @classmethod
    def of(cls, config: CheckpointConfig, base: RopeBase = "hf") -> Rope:
        """The model's own rope, or with `sglang-static` the one that sglang and old vLLM compute.

        They build the dynamic table once for `factor * max_position_embeddings`, so that *every* length gets the base
        `theta * (f*f - f + 1) ** (d / (d - 2))` (sglang 0.4.4.post1 `rotary_embedding.py` 335-373).
        """
        scaling, size, longest = config.rope_scaling, config.head_dim, config.max_position_embeddings
        if scaling is None:
            return cls(size, config.rope_theta, 1.0, None, longest)
        if scaling.type == "linear":
            return cls(size, config.rope_theta, 1.0 / scaling.factor, None, longest)
        grown = cls(size, config.rope_theta, 1.0, scaling.factor, longest)
        if base == "hf":
            return grown
        return cls(size, grown.base(scaling.factor * longest), 1.0, None, longest)

    def base(self, length: float) -> float:
        """The base for a sequence of `length` tokens."""
        if self.ntk_factor is None or length <= self.max_positions:
            return self.theta
        stretch = self.ntk_factor * length / self.max_positions - (self.ntk_factor - 1)
        return float(self.theta * stretch ** (self.head_dim / (self.head_dim - 2)))

    def frequencies(self, length: int) -> Tensor:
        """Angle per position, float32 `[head_dim / 2]`, on the CPU.

        The power is taken in float64 and rounded once: this is what a correctly rounded float32 power gives.
        """
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device="cpu") / self.head_dim
        return (self.base(length) ** exponents).float().reciprocal()

    @property
    def longest_with_one_base(self) -> int | None:
        """Longest sequence whose angles depend on positions alone; None if all do."""
        return None if self.ntk_factor is None else self.max_positions

    def angles(self, positions: Tensor, lengths: Tensor) -> Tensor:
        """float32 angles `[..., head_dim / 2]` of tokens at `positions`, each in a sequence of its `lengths`."""
        longest = self.longest_with_one_base
        scaled = positions.to(torch.float32).unsqueeze(-1) * self.position_scale
        if longest is None or int(lengths.max()) <= longest:
            return scaled * self.frequencies(0).to(positions.device)
        distinct, which = torch.unique(lengths, return_inverse=True)
        table = torch.stack([self.frequencies(int(length)) for length in distinct.tolist()])
        return scaled * table.to(positions.device)[which]
