"""Real groups, read from a folder of public data that stays outside the project, and what of it is held out.

Questions and prompts are held out whole, by a hash of their id, so that every file and every stage agrees on them.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any, Literal

import pyarrow.parquet as pq
from synthetic import Drawn, Graded

Wrapper = Literal["sft", "pretrain"]

HELD_OUT_SHARE = 0.12

LONGEST_ENGLISH_TEXT = 1500
LONGEST_CHINESE_TEXT = 800
"""Characters of the texts that pieces are cut from; longer ones are mostly repetition."""


@dataclass(frozen=True, slots=True)
class HeldOutPair:
    """A pair that no stage trains on."""

    source: str
    question: str
    prompt: str
    reference: str
    chosen: str
    rejected: str
    wrapper: Wrapper = "sft"


def held_out(key: str, share: float = HELD_OUT_SHARE) -> bool:
    """Whether the question or prompt with this id is kept from training."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) / 2**32 < share


class Sources:
    """The files of one folder, each read when it is first needed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.provenance: dict[str, Any] = {}
        """File to where it comes from and under which licence, for every file read so far."""

    def draw(self, rng: Random, source: str) -> Drawn:
        """A group of `gsm8k`, `chinese` or `same-policy`."""
        if source == "same-policy":
            return _same_policy(rng, rng.choice(self._policies))
        prompt, reference, outputs = rng.choice(self._gsm8k if source == "gsm8k" else self._chinese)
        return prompt, reference, _some(rng, outputs)

    def piece(self, rng: Random, zh: bool) -> str:
        """A piece of a text that some model wrote."""
        text = rng.choice(self._chinese_texts if zh else self._english_texts)
        length = rng.choice((20, 40, 80, 150) if zh else (40, 80, 160, 300))
        start = rng.randrange(max(1, len(text) - length))
        piece = text[start : start + length]
        return (piece if zh else piece[piece.find(" ") + 1 :]).strip() or "text"

    @cached_property
    def questions(self) -> list[tuple[str, str]]:
        """Prompt and worked solution of GSM8K's questions."""
        rows = self._training_rows("gsm8k_qa.parquet", ["group_id", "prompt", "reference"])
        return [(row["prompt"], row["reference"]) for row in rows]

    def held_out_pairs(self) -> Iterator[HeldOutPair]:
        """Pairs to evaluate on: right and wrong solutions, Chinese answers, and same or another policy."""
        columns = ["group_id", "prompt", "reference", "chosen", "rejected"]
        for source, file in (("gsm8k", "gsm8k_pref.parquet"), ("chinese", "zh_pref.parquet")):
            for row in self._read(file, columns):
                if held_out(row["group_id"]) and row["reference"] is not None:
                    yield HeldOutPair(source, *(row[column] for column in columns))
        outputs = {row["row"]: row for row in self._policy_rows}
        for row in self._read("polar_pairs.parquet", ["prompt_id", "reference_row", "chosen_row", "rejected_row"]):
            if held_out(row["prompt_id"]):
                reference, chosen, rejected = (
                    outputs[row[f"{part}_row"]]["output"] for part in ("reference", "chosen", "rejected")
                )
                prompt = outputs[row["reference_row"]]["prompt"]
                yield HeldOutPair("same-policy", row["prompt_id"], prompt, reference, chosen, rejected, "pretrain")

    @cached_property
    def _gsm8k(self) -> list[Drawn]:
        columns = ["group_id", "prompt", "reference", "output", "label_correct"]
        rows = [
            row
            for file in ("gsm8k_multi_policy.parquet", "gsm8k_triples.parquet")
            for row in self._training_rows(file, columns)
        ]
        return _grouped([(row, float(row["label_correct"])) for row in rows])

    @cached_property
    def _chinese(self) -> list[Drawn]:
        columns = ["group_id", "prompt", "reference", "output", "label_correct", "human_score"]
        rows = self._training_rows("gaokao_zh_triples.parquet", columns)
        grades = (row["human_score"] if row["label_correct"] is None else row["label_correct"] for row in rows)
        return _grouped([(row, float(grade)) for row, grade in zip(rows, grades, strict=True) if grade is not None])

    @cached_property
    def _policy_rows(self) -> list[dict[str, Any]]:
        return self._read("multi_policy.parquet", ["row", "prompt_id", "prompt", "policy", "family", "output"])

    @cached_property
    def _policies(self) -> list[dict[str, list[dict[str, Any]]]]:
        """Of every prompt, policy to its outputs; only prompts that some policy answered twice."""
        by_prompt: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
        for row in self._policy_rows:
            if not held_out(row["prompt_id"]) and row["output"].strip():
                by_prompt[row["prompt_id"]][row["policy"]].append(row)
        return [policies for policies in by_prompt.values() if any(len(rows) > 1 for rows in policies.values())]

    @cached_property
    def _english_texts(self) -> list[str]:
        return [
            row["output"]
            for row in self._policy_rows[::3]
            if not held_out(row["prompt_id"]) and len(row["output"]) < LONGEST_ENGLISH_TEXT
        ]

    @cached_property
    def _chinese_texts(self) -> list[str]:
        texts = (output for _, _, outputs in self._chinese for output, _ in outputs[:3])
        return [text for text in texts if len(text) < LONGEST_CHINESE_TEXT]

    def _training_rows(self, file: str, columns: list[str]) -> list[dict[str, Any]]:
        return [row for row in self._read(file, columns) if not held_out(row["group_id"])]

    def _read(self, file: str, columns: list[str]) -> list[dict[str, Any]]:
        table = pq.read_table(self._folder / file, columns=columns)
        self.provenance[file] = json.loads((table.schema.metadata or {}).get(b"provenance", b"{}"))
        rows: list[dict[str, Any]] = table.to_pylist()
        return rows


def _grouped(graded: Sequence[tuple[dict[str, Any], float]]) -> list[Drawn]:
    """Rows by question and reference; only groups whose outputs differ in grade."""
    groups: dict[tuple[str, str, str], list[Graded]] = defaultdict(list)
    for row, grade in graded:
        if row["output"]:
            groups[row["group_id"], row["prompt"], row["reference"]].append((row["output"], grade))
    return [
        (prompt, reference, outputs)
        for (_, prompt, reference), outputs in groups.items()
        if len({grade for _, grade in outputs}) > 1
    ]


def _some(rng: Random, outputs: Sequence[Graded]) -> list[Graded]:
    """At most three outputs of each of at most three grades."""
    by_grade: dict[float, list[Graded]] = defaultdict(list)
    for output in rng.sample(outputs, len(outputs)):
        by_grade[output[1]].append(output)
    grades = sorted(by_grade)
    return [output for grade in rng.sample(grades, min(3, len(grades))) for output in by_grade[grade][:3]]


def _same_policy(rng: Random, policies: dict[str, list[dict[str, Any]]]) -> Drawn:
    """Two answers of one policy, as reference and as the better output; below it others', kin and strangers."""
    policy = rng.choice([policy for policy, rows in policies.items() if len(rows) > 1])
    reference, chosen = rng.sample(policies[policy], 2)
    kin: list[str] = []
    strangers: list[str] = []
    for other, rows in policies.items():
        if other != policy:
            (kin if rows[0]["family"] == reference["family"] else strangers).append(other)
    others = rng.sample(kin, min(2, len(kin))) + rng.sample(strangers, min(3, len(strangers)))
    outputs = [(chosen["output"], 1.0), *((rng.choice(policies[other])["output"], 0.0) for other in others)]
    return reference["prompt"], reference["output"], outputs
