"""`polar-ray verify`: is this deployment right?"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from polar_ray.cli.options import Assignments, ConfigFile, Dtype, Model, engine_settings
from polar_ray.config import EngineConfig, ScoreConfig, load_config

if TYPE_CHECKING:
    from polar_ray.verification.published import Published
    from polar_ray.verification.run import EngineCheck, Verification

FIGURE_WIDTH = 12
"""Of a column of rewards, with the gap behind it."""


def verify(
    model: Model = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            help="torch, vllm, sglang, lmdeploy or serve; as KIND=PYTHON with the interpreter that has it, or as "
            "KIND=HOST:PORT of a server that runs. Repeatable. Left out: torch."
        ),
    ] = None,
    goldens: Annotated[
        Path | None,
        typer.Option(help="JSON list of prompt, reference, output and reward. Left out: the model's own card."),
    ] = None,
    rope_base: Annotated[
        str | None,
        typer.Option(help="hf, as trained; or sglang-static, as the rewards on POLAR's cards were computed."),
    ] = None,
    dtype: Dtype = None,
    config: ConfigFile = None,
    assignments: Assignments = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False,
) -> None:
    """Say whether an engine gives a model's rewards.

    First against float32 of the same weights, on a panel of triples: more
    than rounding is explained by the trap it agrees with. Then against what
    the model's card publishes, or a file of known rewards: those are another
    engine's numbers, so they tell how near, and not who is right.

    Ends with 1 if an engine is not right.

    [dim]polar-ray verify --model internlm/POLAR-7B[/]
    [dim]polar-ray verify --model internlm/POLAR-7B --rope-base sglang-static[/]
    [dim]polar-ray verify --engine torch --engine vllm=.engines/vllm/bin/python[/]
    """
    kinds = engine or ["torch"]
    settings = [
        load_config(
            ScoreConfig,
            config,
            assignments or (),
            model=model,
            engine__rope_base=rope_base,
            engine__dtype=dtype,
            **engine_settings(named),
        )
        for named in kinds
    ]
    from polar_ray.verification.run import verify as verify_engines

    notes = Console(stderr=True)
    with notes.status("reading the model") as status:
        found = verify_engines(
            settings[0].model,
            [each.engine for each in settings],
            revision=settings[0].revision,
            limits=settings[0].limits,
            goldens=goldens,
            on_stage=status.update,
        )
    if as_json:
        typer.echo(json.dumps(_as_dict(found), ensure_ascii=False))
    else:
        _show(Console(highlight=False), found)
    if not found.is_right:
        raise typer.Exit(1)


def _show(console: Console, found: Verification) -> None:
    for check in found.checks:
        console.print(Text(f"{_name(check.engine)}  ", style="bold").append(_how(check), style="dim"))
        if check.verdict is None:
            console.print("  has no weights of its own to hold it against", style="dim")
        elif check.verdict.is_right:
            console.print(Text("  right  ", style="green").append(check.verdict.sentence, style="default"))
        else:
            console.print(Text("  WRONG  ", style="bold red").append(check.verdict.sentence, style="default"))
    console.print()
    if not found.published:
        console.print("The model's card publishes no rewards; give known ones with --goldens.", style="dim")
        return
    console.print(_table(found, console.width))
    for check in found.checks:
        if check.agreement is not None:
            near = check.agreement
            order = "" if near.spearman is None else f", rank correlation {near.spearman:.4f}"
            console.print(
                f"{_name(check.engine)}: {near.rms:.3g} from the published ones (root mean square), {near.largest:.3g} "
                f"at most{order}",
            )


def _table(found: Verification, width: int) -> Table:
    """A line for each published reward; figures are never cut, so the texts take what is left."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    room = width - FIGURE_WIDTH * (1 + 2 * len(found.checks)) - max(len(_origin(row)) for row in found.published) - 3
    table.add_column("output", no_wrap=True, max_width=max(room, 12), overflow="ellipsis")
    table.add_column("published", justify="right", no_wrap=True)
    for check in found.checks:
        table.add_column(_name(check.engine), justify="right", no_wrap=True)
        table.add_column("off by", justify="right", no_wrap=True, style="dim")
    table.add_column("by", style="dim", no_wrap=True)
    for row, published in enumerate(found.published):
        cells = [Text(_line(published.triple.output)), Text(f"{published.reward:.4f}")]
        for check in found.checks:
            scored = check.scored[row]
            reward = scored.reward
            cells += [
                Text(scored.status if reward is None else f"{reward:.4f}"),
                Text("" if reward is None else f"{reward - published.reward:+.4f}"),
            ]
        table.add_row(*cells, _origin(published))
    return table


def _origin(row: Published) -> str:
    return row.engine or row.source


def _line(output: Any) -> str:
    text = output if isinstance(output, str) else "\n".join(message["content"] for message in output)
    return " ".join(text.split())


def _name(engine: EngineConfig) -> str:
    return f"{engine.kind} ({engine.address})" if engine.address else engine.kind


def _how(check: EngineCheck) -> str:
    rope = "" if check.engine.rope_base == "hf" else f", rope base {check.engine.rope_base}"
    return f"{check.version}, {check.engine.quantization or check.engine.dtype} on {check.engine.device}{rope}"


def _as_dict(found: Verification) -> dict[str, Any]:
    return {
        "is_right": found.is_right,
        "published": [
            {"reward": row.reward, "source": row.source, "engine": row.engine, "output": _line(row.triple.output)}
            for row in found.published
        ],
        "engines": [
            {
                "engine": check.engine.kind,
                "version": check.version,
                "dtype": check.engine.dtype,
                "quantization": check.engine.quantization,
                "device": check.engine.device,
                "rope_base": check.engine.rope_base,
                "is_right": check.verdict is None or check.verdict.is_right,
                "panel": None
                if check.verdict is None
                else {
                    "expected": check.verdict.expected.tolist(),
                    "found": check.verdict.found.tolist(),
                    "rms_over_spread": check.verdict.deviation.rms,
                    "largest": check.verdict.deviation.largest,
                    "tolerance": check.verdict.tolerance,
                    "trap": check.verdict.trap,
                },
                "rewards": [row.reward for row in check.scored],
                "statuses": [row.status for row in check.scored],
                "agreement": None if check.agreement is None else asdict(check.agreement),
            }
            for check in found.checks
        ],
    }
