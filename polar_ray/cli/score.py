"""`polar-ray score`: a corpus job."""

from __future__ import annotations

import contextlib
import os
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from polar_ray.cli.options import Address, Assignments, ConfigFile, Dtype, Engine, Model, PromptColumn, ReferenceColumn
from polar_ray.config import ScoreConfig, load_config

UNTRAINED = (
    "The weights of this checkpoint are untrained: its rewards are random numbers. They show that everything works "
    "and nothing else. Name a trained model with --model."
)


FAKE = "The fake engine looks at no weights: its rewards are hashes of the token ids, for dry runs."


def score(
    inputs: Annotated[list[str], typer.Argument(help="Parquet or JSONL: files, folders, globs, s3:// and other URLs.")],
    output: Annotated[str, typer.Option("--output", "-o", help="Folder or URL for the scored Parquet files.")],
    model: Model = None,
    engine: Engine = None,
    address: Address = None,
    actors: Annotated[str | None, typer.Option(help="Engines in parallel: N, or MIN:MAX to grow.")] = None,
    tensor_parallel_size: Annotated[
        int | None, typer.Option(help="GPUs of one engine; without GPUs, processes that share its threads.")
    ] = None,
    dtype: Dtype = None,
    prompt_column: PromptColumn = None,
    reference_column: ReferenceColumn = None,
    output_column: Annotated[str | None, typer.Option(help="Column that holds the output to score.")] = None,
    config: ConfigFile = None,
    assignments: Assignments = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Discard what an earlier job left in --output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object.")] = False,
) -> None:
    """Score every row of a corpus and write it back with a reward column.

    Rows keep their order and all their columns. Run the same command again
    after a crash and it finishes only what is missing; run it again after
    success and it does nothing.

    [dim]polar-ray score triples.parquet --output scored[/]
    [dim]polar-ray score 's3://corpus/*.parquet' -o s3://corpus/scored --model internlm/POLAR-7B[/]
    [dim]polar-ray score triples.parquet -o scored --engine serve --address gpu-box:8000[/]
    [dim]polar-ray score data/ -o scored --set limits.cut_side=left --set unit_rows=1024[/]
    """
    settings = load_config(
        ScoreConfig,
        config,
        assignments or (),
        model=model,
        engine__kind=engine,
        engine__address=address,
        engine__dtype=dtype,
        engine__tensor_parallel_size=tensor_parallel_size,
        actors=actors,
        columns__prompt=prompt_column,
        columns__reference=reference_column,
        columns__output=output_column,
    )
    from polar_ray.corpus.job import JobSummary, score_parquet
    from polar_ray.corpus.progress import JobProgress, LogProgress, TerminalProgress

    notes = Console(stderr=True)
    progress: JobProgress = TerminalProgress(notes) if notes.is_terminal else LogProgress(notes)
    try:
        # When a worker dies Ray prints to stdout, where a summary for machines may be wanted.
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            summary: JobSummary = score_parquet(inputs, output, settings, fresh=fresh, progress=progress)
    except KeyboardInterrupt:
        notes.print("stopped; finished units are kept. Run the same command again to go on.", highlight=False)
        raise
    if settings.engine.kind == "fake":
        notes.print(FAKE, style="yellow", soft_wrap=True)
    elif summary.untrained:
        notes.print(UNTRAINED, style="yellow", soft_wrap=True)
    if as_json:
        typer.echo(summary.model_dump_json())
        return
    Console().print(_table(summary.model_dump()))


def _table(summary: dict[str, Any]) -> Table:
    """The summary for people."""
    nothing_done = summary["resumed_units"] == summary["units"]
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    if nothing_done:
        table.add_row("nothing to do", "every row was scored by an earlier run; this is its summary")
    failed = {status: count for status, count in summary["by_status"].items() if status != "ok"}
    causes = ", ".join(f"{count:,} {status}" for status, count in sorted(failed.items()))
    table.add_row("rows", f"{summary['rows']:,}: {summary['ok']:,} rewarded, {summary['failed']:,} failed")
    if causes:
        table.add_row("failures", causes)
    saved = 1 - summary["computed_tokens"] / summary["tokens"] if summary["tokens"] else 0.0
    table.add_row(
        "tokens", f"{summary['tokens']:,}; {summary['computed_tokens']:,} computed, {saved:.0%} saved by sharing"
    )
    table.add_row("duplicates", f"{summary['duplicates']:,} rows equal another and were computed once")
    table.add_row("cut", f"{summary['cut_rows']:,} rows were cut to fit the limits")
    if summary["resumed_units"] and not nothing_done:
        table.add_row("resumed", f"{summary['resumed_units']:,} of {summary['units']:,} units were done before")
    table.add_row("time", f"{summary['seconds']:.1f} s")
    table.add_row("receipt", summary["receipt_id"])
    table.add_row("output", summary["output"])
    table.add_row("report", summary["report"])
    return table
