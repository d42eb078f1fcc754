"""Random checkpoints in the published layout: names, shapes and config fields of POLAR, weights of nobody."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

TINY = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
"""A shape that scores thousands of tokens in a second."""


def write_checkpoint(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    n_shards: int = 1,
    tokenizer: Path | None = None,
    **fields: object,
) -> Path:
    """A checkpoint in `folder`, which is made; `fields` replace those of `TINY` and of POLAR-7B's config.

    Weights are scaled by their fan-in, so that rewards of random ids have a standard deviation near 2; norm weights
    differ from one. `tokenizer` is a folder whose tokenizer files are copied.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["InternLM2ForRewardModel"],
        "attn_implementation": "flash_attention_2",
        "auto_map": {"AutoModel": "modeling_internlm2.InternLM2ForRewardModel"},
        "model_type": "internlm2",
        "bias": False,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "pad_token_id": 2,
        "reward_token_id": 9,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **TINY,
        **fields,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tensors = {name: tensor.to(dtype) for name, tensor in _weights(config, seed)}
    if n_shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        write_shards(folder, tensors, n_shards)
    if tokenizer is not None:
        for file in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
            if (tokenizer / file).exists():
                shutil.copy(tokenizer / file, folder / file)
    return folder


def write_shards(folder: Path, tensors: dict[str, Tensor], n_shards: int) -> None:
    names = list(tensors)
    weight_map = {}
    for number in range(n_shards):
        file = f"model-{number + 1:05d}-of-{n_shards:05d}.safetensors"
        part = names[number::n_shards]
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _weights(config: dict[str, object], seed: int) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, scale: float = 1.0) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * (scale / columns**0.5)

    def norm(size: int) -> Tensor:
        return 1 + 0.2 * torch.randn(size, generator=generator)

    hidden, inner, layers = (int(config[k]) for k in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    heads, groups, vocab = (int(config[k]) for k in ("num_attention_heads", "num_key_value_heads", "vocab_size"))
    yield "model.tok_embeddings.weight", torch.randn(vocab, hidden, generator=generator)
    for layer in range(layers):
        at = f"model.layers.{layer}."
        yield f"{at}attention_norm.weight", norm(hidden)
        yield f"{at}attention.wqkv.weight", matrix((heads + 2 * groups) * (hidden // heads), hidden, 1.5)
        yield f"{at}attention.wo.weight", matrix(hidden, hidden, 1.5)
        yield f"{at}ffn_norm.weight", norm(hidden)
        yield f"{at}feed_forward.w1.weight", matrix(inner, hidden)
        yield f"{at}feed_forward.w3.weight", matrix(inner, hidden)
        yield f"{at}feed_forward.w2.weight", matrix(hidden, inner)
    yield "model.norm.weight", norm(hidden)
    yield "v_head.weight", matrix(1, hidden, 2.0)
