"""Rewards by transformers' own Llama layers in float32, one layer in memory at a time.

Slow, simple and apart from every engine's arithmetic: what an engine's rewards are held against before they are
trusted. A 7B model needs about 2 GB here.

Letters: T tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from polar_ray.config import RopeBase
from polar_ray.model.architecture import to_llama
from polar_ray.model.checkpoint import Checkpoint
from polar_ray.model.polar import PolarRotary, llama_config
from polar_ray.model.rope import Rope


@torch.inference_mode()
def reference_rewards(
    checkpoint: Checkpoint,
    sequences: Sequence[npt.NDArray[np.int32]],
    *,
    rope_base: RopeBase = "hf",
    device: str | torch.device = "cpu",
) -> npt.NDArray[np.float32]:
    """One float32 reward per sequence of ids, in order, each computed alone. Raises `CheckpointError`."""
    config = checkpoint.config
    llama, rotary = llama_config(config), PolarRotary(Rope.of(config, rope_base))

    def read(name: str) -> Tensor:
        return checkpoint.read(name, torch.float32, device)

    embedding = read("model.tok_embeddings.weight")
    hidden = [embedding[torch.from_numpy(ids.astype(np.int64)).to(embedding.device)].unsqueeze(0) for ids in sequences]
    del embedding
    turns = [rotary(rows, torch.arange(rows.shape[1], device=rows.device).unsqueeze(0)) for rows in hidden]
    for number in range(config.num_hidden_layers):
        prefix = f"model.layers.{number}."
        with torch.device("meta"):
            layer = LlamaDecoderLayer(llama, number)
        weights: dict[str, Tensor] = {}
        for name in checkpoint.stored:
            if name.startswith(prefix):
                parts = to_llama(name, read(name), config)
                weights |= {part.removeprefix(prefix): tensor for part, tensor in parts.items()}
        layer.load_state_dict(weights, strict=True, assign=True)
        layer.eval()
        hidden = [layer(rows, position_embeddings=turn) for rows, turn in zip(hidden, turns, strict=True)]
    norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
    norm.load_state_dict({"weight": read("model.norm.weight")}, assign=True)
    head = read("v_head.weight")[0]
    rewards: npt.NDArray[np.float32] = torch.stack([norm(rows[0, -1]) @ head for rows in hidden]).cpu().numpy()
    return rewards
