"""The decoder over packed tokens: each layer's weights in the form they are used, and one pass through them.

Letters: T computed tokens, S sequences, H hidden size, G key-value heads, R query heads of each, D head size.
The residual stream is float32 whatever the dtype of the products: it costs little, and nothing that earlier layers
have added is rounded again by later ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from polar_ray.config import Quantization, RopeBase
from polar_ray.engines.torch.attention import PLACED_BLOCK_TOKENS, attention_for
from polar_ray.engines.torch.layout import Packed, Segment
from polar_ray.engines.torch.linear import Linear, linear_kind
from polar_ray.engines.torch.quantized import quantized_kind
from polar_ray.engines.torch.shard import Shard
from polar_ray.model.architecture import split_wqkv
from polar_ray.model.checkpoint import Checkpoint
from polar_ray.model.rope import Rope

CHUNK_TOKENS = {"cpu": 512, "cuda": 8192}
"""Tokens that go through a layer's products together. On a CPU the activations of a chunk stay in the cache; on a GPU
this only bounds their memory."""

EVEN_CHUNK_TOKENS = {"cpu": 512, "cuda": 1024}
"""The same for deterministic rewards, where the last chunk is filled up."""

SERIAL_ELEMENTS = 32767
"""torch divides element-wise work on a CPU among threads above this (`GRAIN_SIZE` in aten/src/ATen/TensorIterator.h),
and where one's part ends within a vector it multiplies complex numbers by other instructions, which round otherwise."""

WHOLE = Shard()

AddUp = Callable[[Tensor], Tensor]
"""From one shard's product to the sum over all of them, float32."""


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

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        rope_base: RopeBase,
        shard: Shard = WHOLE,
        add_up: AddUp | None = None,
        *,
        deterministic: bool = False,
        quantization: Quantization | None = None,
    ) -> None:
        """Reads and packs a tensor at a time, so that the peak of memory is the packed weights and one tensor.

        With less than the `WHOLE`, `add_up` adds what the shards give. `deterministic` gives each token's attention
        its place in the sequence; the rest is up to the numbers of rows, see `determinism.py`. With `quantization`
        products with weights are those of `quantized.py`."""
        self._config = shard.config(checkpoint.config)
        self._add_up = add_up or _alone
        self._dtype = dtype
        self._rope = Rope.of(checkpoint.config, rope_base)
        self._deterministic = deterministic
        self.chunk_tokens = (EVEN_CHUNK_TOKENS if deterministic else CHUNK_TOKENS)[device.type]
        heads = self._config.head_dim, self._config.queries_per_key
        self._attention = attention_for(dtype, device, *heads, PLACED_BLOCK_TOKENS if deterministic else None)
        self._last_attention = attention_for(dtype, device, *heads, 1) if deterministic else self._attention
        kind = linear_kind(dtype, device) if quantization is None else quantized_kind(quantization)
        self._embedding = checkpoint.read("model.tok_embeddings.weight", dtype, device)
        self._layers = [
            _read_layer(checkpoint, layer, dtype, device, shard, kind)
            for layer in range(self._config.num_hidden_layers)
        ]
        self._final_norm = checkpoint.read("model.norm.weight", torch.float32, device)
        self._head = checkpoint.read("v_head.weight", torch.float32, device)[0]

    @property
    def max_shared_length(self) -> int | None:
        return self._rope.longest_with_one_base

    def rewards(self, packed: Packed) -> Tensor:
        """float32 `[S]`."""
        x_TH = F.embedding(packed.ids_T, self._embedding).float()
        turn = self._turn(packed.positions_T, packed.lengths_T)
        query_turn = turn * self._attention.score_scale
        for layer in self._layers[:-1]:
            normed_TH = self._norm(x_TH, layer.attention_norm, self._dtype)
            keys, values = self._keys_values(layer, normed_TH, turn)
            queries = self._queries(layer, normed_TH, query_turn)
            self._finish(layer, x_TH, self._attention(queries, keys, values, packed.every_token))

        # Nothing reads the last layer's output but the head: beyond keys and values it is needed at S places only.
        layer, last = self._layers[-1], packed.last_S
        normed_TH = self._norm(x_TH, layer.attention_norm, self._dtype)
        keys, values = self._keys_values(layer, normed_TH, turn)
        queries = self._queries(layer, normed_TH[last], query_turn[last])
        x_SH = x_TH[last]
        self._finish(layer, x_SH, self._last_attention(queries, keys, values, packed.last_tokens))
        return self._read_off(x_SH)

    def first_layer(self, x_TH: Tensor, segments: Sequence[Segment]) -> tuple[Tensor, Tensor]:
        """What the first layer computes of each row of a residual stream by itself, with the value head, float32
        `[T, any]`; and its attention, in which every row has the same position, `[T, H]`."""
        layer, x_TH = self._layers[0], x_TH.clone()
        position = torch.ones(len(x_TH), dtype=torch.int64, device=x_TH.device)
        turn = self._turn(position, position + 1)
        normed_TH = self._norm(x_TH, layer.attention_norm, self._dtype)
        keys, values = self._keys_values(layer, normed_TH, turn)
        queries = self._queries(layer, normed_TH, turn * self._attention.score_scale)
        self._finish(layer, x_TH, queries.transpose(0, 1).flatten(1))
        parts = [*(part.transpose(0, 1).flatten(1) for part in (queries, keys, values)), x_TH]
        by_row = torch.cat([*(part.float() for part in parts), self._read_off(x_TH).unsqueeze(1)], 1)
        return by_row, self._attention(queries, keys, values, segments)

    def _turn(self, positions_T: Tensor, lengths_T: Tensor) -> Tensor:
        """Unit complex numbers `[T, 1, D / 2]`."""
        angles = self._rope.angles(positions_T, lengths_T)
        return torch.polar(torch.ones_like(angles), angles).unsqueeze(1)

    def _read_off(self, x_SH: Tensor) -> Tensor:
        """The value head's scalars, float32 `[S]`."""
        return self._norm(x_SH, self._final_norm, torch.float32) @ self._head

    def _queries(self, layer: Layer, normed_TH: Tensor, turn: Tensor) -> Tensor:
        """`[G, T, R, D]`, rotated and scaled by `turn`."""
        groups, per_key, size = self._config.num_key_value_heads, self._config.queries_per_key, self._config.head_dim
        queries = normed_TH.new_empty(groups, len(normed_TH), per_key, size)
        for chunk in self._chunks(normed_TH):
            rotated = self._rotate(layer.query(normed_TH[chunk]), turn[chunk])
            queries[:, chunk] = rotated.view(-1, groups, per_key, size).transpose(0, 1)
        return queries

    def _keys_values(self, layer: Layer, normed_TH: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
        """`[G, T, D]` each, keys rotated by `turn`."""
        groups, size = self._config.num_key_value_heads, self._config.head_dim
        keys, values = normed_TH.new_empty(2, groups, len(normed_TH), size)
        for chunk in self._chunks(normed_TH):
            key, value = layer.key_value(normed_TH[chunk]).chunk(2, -1)
            keys[:, chunk] = self._rotate(key, turn[chunk]).transpose(0, 1)
            values[:, chunk] = value.view(-1, groups, size).transpose(0, 1)
        return keys, values

    def _rotate(self, x_TH: Tensor, turn: Tensor) -> Tensor:
        """`_rotate` of one chunk; no two threads share a call of it where its bits must not tell where they met."""
        size = self._config.head_dim
        if not self._deterministic:
            return _rotate(x_TH, turn, size)
        rows = max(1, SERIAL_ELEMENTS // (x_TH.shape[1] // 2))
        parts = (slice(start, start + rows) for start in range(0, len(x_TH), rows))
        return torch.cat([_rotate(x_TH[part], turn[part], size) for part in parts])

    def _finish(self, layer: Layer, x_TH: Tensor, mixed_TH: Tensor) -> None:
        """What follows attention, added to `x_TH` in place."""
        for chunk in self._chunks(x_TH):
            x = x_TH[chunk]
            x += self._add_up(layer.output(mixed_TH[chunk]))
            normed = self._norm(x, layer.ffn_norm, self._dtype)
            x += self._add_up(layer.down(layer.gate.silu(normed).mul_(layer.up(normed))))

    def _chunks(self, rows: Tensor) -> Iterator[slice]:
        for start in range(0, len(rows), self.chunk_tokens):
            yield slice(start, start + self.chunk_tokens)

    def _norm(self, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """RMSNorm of float32 rows, rounded once."""
        if x.is_cuda:
            return F.rms_norm(x, x.shape[-1:], weight, self._config.rms_norm_eps).to(dtype)
        # On a CPU rms_norm is a chain of whole-tensor operations.
        normed = torch.empty(x.shape, dtype=dtype)
        for chunk in self._chunks(x):
            norms = torch.linalg.vector_norm(x[chunk], dim=-1, keepdim=True)
            scale = torch.rsqrt(norms.square_().div_(x.shape[-1]).add_(self._config.rms_norm_eps))
            torch.mul(x[chunk] * scale, weight, out=normed[chunk])
        return normed


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


def _alone(product: Tensor) -> Tensor:
    return product


def _read_layer(
    checkpoint: Checkpoint, number: int, dtype: torch.dtype, device: torch.device, shard: Shard, kind: type[Linear]
) -> Layer:
    config = shard.config(checkpoint.config)

    def read(name: str) -> Tensor:
        name = f"model.layers.{number}.{name}.weight"
        return checkpoint.read(name, dtype, device, shard.part(name, checkpoint.stored[name].shape))

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
