"""What a benchmark scores: random checkpoints of stated shapes, and groups of random ids or words."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from polar_ray.model.architecture import CheckpointConfig
from polar_ray.model.checkpoint import save_checkpoint
from polar_ray.model.locate import EMBEDDED_FOLDER
from polar_ray.model.polar import PolarForReward
from polar_ray.planning import Ids
from polar_ray.triples import Triple


@dataclass(frozen=True, slots=True)
class Shape:
    """The fields of `config.json` that decide the work."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int = 8192


SHAPES = {
    "tiny": Shape(128, 384, 6, 4, 2),
    "small": Shape(512, 2048, 14, 8, 4),
    "medium": Shape(1024, 4096, 18, 8, 4),
}
"""2, 59 and 292 million parameters, head sizes 32, 64 and 128."""

SHARED_TOKENS = (350, 460)
OWN_TOKENS = (141, 275)
"""Lengths of what a group shares (prompt, reference, prompt) and of each output, inclusive: whole sequences of 491 to
735 tokens, as encoded GSM8K triples have."""

PROMPT_WORDS, REFERENCE_WORDS, OUTPUT_WORDS = 60, 70, 80
"""About 400 tokens a triple in the tokenizer that ships here."""

WORDS = (
    *("so", "the", "number", "of", "apples", "is", "three", "times", "what", "Ann", "has", "left", "after", "she"),
    *("gives", "half", "to", "Ben", "and", "each", "box", "holds", "twelve", "7", "12", "36", "48", "+", "-", "="),
)


def write_random_checkpoint(folder: Path, shape: Shape, *, seed: int = 0) -> None:
    """A bfloat16 checkpoint whose rewards of random ids have a standard deviation near 2, with the tokenizer that ships
    here, which has fewer ids."""
    embedded = json.loads((EMBEDDED_FOLDER / "config.json").read_text())
    config = CheckpointConfig.from_json(
        json.dumps(
            {
                "architectures": ["InternLM2ForRewardModel"],
                "bias": False,
                "max_position_embeddings": 32768,
                "reward_token_id": embedded["reward_token_id"],
                "rms_norm_eps": 1e-5,
                "rope_theta": 1000000.0,
                "torch_dtype": "bfloat16",
                **asdict(shape),
            }
        )
    )
    generator = torch.Generator().manual_seed(seed)
    model = PolarForReward(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
                continue
            fan_in = 1.0 if "embed" in name else parameter.shape[1]
            scale = 2.0 if name == "v_head.weight" else 1.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (scale / fan_in**0.5))
    save_checkpoint(model.to(torch.bfloat16), folder)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(EMBEDDED_FOLDER / name, folder / name)


def random_groups(n_groups: int, group_size: int, vocab_size: int, *, seed: int = 0) -> list[Ids]:
    """`n_groups * group_size` sequences, those of a group consecutive, as a trainer would send them."""
    chance = np.random.default_rng(seed)

    def draw(lengths: tuple[int, int]) -> Ids:
        return chance.integers(0, vocab_size, chance.integers(lengths[0], lengths[1] + 1), dtype=np.int32)

    def sequences() -> Iterator[Ids]:
        for _ in range(n_groups):
            shared = draw(SHARED_TOKENS)
            for _ in range(group_size):
                yield np.concatenate([shared, draw(OWN_TOKENS)])

    return list(sequences())


def random_triples(n_groups: int, group_size: int, *, seed: int = 0) -> list[Triple]:
    """`n_groups * group_size` triples of random words, those of a group consecutive."""
    chance = random.Random(seed)

    def text(n_words: int) -> str:
        return " ".join(chance.choices(WORDS, k=n_words))

    def triples() -> Iterator[Triple]:
        for _ in range(n_groups):
            prompt, reference = text(PROMPT_WORDS), text(REFERENCE_WORDS)
            for _ in range(group_size):
                yield Triple(prompt, reference, text(OUTPUT_WORDS))

    return list(triples())
