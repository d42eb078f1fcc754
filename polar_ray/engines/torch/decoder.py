"""The decoder over packed tokens: each layer's weights in the form they are used, and one pass through them.

Letters: T computed tokens, S sequences, H hidden size, G key-value heads, R query heads of each, D head size.
The residual stream is float32 whatever the dtype of the products: it costs little, and nothing that earlier layers
have added is rounded again by later ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from polar_ray.config import Quantization, RopeBase
from polar_ray.engines.torch.attention import PLACED_BLOCK_TOKENS, attention_for
from polar_ray.engines.torch.elementwise import (
    EagerSteps,
    Steps,
    compiled_fp8_rows_if_they_work,
    compiled_if_it_works,
    rms_norm,
)
from polar_ray.engines.torch.layout import Packed, Segment
from polar_ray.engines.torch.linear import Linear, linear_kind
from polar_ray.engines.torch.quantized import Fp8Linear, Int8Linear, fp8_rows
from polar_ray.engines.torch.shard import Shard
from polar_ray.model.architecture import split_wqkv
from polar_ray.model.checkpoint import Checkpoint
from polar_ray.model.rope import Rope

CHUNK_TOKENS = {"cpu": 512, "cuda": 8192}
"""Tokens that go through a layer's products together. On a CPU the activations of a chunk stay in the cache; on a GPU
this only bounds their memory."""

EVEN_CHUNK_TOKENS = {"cpu": 512, "cuda": 1024}
"""The same for deterministic rewards, where the last chunk is filled up."""

WHOLE = Shard()

AddUp = Callable[[Tensor], Tensor]
"""From one shard's product to the sum over all of them, float32."""

LinearKind = Callable[[Tensor], Linear]
"""From a weight `[out, in]`."""


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
        compiled: bool = True,
    ) -> None:
        """Reads and packs a tensor at a time, so that the peak of memory is the packed weights and one tensor.

        With less than the `WHOLE`, `add_up` adds what the shards give. `deterministic` gives each token's attention
        its place in the sequence; the rest is up to the numbers of rows, see `determinism.py`. With `quantization`
        products with weights are those of `quantized.py`. `compiled` is for comparisons: without it a GPU does the
        steps between the products with torch's own kernels."""
        self._config = shard.config(checkpoint.config)
        self._dtype = dtype
        self._add_up = add_up or _alone
        self._rope = Rope.of(checkpoint.config, rope_base)
        self.chunk_tokens = (EVEN_CHUNK_TOKENS if deterministic else CHUNK_TOKENS)[device.type]
        # What comes from 8-bit products on a CPU is float32, and what goes into them need not be rounded before.
        between = torch.float32 if quantization == "int8" else dtype
        steps = EagerSteps(between, self._config.rms_norm_eps, self.chunk_tokens, serial=deterministic)
        self._steps: Steps = steps
        compiled = compiled and device.type == "cuda" and not deterministic
        if compiled:
            self._steps = compiled_if_it_works(steps, self._config, dtype, device)
        heads = self._config.head_dim, self._config.queries_per_key
        self._attention = attention_for(dtype, device, *heads, PLACED_BLOCK_TOKENS if deterministic else None)
        self._last_attention = attention_for(dtype, device, *heads, 1) if deterministic else self._attention
        kind: LinearKind = linear_kind(dtype, device)
        if quantization == "int8":
            kind = Int8Linear
        elif quantization == "fp8":
            rows_of = compiled_fp8_rows_if_they_work(self._config, dtype, device) if compiled else fp8_rows
            kind = partial(Fp8Linear, rows_of=rows_of)
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
        attend, attend_last = self._attention.over(packed.every_token), self._last_attention.over(packed.last_tokens)
        for layer in self._layers[:-1]:
            normed_TH = self._steps.norm(x_TH, layer.attention_norm)
            self._finish(layer, x_TH, attend(*self._heads(layer, normed_TH, query_turn, turn)))

        # Nothing reads the last layer's output but the head: beyond keys and values it is needed at S places only.
        layer, last = self._layers[-1], packed.last_S
        normed_TH = self._steps.norm(x_TH, layer.attention_norm)
        keys, values = self._keys_values(layer, normed_TH, turn)
        queries = self._queries(layer, normed_TH[last], query_turn[last])
        x_SH = x_TH[last]
        self._finish(layer, x_SH, attend_last(queries, keys, values))
        return self._read_off(x_SH)

    def first_layer(self, x_TH: Tensor, segments: Sequence[Segment]) -> tuple[Tensor, Tensor]:
        """What the first layer computes of each row of a residual stream by itself, with the value head, float32
        `[T, any]`; and its attention, in which every row has the same position, `[T, H]`."""
        layer, x_TH = self._layers[0], x_TH.clone()
        position = torch.ones(len(x_TH), dtype=torch.int64, device=x_TH.device)
        turn = self._turn(position, position + 1)
        normed_TH = self._steps.norm(x_TH, layer.attention_norm)
        queries, keys, values = self._heads(layer, normed_TH, turn * self._attention.score_scale, turn)
        self._finish(layer, x_TH, queries.transpose(0, 1).flatten(1))
        parts = [*(part.transpose(0, 1).flatten(1) for part in (queries, keys, values)), x_TH]
        by_row = torch.cat([*(part.float() for part in parts), self._read_off(x_TH).unsqueeze(1)], 1)
        return by_row, self._attention.over(segments)(queries, keys, values)

    def _turn(self, positions_T: Tensor, lengths_T: Tensor) -> Tensor:
        """Unit complex numbers `[T, 1, D / 2]`."""
        angles = self._rope.angles(positions_T, lengths_T)
        return torch.polar(torch.ones_like(angles), angles).unsqueeze(1)

    def _read_off(self, x_SH: Tensor) -> Tensor:
        """The value head's scalars, float32 `[S]`."""
        epsilon = self._config.rms_norm_eps
        return rms_norm(x_SH, self._final_norm, epsilon, torch.float32, self.chunk_tokens) @ self._head

    def _heads(
        self, layer: Layer, normed_TH: Tensor, query_turn: Tensor, turn: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What `_queries` and `_keys_values` give of the same rows."""
        queries, (keys, values) = self._query_room(normed_TH), self._key_value_room(normed_TH)
        for chunk in self._chunks(normed_TH):
            query, key_value = layer.query.both(layer.key_value, normed_TH[chunk])
            self._steps.rotate_into(queries[:, chunk].transpose(0, 1), query, query_turn[chunk])
            self._split_into(keys[:, chunk], values[:, chunk], key_value, turn[chunk])
        return queries, keys, values

    def _queries(self, layer: Layer, normed_TH: Tensor, turn: Tensor) -> Tensor:
        """`[G, T, R, D]`, rotated and scaled by `turn`."""
        queries = self._query_room(normed_TH)
        for chunk in self._chunks(normed_TH):
            self._steps.rotate_into(queries[:, chunk].transpose(0, 1), layer.query(normed_TH[chunk]), turn[chunk])
        return queries

    def _keys_values(self, layer: Layer, normed_TH: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
        """`[G, T, D]` each, keys rotated by `turn`."""
        keys, values = self._key_value_room(normed_TH)
        for chunk in self._chunks(normed_TH):
            self._split_into(keys[:, chunk], values[:, chunk], layer.key_value(normed_TH[chunk]), turn[chunk])
        return keys, values

    def _split_into(self, keys: Tensor, values: Tensor, product: Tensor, turn: Tensor) -> None:
        """The two halves of `[T, 2 * G * D]`, keys rotated by `turn`, into `[G, T, D]` each."""
        key, value = product.chunk(2, -1)
        self._steps.rotate_into(keys.transpose(0, 1).unsqueeze(2), key, turn)
        values[:] = value.view(len(value), *values.shape[::2]).transpose(0, 1)

    def _query_room(self, rows: Tensor) -> Tensor:
        return self._room(rows, self._config.queries_per_key, self._config.head_dim)

    def _key_value_room(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self._room(rows, self._config.head_dim), self._room(rows, self._config.head_dim)

    def _room(self, rows: Tensor, *sizes: int) -> Tensor:
        """`[G, T, *sizes]` for as many `rows`, laid out as the attention reads it best."""
        groups, n_rows = self._config.num_key_value_heads, len(rows)
        if self._attention.by_token:
            return rows.new_empty(n_rows, groups, *sizes, dtype=self._dtype).transpose(0, 1)
        return rows.new_empty(groups, n_rows, *sizes, dtype=self._dtype)

    def _finish(self, layer: Layer, x_TH: Tensor, mixed_TH: Tensor) -> None:
        """What follows attention, added to `x_TH` in place."""
        for chunk in self._chunks(x_TH):
            x = x_TH[chunk]
            normed = self._steps.add_and_norm(x, self._add_up(layer.output(mixed_TH[chunk])), layer.ffn_norm)
            x += self._add_up(layer.down(self._steps.gated(layer.gate, layer.up, normed)))

    def _chunks(self, rows: Tensor) -> Iterator[slice]:
        for start in range(0, len(rows), self.chunk_tokens):
            yield slice(start, start + self.chunk_tokens)


def _side_by_side(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of each head reordered from `(i, i + D / 2)` pairs to neighbours; scores between queries and keys that are
    both reordered stay the same, and a rotation becomes one complex product."""
    return weight.view(-1, 2, head_dim // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _alone(product: Tensor) -> Tensor:
    return product


def _read_layer(
    checkpoint: Checkpoint, number: int, dtype: torch.dtype, device: torch.device, shard: Shard, kind: LinearKind
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
