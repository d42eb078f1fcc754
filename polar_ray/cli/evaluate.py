"""`polar-ray evaluate`: how often a model orders outputs as people did, beside baselines that read nothing."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from polar_ray.cli.options import Address, Assignments, ConfigFile, Dtype, Engine, Model, PromptColumn, ReferenceColumn
from polar_ray.config import EvaluateConfig, load_config

if TYPE_CHECKING:
    from polar_ray.evaluation.result import Evaluation


def evaluate(
    inputs: Annotated[
        list[str],
        typer.Argument(help="Pairs, or triples with labels. Parquet or JSONL: files, folders, globs, URLs."),
    ],
    model: Model = None,
    by: Annotated[
        list[str] | None, typer.Option(help="Column; its values get figures of their own. Repeatable.")
    ] = None,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="Folder or URL for evaluation.json, report.html and rewards.parquet."),
    ] = None,
    engine: Engine = None,
    address: Address = None,
    dtype: Dtype = None,
    layout: Annotated[str | None, typer.Option(help="pairs or triples. Left out: what the columns look like.")] = None,
    prompt_column: PromptColumn = None,
    reference_column: ReferenceColumn = None,
    chosen_column: Annotated[str | None, typer.Option(help="Of pairs: the better output, or a list of them.")] = None,
    rejected_column: Annotated[str | None, typer.Option(help="Of pairs: the worse output, or a list of them.")] = None,
    output_column: Annotated[str | None, typer.Option(help="Of triples: the output.")] = None,
    label_column: Annotated[
        str | None, typer.Option(help="Of triples: how good it is, as booleans or numbers.")
    ] = None,
    group_column: Annotated[
        str | None, typer.Option(help="What belongs together. Left out: the same prompt (triples: and reference).")
    ] = None,
    config: ConfigFile = None,
    assignments: Assignments = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False,
) -> None:
    """Say how often a model gives the better output the higher reward.

    Pairs have a chosen and a rejected output a row; a list of several means
    that every chosen one has to beat every rejected one. Triples have one
    output and its label; outputs of a group whose labels differ make pairs,
    and there are AUC and best-of-n as well. Either needs a reference.

    Beside the model stand baselines that understand nothing: the longer
    output, the one whose length is closer to the reference's, the one with
    more words of the reference. A model has to beat them.

    [dim]polar-ray evaluate pairs.parquet --model checkpoints/mine --by source -o evaluated[/]
    [dim]polar-ray evaluate triples.parquet --label-column is_correct --group-column question[/]
    [dim]polar-ray evaluate rewardbench.parquet --reference-column ground_truth --by subset[/]
    [dim]polar-ray evaluate pairs.jsonl --engine serve --address gpu-box:8000 --json[/]
    """
    settings = load_config(
        EvaluateConfig,
        config,
        assignments or (),
        model=model,
        engine__kind=engine,
        engine__address=address,
        engine__dtype=dtype,
        layout=layout,
        by=by or None,
        columns__prompt=prompt_column,
        columns__reference=reference_column,
        columns__chosen=chosen_column,
        columns__rejected=rejected_column,
        columns__output=output_column,
        columns__label=label_column,
        columns__group=group_column,
    )
    from polar_ray.corpus.progress import JobProgress, LogProgress, TerminalProgress
    from polar_ray.evaluation.run import evaluate as evaluate_files
    from polar_ray.evaluation.words import FAKE, UNTRAINED

    notes = Console(stderr=True)
    progress: JobProgress = TerminalProgress(notes) if notes.is_terminal else LogProgress(notes)
    found = evaluate_files(inputs, settings, output=output, progress=progress)
    if settings.engine.kind == "fake":
        notes.print(FAKE, style="yellow", soft_wrap=True)
    elif found.untrained:
        notes.print(UNTRAINED, style="yellow", soft_wrap=True)
    if as_json:
        typer.echo(found.model_dump_json())
        return
    _show(Console(highlight=False), found, output)


def _show(console: Console, found: Evaluation, output: str | None) -> None:
    """The tables for people, and under them what they do not say."""
    from polar_ray.evaluation.words import (
        account,
        best_of_note,
        best_of_table,
        block_title,
        table_head,
        table_lines,
    )

    blocks = [found.total, *found.by]
    head, lines = table_head(found), [table_lines(found, block) for block in blocks]
    widths = [max(map(len, cells)) for cells in zip(head, *chain.from_iterable(lines), strict=True)]
    for block, some in zip(blocks, lines, strict=True):
        if block.column is not None:
            left_out = f", {block.unscored_pairs:,} pairs not scored" if block.unscored_pairs else ""
            console.print()
            console.print(Text(f"{block_title(block)}{left_out}", style="bold"), soft_wrap=True)
        if block.column is None or block.rows:
            _print_table(console, head, some, widths, with_head=block.column is None)
    if found.best_of:
        head, some = best_of_table(found)
        console.print()
        _print_table(console, head, some, [max(map(len, cells)) for cells in zip(head, *some, strict=True)])
        console.print(best_of_note(found.best_of), style="dim")
    console.print()
    for sentence in account(found):
        console.print(sentence, style="dim")
    console.print(f"receipt {found.receipt_id}", style="dim")
    if output is not None:
        console.print(f"report {output.rstrip('/')}/report.html", style="dim", markup=False, soft_wrap=True)


def _print_table(
    console: Console,
    head: Sequence[str],
    lines: Sequence[Sequence[str]],
    widths: Sequence[int],
    *,
    with_head: bool = True,
) -> None:
    """Lines under one another, the model's first; `widths` keep the columns of several tables in line.

    A terminal that is too narrow wraps lines by itself: a figure that is cut short would be another figure.
    """
    gap = 2 if sum(widths) + 2 * len(widths) <= console.width else 1
    table = Table(box=None, padding=(0, gap, 0, 0), header_style="dim", show_header=with_head, pad_edge=False)
    for place, (name, width) in enumerate(zip(head, widths, strict=True)):
        table.add_column(name, justify="right" if place else "left", no_wrap=True, width=width)
    for place, line in enumerate(lines):
        table.add_row(*map(Text, line), style="bold" if place == 0 else None)
    wide = Console(highlight=False, width=max(console.width, sum(widths) + gap * len(widths)))
    wide.print(table)
