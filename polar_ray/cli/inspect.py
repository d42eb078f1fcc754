"""`polar-ray inspect`: why a triple gets the number it gets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from polar_ray.cli.options import Assignments, Model
from polar_ray.config import ScoreConfig, load_config
from polar_ray.encoding.encode import EncodedTriple, Encoder
from polar_ray.encoding.tokenizer import PolarTokenizer
from polar_ray.errors import ConfigError, InputError, TripleError
from polar_ray.model.locate import locate_model
from polar_ray.triples import Scored, Triple


def inspect(
    row: Annotated[str, typer.Argument(help="A JSON file with one triple, or PARQUET#ROW (rows count from 0).")],
    model: Model = None,
    reward: Annotated[bool, typer.Option("--reward", help="Also load the weights and compute the reward.")] = False,
    config: Annotated[Path | None, typer.Option(help="TOML file of settings.")] = None,
    assignments: Assignments = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show why a triple gets the number it gets.

    Prints the exact ids and pieces, how many of them every output to the
    same prompt and reference shares, what limits cut and what was removed.

    [dim]polar-ray inspect scored.parquet#17 --model internlm/POLAR-7B --reward[/]
    """
    settings = load_config(ScoreConfig, config, assignments or (), model=model)
    triple = _read(row, settings)
    tokenizer = PolarTokenizer(locate_model(settings.model, settings.revision))
    encoder = Encoder(tokenizer, settings.limits)
    encoded = encoder.encode(triple)
    scored = _score(triple, settings) if reward else None
    if as_json:
        typer.echo(json.dumps(_as_dict(encoded, tokenizer, scored), ensure_ascii=False))
        return
    _show(Console(), encoded, tokenizer, scored)


def _read(row: str, settings: ScoreConfig) -> Triple:
    path, mark, number = row.rpartition("#")
    if not mark:
        return _read_json(Path(row))
    if not number.isdecimal():
        raise ConfigError(f"{row}: expected PARQUET#ROW with a row number, such as triples.parquet#17")
    from polar_ray.corpus.units import read_row

    triple = read_row(path, int(number), settings.columns)
    if isinstance(triple, TripleError):
        raise triple
    return triple


def _read_json(file: Path) -> Triple:
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); give a JSON file or PARQUET#ROW") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{file}: expected one JSON object, found {type(content).__name__}")
    return Triple.from_dict(content)


def _score(triple: Triple, settings: ScoreConfig) -> Scored:
    from polar_ray.scoring import Scorer

    with Scorer.open(
        settings.model, revision=settings.revision, engine=settings.engine, limits=settings.limits
    ) as scorer:
        return scorer.score([triple])[0]


def _as_dict(encoded: EncodedTriple, tokenizer: PolarTokenizer, scored: Scored | None) -> dict[str, Any]:
    ids = encoded.ids.tolist()
    return {
        "ids": ids,
        "pieces": [tokenizer.piece(id) for id in ids],
        "tokens": len(ids),
        "shareable": encoded.shareable,
        "prompt_cut_tokens": encoded.prompt_cut_tokens,
        "reference_cut_tokens": encoded.reference_cut_tokens,
        "output_cut_tokens": encoded.output_cut_tokens,
        "removed": list(encoded.removed),
        **({} if scored is None else {"reward": scored.reward, "status": scored.status, "detail": scored.detail}),
    }


def _show(console: Console, encoded: EncodedTriple, tokenizer: PolarTokenizer, scored: Scored | None) -> None:
    pieces = Text()
    for place, id in enumerate(encoded.ids.tolist()):
        is_control = id in tokenizer.control_ids
        shade = "on grey23" if place % 2 else "on grey30"
        style = "bold black on yellow" if is_control else f"{'dim ' if place < encoded.shareable else ''}white {shade}"
        pieces.append(_visible(tokenizer.piece(id)), style)
        pieces.append(" ")
    console.print(pieces)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("ids", " ".join(map(str, encoded.ids.tolist())))
    table.add_row("tokens", str(len(encoded.ids)))
    table.add_row("shared", f"the first {encoded.shareable} (dim above) do not depend on the output")
    cuts = (encoded.prompt_cut_tokens, encoded.reference_cut_tokens, encoded.output_cut_tokens)
    named = [f"{n} of the {name}" for n, name in zip(cuts, ("prompt", "reference", "output"), strict=True) if n]
    table.add_row("cut", ", ".join(named) + " (tokens)" if named else "nothing")
    table.add_row("removed", Text(" ".join(encoded.removed)) if encoded.removed else "no control tokens")
    if scored is not None:
        table.add_row("reward", f"{scored.reward:.6f}" if scored.reward is not None else f"none: {scored.detail}")
    console.print(table)


def _visible(piece: str) -> str:
    return piece.replace("\u2581", "·").replace("\n", "⏎").replace("\t", "⇥")
