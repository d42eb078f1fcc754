"""A checkpoint's SentencePiece model and its control tokens, read without remote code.

Upstream goes through a transformers tokenizer, whose class decides silently what the model sees: the slow one deletes
special literals and cleans up spaces, the fast one splits the score token into seven ordinary pieces. Here the pieces
come from SentencePiece alone and control ids are only ever put in by `encode.py`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sentencepiece import SentencePieceProcessor

from polar_ray.errors import CheckpointError

SEPARATOR = "<|reward|>"
"""The special token between the two halves of a triple; POLAR gives the name to the slot `[UNUSED_TOKEN_0]`."""

DEFAULT_SCORE_ID = 92527
"""`reward_token_id` where config.json does not say: the class default of upstream's InternLM2Config."""


class PolarTokenizer:
    """Text to pieces, and the ids that only the encoder may place.

    - `bos_id`, `separator_id`, `score_id`: the three ids of a POLAR sequence's frame;
    - `special_ids`: what upstream's tokenizer drops when it decodes (every token declared special);
    - `control_ids`: `special_ids` and `score_id`: none of them may come from a text;
    - `digest`: sha256 over the files that determine the above.

    Raises `CheckpointError` when the folder lacks a tokenizer or its tokens contradict each other.
    """

    def __init__(self, folder: Path) -> None:
        model_file = folder / "tokenizer.model"
        if not model_file.is_file():
            raise CheckpointError(
                f"{folder}: no tokenizer.model; POLAR needs its SentencePiece model", folder=str(folder)
            )
        self._pieces = SentencePieceProcessor()
        try:
            self._pieces.Load(str(model_file))
        except (RuntimeError, OSError) as error:
            raise CheckpointError(f"{model_file}: SentencePiece cannot read it ({error})") from None
        settings = _read_json(folder / "tokenizer_config.json")
        config = _read_json(folder / "config.json")
        literals = _special_literals(settings)
        if SEPARATOR not in literals:
            raise CheckpointError(
                f"{folder}/tokenizer_config.json: declares no {SEPARATOR}; this is not a POLAR tokenizer"
            )
        self.bos_id: int = self._pieces.bos_id()
        self.separator_id = literals[SEPARATOR]
        self.score_id = int(config.get("reward_token_id") or DEFAULT_SCORE_ID)
        self.vocab_size: int = self._pieces.GetPieceSize()
        self.special_ids = frozenset(
            {*literals.values(), self.bos_id, self._pieces.eos_id(), self._pieces.unk_id()} - {-1}
        )
        self.control_ids = self.special_ids | {self.score_id}
        beyond = sorted(id for id in self.control_ids if not 0 <= id < self.vocab_size)
        if beyond:
            raise CheckpointError(f"{folder}: control token {beyond[0]} lies outside the {self.vocab_size} pieces")
        if self.vocab_size > config.get("vocab_size", self.vocab_size):
            raise CheckpointError(
                f"{folder}: the tokenizer has {self.vocab_size} pieces and the model {config['vocab_size']}; they do "
                "not belong together"
            )
        if self.bos_id < 0:
            raise CheckpointError(f"{model_file}: has no beginning-of-sequence token; POLAR's sequences begin with one")
        if self.separator_id == self.score_id:
            raise CheckpointError(
                f"{folder}: separator and score token are both {self.score_id}, as in InternLM2-reward; not a POLAR"
            )
        self._literals = literals
        self.digest = _digest(model_file, literals, self.score_id)

    @cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """Every spelling that becomes a special id: declared literals, and the pieces that have such an id."""
        pieces = {self._pieces.IdToPiece(id) for id in self.special_ids}
        spellings = sorted({*self._literals, *pieces}, key=lambda literal: (-len(literal), literal))
        return re.compile("|".join(re.escape(literal) for literal in spellings))

    @cached_property
    def is_control(self) -> npt.NDArray[np.bool_]:
        """Lookup by id: whether it is a control id."""
        table = np.zeros(self.vocab_size, dtype=np.bool_)
        table[list(self.control_ids)] = True
        return table

    @cached_property
    def score_literal(self) -> str:
        """How the score token is spelt in a rendered text."""
        return self.piece(self.score_id)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """SentencePiece ids of each text, without any frame. Ids of user-defined pieces may be among them."""
        ids: list[list[int]] = self._pieces.Encode(list(texts), out_type=int)
        return ids

    def encode_special(self, text: str) -> list[int]:
        """Ids as upstream's slow tokenizer gives them with special tokens on: BOS, then text with literals as ids.

        Upstream measures lengths on these.
        """
        ids = [self.bos_id]
        end = 0
        for match in self.special_pattern.finditer(text):
            ids += self._pieces.Encode(text[end : match.start()], out_type=int)
            ids.append(self._literals.get(match.group(), self._pieces.PieceToId(match.group())))
            end = match.end()
        return ids + list(self._pieces.Encode(text[end:], out_type=int))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ordinary ids; bytes that are not UTF-8, as a cut can leave, become U+FFFD."""
        text: str = self._pieces.Decode(list(ids))
        return text

    def piece(self, id: int) -> str:
        """How an id is written for people: the declared literal where there is one, else SentencePiece's piece."""
        named = {value: literal for literal, value in self._literals.items()}
        piece: str = named.get(id) or self._pieces.IdToPiece(id)
        return piece


def _special_literals(settings: dict[str, Any]) -> dict[str, int]:
    """Literal to id of every token that tokenizer_config.json declares special."""
    declared = settings.get("added_tokens_decoder", {})
    return {str(token.get("content")): int(id) for id, token in declared.items() if token.get("special", False)}


def _digest(model_file: Path, literals: dict[str, int], score_id: int) -> str:
    frame = json.dumps({"literals": sorted(literals.items()), "score_id": score_id}).encode()
    return hashlib.sha256(hashlib.sha256(model_file.read_bytes()).digest() + frame).hexdigest()


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{file.parent}: no {file.name}; give a folder in InternLM2's layout") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found {type(content).__name__}")
    return content
