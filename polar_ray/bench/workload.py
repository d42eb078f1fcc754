"""What a benchmark scores: random checkpoints of stated shapes, and groups of random ids or words."""

from __future__ import annotations

import json
import random
import shutil
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count, islice
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from polar_ray.model.architecture import CheckpointConfig, tensor_shapes
from polar_ray.model.checkpoint import Checkpoint, StoredTensor, save_checkpoint
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


@dataclass(frozen=True, slots=True)
class Workload:
    """Groups of one prompt, one reference and their outputs, by the least and the most tokens of each part."""

    what: str
    prompt: tuple[int, int]
    reference: tuple[int, int]
    output: tuple[int, int]
    group_size: int
    """Outputs of a group."""

    system: int = 0
    """Tokens that every prompt begins with, besides its own."""

    references: int = 1
    """Groups in a row with the same prompt."""


WORKLOADS = {
    "gsm8k": Workload("lengths of GSM8K triples, 4 outputs a group", (90, 130), (130, 240), (141, 275), 4),
    "gsm8k-44": Workload("the same, 44 outputs a group", (90, 130), (130, 240), (141, 275), 44),
    "gaokao": Workload("lengths of Chinese exam questions, 9 outputs a group", (90, 420), (60, 330), (60, 420), 9),
    "long": Workload("1k prompts, references and outputs, 8 a group", (900, 1100), (900, 1100), (900, 1100), 8),
    "longest": Workload(
        "2k prompts, 4k references, 1k outputs, 16 a group", (2000, 2000), (4000, 4000), (900, 1100), 16
    ),
    "references": Workload(
        "a system prompt, 4 references a prompt, 4 outputs each", (90, 130), (130, 240), (141, 275), 4, 200, 4
    ),
    "strangers": Workload("nothing in common: 1 output a group", (90, 130), (130, 240), (141, 275), 1),
}
"""What engines are compared on. A sequence is `prompt reference prompt output`, with `system` before either prompt."""

PROMPT_WORDS, REFERENCE_WORDS, OUTPUT_WORDS = 60, 70, 80
"""About 400 tokens a triple in the tokenizer that ships here."""

WORDS = (
    *("so", "the", "number", "of", "apples", "is", "three", "times", "what", "Ann", "has", "left", "after", "she"),
    *("gives", "half", "to", "Ben", "and", "each", "box", "holds", "twelve", "7", "12", "36", "48", "+", "-", "="),
)


def write_random_checkpoint(folder: Path, shape: Shape, *, seed: int = 0) -> None:
    """A bfloat16 checkpoint whose rewards of random ids have a standard deviation near 2, with the tokenizer that ships
    here, which has fewer ids."""
    generator = torch.Generator().manual_seed(seed)
    model = PolarForReward(config_of(shape))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_draw(name, parameter.shape, generator))
    save_checkpoint(model.to(torch.bfloat16), folder)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(EMBEDDED_FOLDER / name, folder / name)


class RandomCheckpoint(Checkpoint):
    """Weights as `write_random_checkpoint` draws them, drawn on the device that reads them and stored nowhere.

    A shape has the same weights on every device of one kind, whatever dtype they are read in.
    """

    @classmethod
    def of(cls, shape: Shape) -> RandomCheckpoint:
        config, nowhere = config_of(shape), Path("random")
        stored = {
            name: StoredTensor(nowhere, "BF16", size, 0, 2 * prod(size)) for name, size in tensor_shapes(config).items()
        }
        return cls(nowhere, config, stored)

    def read(
        self, name: str, dtype: torch.dtype, device: str | torch.device = "cpu", part: tuple[slice, ...] = ()
    ) -> Tensor:
        generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
        tensor = _draw(name, self.stored[name].shape, generator).bfloat16()
        return tensor[part].to(dtype)


def config_of(shape: Shape) -> CheckpointConfig:
    """A config of this shape, everything else as POLAR has it."""
    embedded = json.loads((EMBEDDED_FOLDER / "config.json").read_text())
    return CheckpointConfig.from_json(
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


def _draw(name: str, size: Sequence[int], generator: torch.Generator) -> Tensor:
    """A weight on the generator's device, float32, that keeps the spread of what it multiplies; norms are 1."""
    if len(size) == 1:
        return torch.ones(size, device=generator.device)
    fan_in = 1.0 if "embed" in name else size[1]
    scale = 2.0 if name == "v_head.weight" else 1.0
    return torch.randn(size, generator=generator, device=generator.device).mul_(scale / fan_in**0.5)


def random_groups(
    workload: Workload, n_groups: int, vocab_size: int, *, group_size: int | None = None, seed: int = 0
) -> list[Ids]:
    """Sequences of `n_groups` groups, those of a group consecutive, as a trainer would send them; with `group_size`
    outputs each instead of the workload's."""
    groups = draw_groups(workload, vocab_size, group_size=group_size, seed=seed)
    return [ids for group in islice(groups, n_groups) for ids in group]


def draw_groups(
    workload: Workload, vocab_size: int, *, group_size: int | None = None, seed: int = 0
) -> Iterator[list[Ids]]:
    """The groups of `random_groups`, without end."""
    chance = np.random.default_rng(seed)

    def draw(least: int, most: int) -> Ids:
        return chance.integers(0, vocab_size, chance.integers(least, most + 1), dtype=np.int32)

    system = draw(workload.system, workload.system)
    prompt = system
    for number in count():
        if number % workload.references == 0:
            prompt = np.concatenate([system, draw(*workload.prompt)])
        shared = np.concatenate([prompt, draw(*workload.reference), prompt])
        outputs = (draw(*workload.output) for _ in range(group_size or workload.group_size))
        yield [np.concatenate([shared, output]) for output in outputs]


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
