"""POLAR as a torch module: transformers' Llama decoder under a bias-free scalar head.

InternLM2 computes what Llama computes; only the names and the fused `wqkv` of its checkpoints differ. This is the
module to train, to evaluate on padded batches and to compare with; `engines/torch` scores faster.

Letters: B sequences, T padded tokens, H hidden size.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

from polar_ray.config import RopeBase
from polar_ray.errors import CheckpointError
from polar_ray.model.architecture import CheckpointConfig, tensor_shapes, to_llama
from polar_ray.model.checkpoint import Checkpoint
from polar_ray.model.rope import Rope


class PolarForReward(LlamaPreTrainedModel):  # type: ignore[misc]
    """Token ids in, one reward per sequence out.

    The embedding's angles are computed from the config at every call and held in no buffer: a buffer that is not in
    the checkpoint stays uninitialised when a module is built on the meta device, and rewards are then silently wrong.
    """

    def __init__(self, config: CheckpointConfig, *, rope_base: RopeBase = "hf") -> None:
        super().__init__(llama_config(config))
        self.checkpoint_config = config
        self.model = LlamaModel(self.config)
        self.model.rotary_emb = PolarRotary(Rope.of(config, rope_base))
        self.v_head = nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Rewards, float32 `[B]`, of ids `[B, T]` padded on either side; `attention_mask` is 1 where a token is real.

        The reward is read at each row's last real token. The head works in float32 whatever the model's dtype.
        """
        mask_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        position_BT = (mask_BT.cumsum(1) - 1).clamp_min(0)
        hidden_BTH: Tensor = self.model(
            input_ids=input_ids, attention_mask=mask_BT, position_ids=position_BT, use_cache=False
        ).last_hidden_state
        last_B = (mask_BT * torch.arange(1, mask_BT.shape[1] + 1, device=mask_BT.device)).argmax(1)
        last_BH = hidden_BTH[torch.arange(len(last_B), device=last_B.device), last_B]
        # Not a Linear: under autocast that would be rounded to half precision.
        rewards_B: Tensor = (last_BH.float() * self.v_head.weight[0].float()).sum(-1)
        return rewards_B


class PolarRotary(nn.Module):
    """Takes the place of Llama's rotary embedding; each row's base follows from that row's own length."""

    def __init__(self, rope: Rope) -> None:
        super().__init__()
        self.rope = rope

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[B, T, head_dim]`, in the dtype of `x`, of `[B, T]` positions that cover whole rows."""
        length_BT = (position_ids.amax(-1, keepdim=True) + 1).expand_as(position_ids)
        angles = self.rope.angles(position_ids, length_BT)
        both = torch.cat([angles, angles], -1)
        return both.cos().to(x.dtype), both.sin().to(x.dtype)


def load_polar(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    rope_base: RopeBase = "hf",
) -> PolarForReward:
    """The model in `folder`, in evaluation mode; `dtype` None is the checkpoint's own."""
    return build_polar(Checkpoint.open(folder), dtype=dtype, device=device, rope_base=rope_base)


def build_polar(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    rope_base: RopeBase = "hf",
) -> PolarForReward:
    """As `load_polar`, of an opened checkpoint.

    Built without storage and filled tensor by tensor, so that the peak of memory is the weights themselves.
    """
    with torch.device("meta"):
        model: PolarForReward = PolarForReward(checkpoint.config, rope_base=rope_base)
    parameters: dict[str, Tensor] = {}
    for name in tensor_shapes(checkpoint.config):
        tensor = checkpoint.read(name, dtype or checkpoint.dtype, device)
        parameters |= to_llama(name, tensor, checkpoint.config)
    model.load_state_dict(parameters, strict=True, assign=True)
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if left:
        raise CheckpointError(
            f"{checkpoint.folder}: no values for {left[0]}; Llama has other parts in this transformers"
        )
    model.eval()
    return model


def llama_config(config: CheckpointConfig) -> LlamaConfig:
    """The numbers as transformers' Llama takes them.

    Attention is named here and not taken from `config.json`, whose `attn_implementation` transformers would obey.
    """
    llama = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        hidden_act=config.hidden_act,
        pad_token_id=config.pad_token_id,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
    )
    llama._attn_implementation = "sdpa"
    return llama
