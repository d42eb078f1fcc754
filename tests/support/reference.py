"""An independent POLAR: plain float32 torch, one sequence at a time, straight from the checkpoint's own keys.

Written from the specification alone and sharing no code with polar_ray, so that the two can only agree by being right.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


class Reference:
    def __init__(self, folder: Path, rope_base: str = "hf") -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.weights: dict[str, Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            self.weights |= {name: tensor.float() for name, tensor in load_file(file).items()}
        self.rope_base = rope_base

    @torch.inference_mode()
    def rewards(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        return torch.stack([self.reward(torch.as_tensor(ids, dtype=torch.long)) for ids in sequences])

    def reward(self, ids: Tensor) -> Tensor:
        config, weights = self.config, self.weights
        heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
        size, per_key, length = config["hidden_size"] // heads, heads // groups, len(ids)
        cos, sin = self.rotation(length, size)
        hidden = weights["model.tok_embeddings.weight"][ids]
        for layer in range(config["num_hidden_layers"]):
            at = f"model.layers.{layer}."
            fused = self.norm(hidden, at + "attention_norm.weight") @ weights[at + "attention.wqkv.weight"].T
            fused = fused.view(length, groups, per_key + 2, size)
            query = fused[:, :, :per_key].reshape(length, heads, size).transpose(0, 1)
            key = fused[:, :, per_key].repeat_interleave(per_key, 1).transpose(0, 1)
            value = fused[:, :, per_key + 1].repeat_interleave(per_key, 1).transpose(0, 1)
            query, key = turn(query, cos, sin), turn(key, cos, sin)
            mixed = torch.empty_like(query)
            for start in range(0, length, 512):
                end = min(start + 512, length)
                scores = query[:, start:end] @ key[:, :end].transpose(1, 2) / math.sqrt(size)
                later = torch.arange(end)[None] > torch.arange(start, end)[:, None]
                mixed[:, start:end] = scores.masked_fill(later, -math.inf).softmax(-1) @ value[:, :end]
            hidden = hidden + mixed.transpose(0, 1).reshape(length, -1) @ weights[at + "attention.wo.weight"].T
            normed = self.norm(hidden, at + "ffn_norm.weight")
            gate = torch.nn.functional.silu(normed @ weights[at + "feed_forward.w1.weight"].T)
            up = normed @ weights[at + "feed_forward.w3.weight"].T
            hidden = hidden + (gate * up) @ weights[at + "feed_forward.w2.weight"].T
        return self.norm(hidden[-1], "model.norm.weight") @ weights["v_head.weight"][0]

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.config["rms_norm_eps"]) * self.weights[name]

    def rotation(self, length: int, size: int) -> tuple[Tensor, Tensor]:
        base, longest = float(self.config["rope_theta"]), self.config["max_position_embeddings"]
        positions = torch.arange(length, dtype=torch.float32)
        scaling = self.config.get("rope_scaling") or {"type": None, "factor": 1.0}
        factor = scaling["factor"]
        if scaling["type"] == "linear":
            positions = positions / factor
        elif scaling["type"] == "dynamic" and self.rope_base == "sglang-static":
            base *= (factor * factor - factor + 1) ** (size / (size - 2))
        elif scaling["type"] == "dynamic" and length > longest:
            base *= (factor * length / longest - (factor - 1)) ** (size / (size - 2))
        inverse = 1.0 / (base ** (torch.arange(0, size, 2, dtype=torch.float32) / size))
        angles = torch.cat([positions[:, None] * inverse] * 2, -1)
        return angles.cos(), angles.sin()


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin
