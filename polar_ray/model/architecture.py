"""What a POLAR checkpoint says it is: the numbers of `config.json`, and the tensors that follow from them.

The layout is InternLM2's (`InternLM2ForRewardModel`, xtuner 0.2.0 `modeling_internlm2.py`): names, shapes and the
fused, interleaved `wqkv`. Nothing here opens a weights file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator
from torch import Tensor

from polar_ray.errors import CheckpointError

ARCHITECTURE = "InternLM2ForRewardModel"


class RopeScaling(BaseModel):
    """How the rotary embedding is stretched; InternLM2 knows these two ways and no other keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["dynamic", "linear"]
    factor: float = Field(ge=1)


class CheckpointConfig(BaseModel):
    """The fields of `config.json` that decide a reward, checked.

    Numbers have no defaults: the ones in InternLM2's own config class are not POLAR's. Fields not listed here
    (`auto_map`, `attn_implementation`, `torch_dtype`, ...) are kept for writing the file back and otherwise ignored.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    architectures: tuple[str, ...]
    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    max_position_embeddings: int = Field(gt=0)
    rope_theta: float = Field(gt=0)
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = Field(gt=0)
    bias: Literal[False]
    hidden_act: Literal["silu"] = "silu"
    head_dim: int = Field(gt=0)
    pad_token_id: int = Field(2, ge=0)
    reward_token_id: int = Field(92527, ge=0)
    """The last token of every sequence; the reward is read there. 92527 is what all published POLAR models use."""

    _text: str = PrivateAttr("")

    @classmethod
    def from_json(cls, text: str, *, source: str = "config.json") -> Self:
        """The config in `text`. Raises `CheckpointError` naming `source`, the field and its value."""
        try:
            values = json.loads(text)
        except ValueError as error:
            raise CheckpointError(f"{source}: not valid JSON: {error}") from None
        if not isinstance(values, dict):
            raise CheckpointError(f"{source}: expected a JSON object, found {type(values).__name__}")
        try:
            config = cls.model_validate(values)
        except ValidationError as error:
            raise CheckpointError("\n".join(_describe(fault, source) for fault in error.errors())) from None
        config._text = text
        return config

    def to_json(self, *, dtype: str | None = None) -> str:
        """The text this was read from, fields unknown to us included, to the byte.

        With `dtype` (such as `bfloat16`) a dtype field that says something else is changed to it.
        """
        values = json.loads(self._text) if self._text else self.model_dump(mode="json")
        stale = [key for key in ("torch_dtype", "dtype") if dtype is not None and values.get(key, dtype) != dtype]
        if self._text and not stale:
            return self._text
        return json.dumps(values | dict.fromkeys(stale, dtype), indent=2, ensure_ascii=False) + "\n"

    @property
    def queries_per_key(self) -> int:
        """Query heads that share one key and value head."""
        return self.num_attention_heads // self.num_key_value_heads

    @model_validator(mode="before")
    @classmethod
    def _derive(cls, values: Any) -> Any:
        """Upstream's two derived fields: absent or null they follow from the others."""
        if not isinstance(values, dict):
            return values
        values = {key: value for key, value in values.items() if value is not None}
        hidden, heads = values.get("hidden_size"), values.get("num_attention_heads")
        if isinstance(heads, int):
            values.setdefault("num_key_value_heads", heads)
            if isinstance(hidden, int) and heads > 0:
                values.setdefault("head_dim", hidden // heads)
        return values

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if ARCHITECTURE not in self.architectures:
            raise ValueError(f"architectures = {list(self.architectures)!r}: expected {ARCHITECTURE}")
        if heads % groups:
            raise ValueError(f"num_key_value_heads = {groups}: does not divide num_attention_heads = {heads}")
        if self.head_dim * heads != self.hidden_size or self.head_dim % 2:
            raise ValueError(
                f"head_dim = {self.head_dim}: expected the even number hidden_size / num_attention_heads, "
                f"{self.hidden_size} / {heads}"
            )
        if self.pad_token_id >= self.vocab_size:
            raise ValueError(f"pad_token_id = {self.pad_token_id}: outside vocab_size = {self.vocab_size}")
        return self


def _describe(fault: Any, source: str) -> str:
    field = ".".join(str(part) for part in fault["loc"])
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "missing":
        return f"{source}: {field} is missing"
    return f"{source}: {field} = {fault['input']!r}: {message}" if field else f"{source}: {message}"


def tensor_shapes(config: CheckpointConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor a checkpoint of this config holds, in the order they are used."""
    hidden, inner = config.hidden_size, config.intermediate_size
    fused = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.tok_embeddings.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "attention_norm": (hidden,),
                "attention.wqkv": (fused, hidden),
                "attention.wo": (hidden, hidden),
                "ffn_norm": (hidden,),
                "feed_forward.w1": (inner, hidden),
                "feed_forward.w3": (inner, hidden),
                "feed_forward.w2": (hidden, inner),
            }.items()
        }
    return shapes | {"model.norm.weight": (hidden,), "v_head.weight": (1, hidden)}


def split_wqkv(fused: Tensor, config: CheckpointConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value weights `[heads * head_dim, hidden]` from the fused rows `[kv head][its queries, k, v]`."""
    per_key, size = config.queries_per_key, config.head_dim
    rows = fused.view(config.num_key_value_heads, per_key + 2, size, fused.shape[-1])
    query, key, value = rows[:, :per_key], rows[:, per_key], rows[:, per_key + 1]
    return tuple(part.reshape(-1, fused.shape[-1]) for part in (query, key, value))  # type: ignore[return-value]


def merge_wqkv(query: Tensor, key: Tensor, value: Tensor, config: CheckpointConfig) -> Tensor:
    """The inverse of `split_wqkv`, bit for bit."""
    groups, size = config.num_key_value_heads, config.head_dim
    parts = [part.view(groups, -1, size, part.shape[-1]) for part in (query, key, value)]
    return torch.cat(parts, 1).reshape(-1, query.shape[-1])


_LLAMA_LAYER_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
}


def llama_names(name: str) -> tuple[str, ...]:
    """The names in a Llama module of what the checkpoint calls `name`: three for `wqkv`, else one."""
    if name == "model.tok_embeddings.weight":
        return ("model.embed_tokens.weight",)
    if not name.startswith("model.layers."):
        return (name,)
    _, _, layer, rest = name.removesuffix(".weight").split(".", 3)
    parts = [f"self_attn.{part}_proj" for part in "qkv"] if rest == "attention.wqkv" else [_LLAMA_LAYER_NAMES[rest]]
    return tuple(f"model.layers.{layer}.{part}.weight" for part in parts)


def to_llama(name: str, tensor: Tensor, config: CheckpointConfig) -> dict[str, Tensor]:
    """A checkpoint's tensor as the Llama module's parameters that it becomes."""
    parts = split_wqkv(tensor, config) if name.endswith("wqkv.weight") else (tensor,)
    return dict(zip(llama_names(name), parts, strict=True))


def from_llama(name: str, parameters: Mapping[str, Tensor], config: CheckpointConfig) -> Tensor:
    """The checkpoint's tensor `name` from the Llama module's parameters."""
    parts = [parameters[part].detach() for part in llama_names(name)]
    return parts[0] if len(parts) == 1 else merge_wqkv(parts[0], parts[1], parts[2], config)
