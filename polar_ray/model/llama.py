"""A checkpoint in the form in which engines of other projects compute it right: Llama under a head of one label.

InternLM2 computes what Llama computes. Under its own name these engines would run code from the checkpoint's folder to
read its config, take the rotary base that belongs to another length (sglang, vLLM up to 0.21), put a sigmoid behind the
head and return a number for every token (vLLM). As `LlamaForSequenceClassification` there is nothing of this to go
wrong: the base is a plain number and the head is read at the last token.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from polar_ray.config import RopeBase
from polar_ray.errors import ConfigError
from polar_ray.model.architecture import CheckpointConfig, tensor_shapes, to_llama
from polar_ray.model.cache import kept
from polar_ray.model.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint
from polar_ray.model.rope import Rope
from polar_ray.stages import stage

FORM_VERSION = 1
"""Of the files written; another number makes them anew."""


def llama_form(folder: Path, rope_base: RopeBase = "hf") -> Path:
    """The folder of the same weights as a `LlamaForSequenceClassification`, in their own dtype, without a tokenizer.

    Written to the node's cache once, a layer in memory at a time; it takes as much disk as the checkpoint. Rewards are
    the checkpoint's for sequences of up to `max_position_embeddings` tokens. Raises `CheckpointError`.
    """
    checkpoint = Checkpoint.open(folder)

    def make(aside: Path) -> None:
        with stage("writing the weights as a Llama classifier, once a node"):
            _write(checkpoint, rope_base, aside)

    return kept(checkpoint, "llama", f"{rope_base}-{FORM_VERSION}", make)


def refuse_longer(config: CheckpointConfig, max_tokens: int, kind: str) -> None:
    """Raise `ConfigError` if sequences of `max_tokens` are longer than the Llama form serves."""
    if max_tokens > config.max_position_embeddings:
        raise ConfigError(
            f"limits.max_tokens = {max_tokens}: engine {kind!r} computes sequences of up to "
            f"{config.max_position_embeddings} tokens of this model; lower the limit, or set engine.kind = 'torch'"
        )


def _write(checkpoint: Checkpoint, rope_base: RopeBase, aside: Path) -> None:
    names = list(tensor_shapes(checkpoint.config))
    layers: dict[str, list[str]] = {}
    for name in names:
        layers.setdefault(name.split(".")[2] if name.startswith("model.layers.") else "ends", []).append(name)
    files: dict[str, str] = {}
    size = 0
    for number, part in enumerate(layers.values(), 1):
        file = f"model-{number:05d}-of-{len(layers):05d}.safetensors" if len(layers) > 1 else SINGLE_FILE
        tensors: dict[str, torch.Tensor] = {}
        for name in part:
            dtype = checkpoint.dtype
            tensors |= to_llama(name, checkpoint.read(name, dtype), checkpoint.config)
        if "v_head.weight" in tensors:
            tensors["score.weight"] = tensors.pop("v_head.weight")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside / file, {"format": "pt"})
        files |= dict.fromkeys(tensors, file)
        size += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": files}
    (aside / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    (aside / "config.json").write_text(json.dumps(_form_config(checkpoint, rope_base), indent=2) + "\n")


def _form_config(checkpoint: Checkpoint, rope_base: RopeBase) -> dict[str, object]:
    config, rope = checkpoint.config, Rope.of(checkpoint.config, rope_base)
    scaling = {"rope_scaling": {"rope_type": "linear", "factor": 1 / rope.position_scale}}
    dtype = str(checkpoint.dtype).removeprefix("torch.")
    return {
        "architectures": ["LlamaForSequenceClassification"],
        "model_type": "llama",
        "num_labels": 1,
        "id2label": {"0": "reward"},
        "label2id": {"reward": 0},
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": config.hidden_act,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": rope.base(0),
        **(scaling if rope.position_scale != 1 else {}),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": config.pad_token_id,
        "torch_dtype": dtype,
    }
