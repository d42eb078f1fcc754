"""The decoder over packed tokens: each layer's weights in the form they are used, and one pass through them.

Letters: T computed tokens, S sequences, H hidden size, G key-value heads, R query heads of each, D head size.
The residual stream is float32 whatever the dtype of the products: it costs little, and nothing that earlier layers
have added is rounded again by later ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from polar_ray.config import RopeBase
from polar_ray.engines.torch.attention import attention_for
from polar_ray.engines.torch.layout import Packed
from polar_ray.engines.torch.linear import Linear, linear_kind
from polar_ray.model.architecture import split_wqkv
from polar_ray.model.checkpoint import Checkpoint
from polar_ray.model.rope import Rope

CHUNK_TOKENS = {"cpu": 512, "cuda": 8192}
"""Tokens that go through a layer's products together. On a CPU the activations of a chunk stay in the cache; on a GPU
this only bounds their memory."""


@dataclass(frozen=True)
class Layer:
    attention_norm: Tensor
    query: Linear
    key_value: Linear
    output: Linear
    ffn_norm: Tensor
    gate: Linear
    up: Linear
    down: Linear


class Decoder:
    """The weights of one model, packed for one device and dtype."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, rope_base: RopeBase) -> None:
        """Reads and packs a tensor at a time, so that the peak of memory is the packed weights and one tensor."""
        self._config = checkpoint.config
        self._dtype = dtype
        self._rope = Rope.of(checkpoint.config, rope_base)
        self._chunk = CHUNK_TOKENS[device.type]
        self._attention = attention_for(dtype, device, checkpoint.config.head_dim, checkpoint.config.queries_per_key)
        self._embedding = checkpoint.read("model.tok_embeddings.weight", dtype, device)
        self._layers = [
            _read_layer(checkpoint, layer, dtype, device) for layer in range(checkpoint.config.num_hidden_layers)
        ]
        self._final_norm = checkpoint.read("model.norm.weight", torch.float32, device)
        self._head = checkpoint.read("v_head.weight", torch.float32, device)[0]

    @property
    def max_shared_length(self) -> int | None:
        return self._rope.longest_with_one_base

    def rewards(self, packed: Packed) -> Tensor:
        """float32 `[S]`."""
        x_TH = F.embedding(packed.ids_T, self._embedding).float()
        angles = self._rope.angles(packed.positions_T, packed.lengths_T)
        turn = torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
        for layer in self._layers[:-1]:
            keys, values = self._keys_values(layer, x_TH, turn)
            queries = self._queries(layer, x_TH, turn)
            mixed_TH = self._attention(queries, keys, values, packed.every_token)
            self._finish(layer, x_TH, mixed_TH)

        # Nothing reads the last layer's output but the head: beyond keys and values it is needed at S places only.
        layer = self._layers[-1]
        keys, values = self._keys_values(layer, x_TH, turn)
        x_SH = x_TH[packed.last_S]
        queries = self._queries(layer, x_SH, turn[packed.last_S])
        self._finish(layer, x_SH, self._attention(queries, keys, values, packed.last_tokens))
        return self._norm(x_SH, self._final_norm, torch.float32) @ self._head

    def _queries(self, layer: Layer, x_TH: Tensor, turn: Tensor) -> Tensor:
        """`[G, T, R, D]`, rotated and scaled."""
        config, n_tokens = self._config, len(x_TH)
        shape = (config.num_key_value_heads, n_tokens, config.queries_per_key, config.head_dim)
        queries = torch.empty(shape, dtype=self._dtype, device=x_TH.device)
        scaled = turn * self._attention.score_scale
        for start in range(0, n_tokens, self._chunk):
            part = slice(start, min(start + self._chunk, n_tokens))
            normed = self._norm(x_TH[part], layer.attention_norm, self._dtype)
            rotated = _rotate(layer.query(normed), scaled[part], config.head_dim)
            queries[:, part].copy_(rotated.view(-1, shape[0], *shape[2:]).transpose(0, 1))
        return queries

    def _keys_values(self, layer: Layer, x_TH: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
        """`[G, T, D]` each, keys rotated."""
        config, n_tokens = self._config, len(x_TH)
        shape = (config.num_key_value_heads, n_tokens, config.head_dim)
        keys = torch.empty(shape, dtype=self._dtype, device=x_TH.device)
        values = torch.empty_like(keys)
        for start in range(0, n_tokens, self._chunk):
            part = slice(start, min(start + self._chunk, n_tokens))
            normed = self._norm(x_TH[part], layer.attention_norm, self._dtype)
            key, value = layer.key_value(normed).chunk(2, -1)
            keys[:, part].copy_(_rotate(key, turn[part], config.head_dim).transpose(0, 1))
            values[:, part].copy_(value.view(-1, shape[0], shape[2]).transpose(0, 1))
        return keys, values

    def _finish(self, layer: Layer, x_TH: Tensor, mixed_TH: Tensor) -> None:
        """What follows attention, added to `x_TH` in place."""
        for start in range(0, len(x_TH), self._chunk):
            x = x_TH[start : start + self._chunk]
            x += layer.output(mixed_TH[start : start + self._chunk])
            normed = self._norm(x, layer.ffn_norm, self._dtype)
            x += layer.down(layer.gate.silu(normed).mul_(layer.up(normed)))

    def _norm(self, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """RMSNorm of float32 rows, rounded once."""
        if x.is_cuda:
            return F.rms_norm(x, x.shape[-1:], weight, self._config.rms_norm_eps).to(dtype)
        # On a CPU rms_norm is a chain of whole-tensor operations.
        norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.rsqrt(norms.square_().div_(x.shape[-1]).add_(self._config.rms_norm_eps))
        return (x * scale).mul_(weight).to(dtype)


def _rotate(x: Tensor, turn: Tensor, head_dim: int) -> Tensor:
    """Heads `[T, heads * D]` turned by unit complex numbers `[T, 1, D / 2]`; float32 `[T, heads, D]`.

    Pairs lie side by side, as `_side_by_side` has ordered the weights.
    """
    pairs = x.float().view(len(x), -1, head_dim // 2, 2)
    return torch.view_as_real(torch.view_as_complex(pairs) * turn).flatten(2)


def _side_by_side(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of each head reordered from `(i, i + D / 2)` pairs to neighbours; scores between queries and keys that are
    both reordered stay the same, and a rotation becomes one complex product."""
    return weight.view(-1, 2, head_dim // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _read_layer(checkpoint: Checkpoint, number: int, dtype: torch.dtype, device: torch.device) -> Layer:
    kind, config = linear_kind(dtype, device), checkpoint.config

    def read(name: str) -> Tensor:
        return checkpoint.read(f"model.layers.{number}.{name}.weight", dtype, device)

    query, key, value = split_wqkv(read("attention.wqkv"), config)
    return Layer(
        attention_norm=read("attention_norm").float(),
        query=kind(_side_by_side(query, config.head_dim)),
        key_value=kind(torch.cat([_side_by_side(key, config.head_dim), value])),
        output=kind(read("attention.wo")),
        ffn_norm=read("ffn_norm").float(),
        gate=kind(read("feed_forward.w1")),
        up=kind(read("feed_forward.w3")),
        down=kind(read("feed_forward.w2")),
    )
