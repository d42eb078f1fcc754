"""Every test that cluster/SECURITY.md names is there."""

import ast
import re
from pathlib import Path

PROJECT = Path(__file__).parents[2]
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (PROJECT / "cluster" / "SECURITY.md").read_text())


def test_every_claim_names_a_test_that_exists():
    assert len(NAMED) > 20
    for file, name in NAMED:
        functions = [node.name for node in ast.parse((PROJECT / file).read_text()).body if hasattr(node, "name")]
        assert name in functions, f"{file}::{name}"
