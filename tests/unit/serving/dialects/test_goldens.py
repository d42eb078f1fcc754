"""Every contract as tests/goldens/dialects has it: what its client sends becomes these rows, and this reply."""

import json
from pathlib import Path

import pytest

from polar_ray.serving.dialects import DIALECTS
from polar_ray.serving.dialects.base import Answer
from polar_ray.triples import Rendered, Scored, TokenIds, Triple

FOLDER = Path(__file__).parents[3] / "goldens" / "dialects"
GOLDENS = {file.stem: json.loads(file.read_text()) for file in sorted(FOLDER.glob("*.json"))}
BY_PATH = {path: dialect for dialect in DIALECTS for path in dialect.paths}


def row_of(recorded):
    if "ids" in recorded:
        return TokenIds(recorded["ids"])
    return Rendered(recorded["text"]) if "text" in recorded else Triple(**recorded)


def reply_of(golden):
    scored = [Scored(reward, tokens=12) for reward in golden["rewards"]]
    answer = Answer(
        scored, "POLAR-7B", "0123456789abcdef" * 4, tokens=12 * len(scored), computed_tokens=20, seconds=0.25
    )
    return json.loads(json.dumps(BY_PATH[golden["path"]].write(golden["request"], answer)))


@pytest.mark.parametrize("golden", GOLDENS.values(), ids=GOLDENS)
def test_what_a_client_sends_becomes_these_rows(golden):
    assert BY_PATH[golden["path"]].read(golden["request"], {}) == [row_of(row) for row in golden["rows"]]


@pytest.mark.parametrize("golden", GOLDENS.values(), ids=GOLDENS)
def test_a_client_is_answered_in_this_shape(golden):
    reply = reply_of(golden)
    if isinstance(reply, dict) and "created" in reply:
        assert isinstance(reply["created"], int)
        reply["created"] = golden["reply"]["created"]
    assert reply == golden["reply"]


def test_every_dialect_has_a_golden():
    covered = {golden["path"] for golden in GOLDENS.values()}
    assert all(covered & set(dialect.paths) for dialect in DIALECTS)
