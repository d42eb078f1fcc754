"""Makes what the checkpoint that ships with polar_ray is trained from: a small tokenizer and weights to start with.

The folder has the files, names and shapes of a published POLAR checkpoint, so the code that loads one loads the other.
It has no `auto_map`: polar_ray never runs a checkpoint's code, and the file names it would point to are not there.

The same arguments and library versions give the same bytes.
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
import typer
from initial_weights import EMBEDDING_STD, initial_weights
from safetensors.torch import save

from polar_ray.model.architecture import CheckpointConfig

PROJECT = Path(__file__).resolve().parents[1]
DEFAULT_OUTPUT = PROJECT / "build" / "polar-tiny-base"
DEFAULT_TOKENIZER = PROJECT / "polar_ray" / "checkpoints" / "polar-tiny"
TOKENIZER_FILES = ("tokenizer.model", "tokenizer_config.json")

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

SEPARATOR = 0
"""Number of the unused token that separates the halves of a triple."""

DECLARED_TOKENS = {
    SEPARATOR: "<|reward|>",
    141: "<|plugin|>",
    142: "<|interpreter|>",
    143: "<|action_end|>",
    144: "<|action_start|>",
    145: "<|im_end|>",
    146: "<|im_start|>",
}
"""Number of the unused token to the name POLAR gives it."""

SCORE_TOKEN = 130
"""Number of the unused token whose position the reward is read from; POLAR gives it no name."""

HIDDEN_SIZE = 256
LAYERS = 4
HEADS = 8
KEY_VALUE_HEADS = 4
INTERMEDIATE_SIZE = 512


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


def make_tokenizer(corpora: Sequence[Corpus]) -> dict[str, bytes]:
    """The tokenizer's files, trained on a sample of the corpora."""
    sample = draw_sample(corpora)
    model = train_tokenizer(itertools.chain(*sample.texts.values()))
    pieces = spm.SentencePieceProcessor(model_proto=model)
    for language, texts in sample.held_out.items():
        print(f"{language}: {sum(map(len, pieces.Encode(texts))) / sum(map(len, texts)):.4f} tokens per character")
    return dict(zip(TOKENIZER_FILES, (model, _json(tokenizer_config(pieces))), strict=True))


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
        "torch_dtype": "float32",
        "untrained": True,
        "use_cache": True,
        "vocab_size": VOCABULARY_SIZE,
    }


def model_card(corpora: Sequence[Corpus], seed: int) -> str:
    """README.md of the checkpoint."""
    options = [f"--seed {seed}", *(f"--corpus {corpus.name}" for corpus in corpora)]
    trained_on = "".join(
        f"\n- {corpus.name}: {_sources(corpus)} ({corpus.provenance.get('licence', 'licence not stated')})"
        for corpus in corpora
    )
    tokenizer = f"trained on:\n{trained_on}" if corpora else "that of the checkpoint it was copied from."
    return f"""\
---
license: apache-2.0
language: [en, zh]
---

# polar-tiny-base

**Untrained: every reward is 0.** A start for `polar-ray train`, in the layout of a published POLAR reward model.
Written by `python jobs/make_default_checkpoint.py {" ".join(options)}` with torch {version("torch")}.

The tokenizer is {tokenizer}
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
        list[Path] | None,
        typer.Option(
            help="Parquet file to learn the tokenizer's pieces from: its columns prompt, reference, output, chosen and "
            "rejected, as far as it has them. Repeat for several. The model card quotes the schema metadata key "
            "`provenance` (JSON: repo or sources, licence). Left out, the tokenizer is copied.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    tokenizer: Annotated[
        Path,
        typer.Option(
            help="Checkpoint to copy the tokenizer of.",
            exists=True,
            file_okay=False,
            show_default="polar_ray/checkpoints/polar-tiny",
        ),
    ] = DEFAULT_TOKENIZER,
    output: Annotated[
        Path, typer.Option(help="Folder to write.", file_okay=False, show_default="build/polar-tiny-base")
    ] = DEFAULT_OUTPUT,
    seed: Annotated[int, typer.Option(help="Seed of the weights.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that is already there.")] = False,
) -> None:
    """Write an untrained POLAR checkpoint around a small tokenizer, trained or copied."""
    if (output / "model.safetensors").exists() and not overwrite:
        raise typer.BadParameter(
            "a checkpoint is already there; choose another folder or add --overwrite", param_hint="--output"
        )
    corpora = read_corpora(corpus or [])
    files = make_tokenizer(corpora) if corpora else {name: (tokenizer / name).read_bytes() for name in TOKENIZER_FILES}
    pieces = spm.SentencePieceProcessor(model_proto=files["tokenizer.model"])
    config = _json(model_config(pieces))
    weights = initial_weights(
        CheckpointConfig.from_json(config.decode()), seed, pieces.PieceToId(unused_token(SEPARATOR))
    )
    files |= {
        "README.md": model_card(corpora, seed).encode(),
        "config.json": config,
        "model.safetensors": save(weights, metadata={"format": "pt"}),
    }
    output.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (output / name).write_bytes(content)
    for file in sorted(output.iterdir()):
        print(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.stat().st_size:>9,}  {file.name}")


if __name__ == "__main__":
    typer.run(main)
