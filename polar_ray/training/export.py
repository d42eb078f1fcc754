"""From a trained model to a checkpoint folder that every engine takes."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from polar_ray.corpus.storage import Location
from polar_ray.model.architecture import CheckpointConfig, llama_names, tensor_shapes
from polar_ray.model.checkpoint import save_checkpoint
from polar_ray.model.polar import PolarForReward
from polar_ray.training.adapters import merged, scalings

TOKENIZER_FILES = ("tokenizer.model", "tokenizer_config.json")

STALE_FIELDS = ("untrained",)
"""Of the base checkpoint's config.json: what is not true any more of the weights that are written."""


def gather_weights(model: PolarForReward, dtype: torch.dtype) -> dict[str, Tensor]:
    """All weights by transformers' names, whole, with adapters merged, as `dtype` on the CPU.

    Every worker must call it; only the first one keeps what it gets, a tensor at a time, and the others get nothing.
    """
    keeps = not dist.is_initialized() or dist.get_rank() == 0
    found: dict[str, Tensor] = {}
    adapted: dict[str, Tensor] = {}
    for name, weight in model.named_parameters():
        whole: Tensor = weight.full_tensor() if isinstance(weight, DTensor) else weight
        whole = whole.detach()
        if keeps and (".base_layer." in name or ".lora_" in name):
            adapted[name] = whole.cpu()
        elif keeps:
            found[name] = whole.to("cpu", dtype)
    for layer, scale in scalings(model).items() if keeps else ():
        found[f"{layer}.weight"] = merged(layer, adapted, scale).to(dtype)
    return found


@dataclass(frozen=True)
class _Weights:
    checkpoint_config: CheckpointConfig
    weights: dict[str, Tensor]

    def state_dict(self) -> dict[str, Any]:
        return self.weights


def write_weights(weights: dict[str, Tensor], config: CheckpointConfig, base: Path, output: Location) -> None:
    """An InternLM2-layout checkpoint at `output`: weights, `config.json`, and the tokenizer of the folder `base`.

    `config.json` comes last: a folder that has one is complete. Raises `OutputError` when the storage refuses.
    """
    output.join("config.json").delete()
    missing = [part for name in tensor_shapes(config) for part in llama_names(name) if part not in weights]
    assert not missing, missing
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "checkpoint"
        save_checkpoint(_Weights(config, weights), folder)
        settings = json.loads((folder / "config.json").read_text())
        kept = {name: value for name, value in settings.items() if name not in STALE_FIELDS}
        (folder / "config.json").write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n")
        for name in TOKENIZER_FILES:
            if (base / name).exists():
                (folder / name).write_bytes((base / name).read_bytes())
        files = sorted(folder.iterdir(), key=lambda file: (file.name == "config.json", file.name))
        for file in files:
            output.join(file.name).commit(pa.memory_map(str(file)).read_buffer())
