"""Imports point down, and heavy libraries stay in their places. The rows are design, the test keeps them true."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "polar_ray"
MODULES = sorted(PACKAGE.rglob("*.py"))

LAYERS = [
    ["errors"],
    ["triples", "config"],
    [
        "cluster",
        "columns",
        "deployment",
        "health",
        "metrics",
        "planning",
        "policy_text",
        "ray_export",
        "report",
        "stages",
        "tracing",
        "wire",
    ],
    ["client"],
    ["encoding", "model"],
    ["engines"],
    ["scoring", "receipts"],
    ["corpus", "serving", "trainers"],
    ["bench", "evaluation", "training"],
    ["verification"],
    ["cli"],
    ["__init__", "__main__"],
]
ROW = {name: row for row, names in enumerate(LAYERS) for name in names}

HEAVY = {"ray", "torch", "transformers", "safetensors", "sglang", "vllm", "lmdeploy"}
MAY_IMPORT = {
    "cluster.py": {"ray"},
    "ray_export.py": {"ray"},
    "corpus/actor.py": {"ray"},
    "corpus/run.py": {"ray"},
    "serving/app.py": {"ray"},
    "serving/autoscaling.py": {"ray"},
    "cli/serve.py": {"ray"},
    "serving/fleet.py": {"ray"},
    "serving/replica.py": {"ray"},
    "serving/starting.py": {"ray"},
    "training/fit.py": {"ray"},
    "training/job.py": {"ray"},
    "training/prepare.py": {"ray"},
    "training/worker.py": {"ray", "torch", "safetensors"},
    "training/adapters.py": {"torch"},
    "training/export.py": {"torch"},
    "training/learner.py": {"torch"},
    "training/loss.py": {"torch"},
    "training/packed.py": {"torch", "transformers"},
    "model": {"torch", "transformers", "safetensors"},
    "engines/torch": {"torch"},
    "engines/vllm.py": {"torch"},
    "bench": {"torch", "transformers", "safetensors"},
}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, *, at_import_time: bool = False) -> set[str]:
    """Absolute names that a module imports; at import time only those outside functions and type checking."""
    tree = ast.parse(path.read_text())
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        is_for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if at_import_time and (is_function or is_for_types):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found.update({node.module, *(f"{node.module}.{alias.name}" for alias in node.names)})
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    part = part_of(path)
    targets = {name.split(".")[1] for name in imports(path) if name.startswith("polar_ray.")} - {part}
    upward = sorted(target for target in targets if target in ROW and ROW[target] >= ROW[part])
    assert not upward, f"{part} may not import {upward}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_heavy_libraries_stay_in_their_places(path):
    place = str(path.relative_to(PACKAGE))
    allowed = {library for prefix, libraries in MAY_IMPORT.items() if place.startswith(prefix) for library in libraries}
    heavy = {name.split(".")[0] for name in imports(path, at_import_time=True)} & HEAVY
    assert heavy <= allowed


def test_every_module_has_its_row():
    assert {part_of(path) for path in MODULES} <= set(ROW)


def test_importing_the_package_is_light():
    code = "import sys, polar_ray; print([m for m in ('ray', 'torch', 'transformers', 'pyarrow') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_actor_that_runs_no_model_loads_no_torch():
    """It is a second of every worker's start, and of every command."""
    code = "import sys, polar_ray.corpus.actor; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_remote_code_and_pickles_are_never_loaded():
    for path in MODULES:
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert not [call for call in calls if any(keyword.arg == "trust_remote_code" for keyword in call.keywords)], (
            path
        )
        assert not [call for call in calls if ast.unparse(call.func) in ("torch.load", "eval", "exec")], path
        assert not imports(path) & {"pickle", "cloudpickle", "dill", "marshal"}, path
