"""Options that several verbs have, each said once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

Model = Annotated[
    str | None, typer.Option(help="Checkpoint folder or hub name. Left out: the small one that ships here.")
]
Engine = Annotated[
    str | None, typer.Option(help="torch, vllm, sglang, lmdeploy, serve for an endpoint, or fake for a dry run.")
]
Address = Annotated[str | None, typer.Option(help="Of a running endpoint or engine: host:port or URL.")]
Dtype = Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")]
PromptColumn = Annotated[str | None, typer.Option(help="Column that holds the prompt.")]
ReferenceColumn = Annotated[str | None, typer.Option(help="Column that holds the reference.")]
ConfigFile = Annotated[Path | None, typer.Option(help="TOML file of settings; flags win over it.")]
Assignments = Annotated[list[str] | None, typer.Option("--set", help="Any setting, as section.key=value. Repeatable.")]


def engine_settings(named: str) -> dict[str, Any]:
    """Settings of `KIND`, `KIND=PYTHON` or `KIND=ADDRESS`; what has a slash in it and no scheme is an interpreter."""
    kind, _, where = named.partition("=")
    is_python = "/" in where and "://" not in where
    return {
        "engine__kind": kind,
        "engine__python": where if is_python else None,
        "engine__address": None if is_python else where or None,
    }
