"""Real groups, read from a folder of public data that stays outside the project, and what of it is held out.

Questions and prompts are held out whole, by a hash of their id, so that every file and every stage agrees on them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any, Literal

import pyarrow.parquet as pq
from likeness import Likeness
from synthetic import Drawn, Graded

Wrapper = Literal["sft", "pretrain"]

HELD_OUT_SHARE = 0.12

LONGEST_ENGLISH_TEXT = 1500
LONGEST_CHINESE_TEXT = 800
"""Characters of the texts that pieces are cut from; longer ones are mostly repetition."""

LONGEST_ANSWERS = (500, 900, 2200)
"""Characters. Answers that are compared for likeness are drawn below one of these, so that most groups cost little."""

CHOICES_OF_THE_TEACHER = 6000

ANSWERS_GRADED = 15
"""Of them, in the order of their likeness, every third one is kept: neighbours are too close to call."""

PROMPTS_TRIED = 1000

_SENTENCE = re.compile(r"[^.!?\n]+[.!?\n]*\s*")


@dataclass(frozen=True, slots=True)
class FilePair:
    """A pair as one of the files has it; held out if its question is."""

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
        """A group of `gsm8k`, `chinese`, `same-policy`, `alike` or `mixed`."""
        if source == "same-policy":
            return _same_policy(rng, rng.choice(self._policies))
        if source == "alike":
            return self._alike(rng)
        if source == "mixed":
            return _mixed(rng, rng.choice(self._policies))
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

    def held_out_pairs(self) -> Iterator[FilePair]:
        """Pairs to evaluate on: right and wrong solutions, Chinese answers, and same or another policy."""
        columns = ["group_id", "prompt", "reference", "chosen", "rejected"]
        for source, file in (("gsm8k", "gsm8k_pref.parquet"), ("chinese", "zh_pref.parquet")):
            for row in self._read(file, columns):
                if held_out(row["group_id"]) and row["reference"] is not None:
                    yield FilePair(source, *(row[column] for column in columns))
        yield from (pair for pair in self.same_policy_pairs() if held_out(pair.question))

    def same_policy_pairs(self) -> Iterator[FilePair]:
        """Pairs of an output by the reference's policy and one by another, held out or not."""
        rows = {row["row"]: row for row in self._policy_rows}
        for row in self._read("polar_pairs.parquet", ["prompt_id", "reference_row", "chosen_row", "rejected_row"]):
            reference, chosen, rejected = (rows[row[f"{part}_row"]] for part in ("reference", "chosen", "rejected"))
            outputs = reference["output"], chosen["output"], rejected["output"]
            yield FilePair("same-policy", row["prompt_id"], reference["prompt"], *outputs, wrapper="pretrain")

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

    def _alike(self, rng: Random) -> Drawn:
        """Answers of any policies to a prompt, graded by how alike the reference the teacher finds them."""
        for _ in range(PROMPTS_TRIED):
            longest = rng.choice(LONGEST_ANSWERS)
            policies = rng.choice(self._policies)
            rows = [row for rows in policies.values() for row in rows if len(row["output"]) <= longest]
            if len(rows) > ANSWERS_GRADED:
                break
        else:
            raise ValueError(
                f"multi_policy.parquet: no prompt has {ANSWERS_GRADED + 1} answers of {longest} characters"
            )
        reference, *others = rng.sample(rows, ANSWERS_GRADED + 1)
        kin = [row for row in policies[reference["policy"]] if row in rows and row not in (reference, *others)]
        answers = kin[:1] + others[: ANSWERS_GRADED - len(kin[:1])]
        grades = self._teacher.grades(reference["row"], [row["row"] for row in answers])
        ranked = sorted(zip(grades.tolist(), (row["output"] for row in answers), strict=True))
        kept = ranked[rng.randrange(3) :: 3]
        return reference["prompt"], reference["output"], [(output, grade) for grade, output in kept]

    @cached_property
    def _teacher(self) -> Likeness:
        """Fitted on the prompts that are not held out."""
        rng = Random(0)
        choices: list[tuple[int, int, int]] = []
        while len(choices) < CHOICES_OF_THE_TEACHER:
            policies = rng.choice(self._policies)
            policy, reference, chosen = _two_of_one_policy(rng, policies)
            other = rng.choice([other for other in policies if other != policy])
            choices.append((reference["row"], chosen["row"], rng.choice(policies[other])["row"]))
        rows = self._policy_rows
        if [row["row"] for row in rows] != list(range(len(rows))):
            raise ValueError("multi_policy.parquet: expected rows numbered from 0 in order")
        return Likeness([row["output"] for row in rows], [row["ended"] for row in rows], choices)

    @cached_property
    def _policy_rows(self) -> list[dict[str, Any]]:
        return self._read("multi_policy.parquet", ["row", "prompt_id", "prompt", "policy", "family", "output", "ended"])

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


def _two_of_one_policy(
    rng: Random, policies: dict[str, list[dict[str, Any]]]
) -> tuple[str, dict[str, Any], dict[str, Any]]:
    policy = rng.choice([policy for policy, rows in policies.items() if len(rows) > 1])
    reference, chosen = rng.sample(policies[policy], 2)
    return policy, reference, chosen


def _same_policy(rng: Random, policies: dict[str, list[dict[str, Any]]]) -> Drawn:
    """Two answers of one policy, as reference and as the better output; below it others', kin and strangers."""
    policy, reference, chosen = _two_of_one_policy(rng, policies)
    kin: list[str] = []
    strangers: list[str] = []
    for other, rows in policies.items():
        if other != policy:
            (kin if rows[0]["family"] == reference["family"] else strangers).append(other)
    others = rng.sample(kin, min(2, len(kin))) + rng.sample(strangers, min(3, len(strangers)))
    outputs = [(chosen["output"], 1.0), *((rng.choice(policies[other])["output"], 0.0) for other in others)]
    return reference["prompt"], reference["output"], outputs


def _mixed(rng: Random, policies: dict[str, list[dict[str, Any]]]) -> Drawn:
    """Sentences of the reference among another answer's, in any order: the more of them, the better."""
    rows = [row for rows in policies.values() for row in rows]
    reference, other = rng.sample(rows, 2)
    longest = rng.choice((150, 300, 500))
    wanted, strange = (_SENTENCE.findall(row["output"][:longest]) for row in (reference, other))

    def mixture(share: float) -> str:
        kept = rng.sample(wanted, round(share * len(wanted)))
        filled = kept + rng.sample(strange, round((1 - share) * len(strange)))
        rng.shuffle(filled)
        return "".join(filled)

    shares = (0.0, 0.25, 0.5, 0.75, 1.0)
    return reference["prompt"], "".join(wanted), [(mixture(share), share) for share in shares]
