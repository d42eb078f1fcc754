"""Makes the checkpoint that ships with polar_ray, before training: a small tokenizer and random weights.

The folder has the files, names and shapes of a published POLAR checkpoint, so the code that loads one loads the other.
It has no `auto_map`: polar_ray never runs a checkpoint's code, and the file names it would point to are not there.

The same corpora, seed and library versions give the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import pyarrow.parquet as pq
import sentencepiece as spm
import torch
import typer
from safetensors.torch import save

DEFAULT_OUTPUT = Path(__file__).resolve().parents[1] / "polar_ray" / "checkpoints" / "polar-tiny"

TEXT_COLUMNS = ("prompt", "reference", "output", "chosen", "rejected")
"""Columns that hold text to learn pieces from; a corpus need not have all of them."""

VOCABULARY_SIZE = 4096
"""Pieces in all. A multiple of 64, so that a tensor-parallel engine can split the embedding without padding."""

CHARACTER_COVERAGE = 0.993
"""Share of the sample's characters that get a piece of their own, here 1,800 characters; the rest are spelt in bytes,
three to a Han character. Tokens per character of English and Chinese: 0.37 and 0.80 at 0.98, 0.39 and 0.77 at 0.993,
0.47 and 0.83 at 0.999, where the characters leave too few pieces for words."""

CHARACTERS_PER_LANGUAGE = 3_000_000
"""Text sampled for each language. A third of it gives 0.40 tokens per character of English instead of 0.39."""

HELD_OUT_CHARACTERS = 500_000
"""Text of each language, none of it in the sample, on which tokens per character are measured."""

CHINESE_FROM = 0.2
"""Share of Han characters from which a text counts as Chinese; formulas and options dilute it in exam questions."""

ENGLISH_BELOW = 0.01
"""Share of Han characters below which a text counts as English. Texts in between, mostly formulas, are left out."""

UNUSED_TOKENS = 147
"""InternLM2's user-defined symbols `[UNUSED_TOKEN_0]` to `[UNUSED_TOKEN_146]`."""

DECLARED_TOKENS = {
    0: "<|reward|>",
    141: "<|plugin|>",
    142: "<|interpreter|>",
    143: "<|action_end|>",
    144: "<|action_start|>",
    145: "<|im_end|>",
    146: "<|im_start|>",
}
"""Number of the unused token to the name POLAR gives it. The first one separates the halves of a triple."""

SCORE_TOKEN = 130
"""Number of the unused token whose position the reward is read from; POLAR gives it no name."""

HIDDEN_SIZE = 128
LAYERS = 6
HEADS = 4
KEY_VALUE_HEADS = 2
INTERMEDIATE_SIZE = 384

EMBEDDING_STD = 0.02
"""Small beside what attention adds in the first layer. Every sequence ends in the same token, and with embeddings near
1 that token's own vector more than halves the spread of the rewards."""

HEAD_STD = 0.17
"""Gives rewards a standard deviation of about 2 over unlike triples, so that an error in the arithmetic shows. The
final norm hands the head a vector of length sqrt(HIDDEN_SIZE), about 11."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """One Parquet file's texts, and where they come from."""

    name: str
    provenance: dict[str, Any]
    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """What the tokenizer learns from, and texts it does not see."""

    texts: dict[str, list[str]]
    held_out: dict[str, list[str]]


def read_corpora(paths: Iterable[Path]) -> list[Corpus]:
    """The files in order of name, whatever the order given; a text that several hold belongs to the first.

    NUL characters are dropped: SentencePiece 0.2.2 refuses a model with one in a piece.
    """
    seen: set[str] = set()
    corpora = []
    for path in sorted(paths, key=lambda path: path.name):
        table = pq.read_table(path)
        provenance = json.loads((table.schema.metadata or {}).get(b"provenance", b"{}"))
        columns = [table[name].to_pylist() for name in TEXT_COLUMNS if name in table.column_names]
        texts = {text.replace("\0", ""): None for text in itertools.chain(*columns) if isinstance(text, str)}
        corpora.append(Corpus(path.name, provenance, tuple(text for text in texts if text and text not in seen)))
        seen.update(texts)
    return corpora


def language_of(text: str) -> str | None:
    """`zh`, `en`, or None for a text that is clearly neither."""
    share = sum("\u4e00" <= character <= "\u9fff" for character in text) / len(text)
    if share >= CHINESE_FROM:
        return "zh"
    return "en" if share < ENGLISH_BELOW else None


def draw_sample(corpora: Sequence[Corpus]) -> Sample:
    """The same amount of each language, one text from each corpus in turn, in the order of the texts' hashes.

    Raises `typer.BadParameter` when a language has too little text.
    """
    sample = Sample({}, {})
    for language in ("en", "zh"):
        shuffled = [
            sorted((text for text in corpus.texts if language_of(text) == language), key=_hash) for corpus in corpora
        ]
        in_turn = (text for row in itertools.zip_longest(*shuffled) for text in row if text is not None)
        sample.texts[language] = list(_take(in_turn, CHARACTERS_PER_LANGUAGE))
        sample.held_out[language] = list(_take(in_turn, HELD_OUT_CHARACTERS))
        if not sample.held_out[language]:
            raise typer.BadParameter(
                f"the corpora hold too little text ({language}): more than {CHARACTERS_PER_LANGUAGE} characters are "
                "needed; add a corpus",
                param_hint="--corpus",
            )
    return sample


def train_tokenizer(texts: Iterable[str]) -> bytes:
    """A SentencePiece BPE model with InternLM2's settings and user-defined symbols."""
    model = io.BytesIO()
    spm.SentencePieceTrainer.Train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY_SIZE,
        character_coverage=CHARACTER_COVERAGE,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        user_defined_symbols=[unused_token(number) for number in range(UNUSED_TOKENS)],
        max_sentence_length=2**20,  # bytes; the default, 4192, would drop every long text
        shuffle_input_sentence=False,
        num_threads=1,  # more would make the order of equal merges depend on timing
        minloglevel=1,
    )
    return model.getvalue()


def unused_token(number: int) -> str:
    """How SentencePiece spells one of InternLM2's user-defined symbols."""
    return f"[UNUSED_TOKEN_{number}]"


def tokenizer_config(pieces: spm.SentencePieceProcessor) -> dict[str, Any]:
    """tokenizer_config.json: the tokens that are special, declared as POLAR declares them."""
    literals = {id: pieces.IdToPiece(id) for id in (pieces.unk_id(), pieces.bos_id(), pieces.eos_id())}
    names = {pieces.PieceToId(unused_token(number)): name for number, name in DECLARED_TOKENS.items()}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {
            str(id): {"content": literal, **flags} for id, literal in sorted({**literals, **names}.items())
        },
        "additional_special_tokens": list(names.values()),
        "bos_token": literals[pieces.bos_id()],
        "clean_up_tokenization_spaces": False,
        "eos_token": literals[pieces.eos_id()],
        "pad_token": literals[pieces.eos_id()],
        "tokenizer_class": "InternLM2Tokenizer",
        "unk_token": literals[pieces.unk_id()],
    }


def model_config(pieces: spm.SentencePieceProcessor) -> dict[str, Any]:
    """config.json, with the keys of POLAR-7B's; `untrained` makes the command line say what the rewards are worth."""
    return {
        "architectures": ["InternLM2ForRewardModel"],
        "attn_implementation": "eager",
        "bias": False,
        "bos_token_id": pieces.bos_id(),
        "eos_token_id": pieces.eos_id(),
        "hidden_act": "silu",
        "hidden_size": HIDDEN_SIZE,
        "initializer_range": EMBEDDING_STD,
        "intermediate_size": INTERMEDIATE_SIZE,
        "max_position_embeddings": 32768,
        "model_type": "internlm2",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KEY_VALUE_HEADS,
        "pad_token_id": pieces.eos_id(),
        "pretraining_tp": 1,
        "reward_token_id": pieces.PieceToId(unused_token(SCORE_TOKEN)),
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 2.0, "type": "dynamic"},
        "rope_theta": 1000000,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "untrained": True,
        "use_cache": True,
        "vocab_size": VOCABULARY_SIZE,
    }


def tensor_shapes() -> dict[str, tuple[int, ...]]:
    """Name to shape of every tensor, in InternLM2's layout.

    Rows of `wqkv` run over key-value groups, each with its query heads, then its key head, then its value head.
    """
    head_size = HIDDEN_SIZE // HEADS
    shapes: dict[str, tuple[int, ...]] = {"model.tok_embeddings.weight": (VOCABULARY_SIZE, HIDDEN_SIZE)}
    for layer in range(LAYERS):
        shapes |= {
            f"model.layers.{layer}.attention_norm.weight": (HIDDEN_SIZE,),
            f"model.layers.{layer}.attention.wqkv.weight": ((HEADS + 2 * KEY_VALUE_HEADS) * head_size, HIDDEN_SIZE),
            f"model.layers.{layer}.attention.wo.weight": (HIDDEN_SIZE, HEADS * head_size),
            f"model.layers.{layer}.ffn_norm.weight": (HIDDEN_SIZE,),
            f"model.layers.{layer}.feed_forward.w1.weight": (INTERMEDIATE_SIZE, HIDDEN_SIZE),
            f"model.layers.{layer}.feed_forward.w2.weight": (HIDDEN_SIZE, INTERMEDIATE_SIZE),
            f"model.layers.{layer}.feed_forward.w3.weight": (INTERMEDIATE_SIZE, HIDDEN_SIZE),
        }
    return shapes | {"model.norm.weight": (HIDDEN_SIZE,), "v_head.weight": (1, HIDDEN_SIZE)}


def random_weights(seed: int) -> dict[str, torch.Tensor]:
    """Untrained weights: norms at 1, matrices normal with a variance of one over their inputs."""
    generator = torch.Generator().manual_seed(seed)
    stds = {"model.tok_embeddings.weight": EMBEDDING_STD, "v_head.weight": HEAD_STD}
    weights = {}
    for name, shape in tensor_shapes().items():
        if len(shape) == 1:
            values = torch.ones(shape)
        else:
            values = torch.randn(shape, generator=generator) * stds.get(name, shape[1] ** -0.5)
        weights[name] = values.to(torch.bfloat16)
    return weights


def model_card(corpora: Sequence[Corpus], sample: Sample, tokens_per_character: dict[str, float], seed: int) -> str:
    """README.md of the checkpoint."""
    sampled = {text for texts in sample.texts.values() for text in texts}
    rows = []
    for corpus in corpora:
        used = [text for text in corpus.texts if text in sampled]
        licence = corpus.provenance.get("licence", "not stated")
        rows.append(f"| {corpus.name} | {len(used):,} | {sum(map(len, used)):,} | {_sources(corpus)} | {licence} |")
    command = " \\\n    ".join(
        [f"python jobs/make_default_checkpoint.py --seed {seed}", *(f"--corpus {corpus.name}" for corpus in corpora)]
    )
    parameters = sum(torch.Size(shape).numel() for shape in tensor_shapes().values())
    size = f"{LAYERS} layers of width {HIDDEN_SIZE}, {HEADS} query and {KEY_VALUE_HEADS} key-value heads"
    return f"""\
---
license: apache-2.0
language: [en, zh]
---

# polar-tiny

**The weights are untrained: random numbers from seed {seed}. The rewards mean nothing yet.** The checkpoint lets every
part of polar_ray run, from text to reward, without a download; do not rank anything by it.

It has the layout of a published POLAR reward model (`InternLM2ForRewardModel`) and is loaded by the same code.

| file | what it is |
|---|---|
| config.json | {size}; {parameters:,} parameters |
| model.safetensors | the weights, bfloat16, under InternLM2's names; query, key and value fused in `wqkv` |
| tokenizer.model | SentencePiece BPE, {VOCABULARY_SIZE:,} pieces, byte fallback; trained, on the data below |
| tokenizer_config.json | the control tokens, declared as POLAR declares them |

Licence: Apache-2.0.

## The tokenizer

Trained on {CHARACTERS_PER_LANGUAGE:,} characters each of English and Chinese. Tokens per character on other texts of
the same files: English {tokens_per_character["en"]:.2f}, Chinese {tokens_per_character["zh"]:.2f}.

| file | texts | characters | source | licence |
|---|---|---|---|---|
{chr(10).join(rows)}

## How it was made

With sentencepiece {version("sentencepiece")}, torch {version("torch")} and safetensors {version("safetensors")}:

```
{command}
```
"""


def _sources(corpus: Corpus) -> str:
    repositories = corpus.provenance.get("sources") or [corpus.provenance.get("repo", "not stated")]
    return ", ".join(repositories)


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _take(texts: Iterator[str], characters: int) -> Iterator[str]:
    while characters > 0 and (text := next(texts, None)) is not None:
        characters -= len(text)
        yield text


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def main(
    corpus: Annotated[
        list[Path],
        typer.Option(
            help="Parquet file to learn the tokenizer's pieces from: its columns prompt, reference, output, chosen and "
            "rejected, as far as it has them. Repeat for several. The model card quotes the schema metadata key "
            "`provenance` (JSON: repo or sources, licence).",
            exists=True,
            dir_okay=False,
        ),
    ],
    output: Annotated[
        Path, typer.Option(help="Folder to write.", file_okay=False, show_default="polar_ray/checkpoints/polar-tiny")
    ] = DEFAULT_OUTPUT,
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that is already there.")] = False,
) -> None:
    """Train a small tokenizer and write an untrained POLAR checkpoint around it."""
    if (output / "model.safetensors").exists() and not overwrite:
        raise typer.BadParameter(
            "a checkpoint is already there; choose another folder or add --overwrite", param_hint="--output"
        )
    corpora = read_corpora(corpus)
    sample = draw_sample(corpora)
    tokenizer = train_tokenizer(itertools.chain(*sample.texts.values()))
    pieces = spm.SentencePieceProcessor(model_proto=tokenizer)
    tokens_per_character = {
        language: sum(map(len, pieces.Encode(texts))) / sum(map(len, texts))
        for language, texts in sample.held_out.items()
    }
    files = {
        "README.md": model_card(corpora, sample, tokens_per_character, seed).encode(),
        "config.json": _json(model_config(pieces)),
        "model.safetensors": save(random_weights(seed), metadata={"format": "pt"}),
        "tokenizer.model": tokenizer,
        "tokenizer_config.json": _json(tokenizer_config(pieces)),
    }
    output.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (output / name).write_bytes(content)
    for language, value in tokens_per_character.items():
        print(f"{language}: {value:.4f} tokens per character")
    for file in sorted(output.iterdir()):
        print(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.stat().st_size:>9,}  {file.name}")


if __name__ == "__main__":
    typer.run(main)
