"""Rewards that come with a model: read from the examples in its own card, or from a JSON file of them.

Cards of POLAR models show Python that is run against a server and what it printed. The Python is parsed for its literal
texts and never run; what was printed is matched to them by the outputs' texts, or by the order of the rows.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polar_ray.errors import CheckpointError, InputError, TripleError
from polar_ray.triples import Triple

CARDS = "README*.md"

_BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_PRINTED = re.compile(r"^Output: (.*?)\nReward: (\S+)$", re.MULTILINE | re.DOTALL)
_ASKED = re.compile(r"""server_type=["'](\w+)["']""")
_LISTED = re.compile(r"^\s*# (\[[-+.,\deE\s]*\])", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Published:
    """A triple and the reward that somebody's engine gave it."""

    triple: Triple
    reward: float
    source: str
    """Where it stands: the file's name."""

    engine: str | None = None
    """What computed it, where that is said."""


def read_cards(folder: Path) -> list[Published]:
    """What the README files of a checkpoint's folder publish, each triple once per reward; none is no error."""
    found: dict[tuple[Any, ...], Published] = {}
    for file in sorted(folder.glob(CARDS)):
        for row in read_card(file.read_text(encoding="utf-8", errors="replace"), file.name):
            found.setdefault((str(row.triple), row.reward), row)
    return list(found.values())


def read_card(text: str, source: str) -> Iterator[Published]:
    """The triples in a card's Python whose rewards are printed after it."""
    latest: list[Triple] = []
    asked: str | None = None
    for match in _BLOCK.finditer(text):
        kind, block = match.group(1).lower(), match.group(2)
        if kind == "python":
            latest = _triples(block) or latest
            named = _ASKED.search(block)
            asked = named.group(1) if named else None
            for listed in _LISTED.finditer(block):
                rewards = json.loads(listed.group(1))
                if len(rewards) == len(latest):
                    engine = "transformers" if "AutoModel" in block else None
                    for triple, reward in zip(latest, rewards, strict=True):
                        yield Published(triple, float(reward), source, engine)
        else:
            by_output = {str(triple.output).strip(): triple for triple in latest}
            for output, reward in _PRINTED.findall(block):
                if output.strip() in by_output:
                    yield Published(by_output[output.strip()], float(reward), source, asked)


def read_goldens(file: Path) -> list[Published]:
    """The rows of a JSON file: a list of objects with `prompt`, `reference`, `output` and `reward`, and `engine` if
    known; other keys are left alone. Raises `InputError` naming row and field."""
    try:
        rows = json.loads(file.read_bytes())
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise InputError(f"{file}: not JSON ({error})") from None
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{file}: expected a list of objects with prompt, reference, output and reward")
    return [_golden(row, f"{file}: row {number}", file.name) for number, row in enumerate(rows)]


def _golden(row: Any, place: str, source: str) -> Published:
    if not isinstance(row, dict):
        raise InputError(f"{place}: expected an object, found {type(row).__name__}")
    reward = row.get("reward")
    if isinstance(reward, bool) or not isinstance(reward, int | float):
        raise InputError(f"{place}: reward = {reward!r}: expected a number")
    try:
        triple = Triple.from_dict({name: row.get(name) for name in ("prompt", "reference", "output")})
    except TripleError as error:
        raise InputError(f"{place}: {error}") from None
    engine = row.get("engine")
    return Published(triple, float(reward), source, engine if isinstance(engine, str) else None)


def _triples(code: str) -> list[Triple]:
    """The triples that `code` spells out: a list `data`, or `prompt`, `reference` and a list `outputs`."""
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return []
    named: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            try:
                named[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:  # something computed; `data` made from `outputs`, for one
                continue
    if isinstance(outputs := named.get("outputs"), list):
        prompt, reference = named.get("prompt"), named.get("reference")
        rows = [{"prompt": prompt, "reference": reference, "output": output} for output in outputs]
    elif isinstance(data := named.get("data"), list):
        rows = [row for row in data if isinstance(row, dict)]
    else:
        return []
    try:
        return [Triple.from_dict(row) for row in rows]
    except TripleError:  # the card's code is about something else
        return []


def examples_of(folder: Path, goldens: Path | None) -> list[Published]:
    """The rows of `goldens` if given, else those of the model's card. Raises `InputError` for a bad file and
    `CheckpointError` where there is no folder to look into."""
    if goldens is not None:
        return read_goldens(goldens)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    return read_cards(folder)
