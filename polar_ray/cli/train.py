"""`polar-ray train`: fine-tune a checkpoint on preference pairs."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from polar_ray.cli.options import Assignments, ConfigFile, PromptColumn, ReferenceColumn
from polar_ray.config import TrainConfig, load_config

if TYPE_CHECKING:
    from polar_ray.training.outcome import TrainSummary


def train(
    pairs: Annotated[
        list[str],
        typer.Argument(help="Parquet or JSONL of prompt, reference, chosen, rejected: files, folders, URLs."),
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="Folder or URL for the trained checkpoint.")],
    model: Annotated[
        str | None,
        typer.Option(help="To start from: checkpoint folder or hub name. Left out: the small one that ships here."),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Times that every pair is seen.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="The highest; the defaults are those of POLAR.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that train together, one for each GPU.")] = None,
    parallel: Annotated[
        str | None, typer.Option(help="ddp: every worker has all weights. fsdp: they are spread.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    lora_rank: Annotated[int | None, typer.Option(help="Train adapters of this rank; 0: all weights.")] = None,
    prompt_column: PromptColumn = None,
    reference_column: ReferenceColumn = None,
    chosen_column: Annotated[str | None, typer.Option(help="Column that holds the better output.")] = None,
    rejected_column: Annotated[str | None, typer.Option(help="Column that holds the worse output.")] = None,
    config: ConfigFile = None,
    assignments: Assignments = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Discard what an earlier run left in --output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object.")] = False,
) -> None:
    """Fine-tune a POLAR model on preference pairs.

    What comes out is a checkpoint folder for every engine: polar-ray score
    --model OUTPUT takes it at once. Run the same command again after a crash
    and it goes on from the last checkpoint, with the same pairs in the same
    order. Pairs that cannot be used are counted and listed, never dropped in
    silence.

    [dim]polar-ray train pairs.jsonl -o tuned --model internlm/POLAR-1_8B-Base[/]
    [dim]polar-ray train s3://pairs/ -o tuned --config jobs/train/polar_7b.toml --workers 8[/]
    [dim]polar-ray train pairs.parquet -o tuned --lora-rank 16 --set optimizer.learning_rate=1e-4[/]
    [dim]tensorboard --logdir tuned/_polar_ray/tensorboard[/]
    """
    settings = load_config(
        TrainConfig,
        config,
        assignments or (),
        model=model,
        epochs=epochs,
        optimizer__learning_rate=learning_rate,
        workers=workers,
        parallel=parallel,
        precision=precision,
        lora__rank=lora_rank,
        columns__prompt=prompt_column,
        columns__reference=reference_column,
        columns__chosen=chosen_column,
        columns__rejected=rejected_column,
    )
    from polar_ray.training.job import train as run
    from polar_ray.training.progress import LogTrainProgress, TerminalTrainProgress, TrainProgress

    notes = Console(stderr=True)
    progress: TrainProgress = TerminalTrainProgress(notes) if notes.is_terminal else LogTrainProgress(notes)
    try:
        # When a worker dies Ray prints to stdout, where a summary for machines may be wanted.
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            summary = run(pairs, output, settings, fresh=fresh, progress=progress)
    except KeyboardInterrupt:
        notes.print("stopped. Run the same command again to go on from the last checkpoint.", highlight=False)
        raise
    if as_json:
        typer.echo(summary.model_dump_json())
        return
    Console().print(_table(summary))


def _table(summary: TrainSummary) -> Table:
    """The summary for people."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    skipped = ", ".join(f"{count:,} {status}" for status, count in sorted(summary.skipped.items()))
    table.add_row("pairs", f"{summary.pairs:,}" + (f"; skipped: {skipped}" if skipped else "; none skipped"))
    if summary.cut_pairs:
        table.add_row("cut", f"{summary.cut_pairs:,} pairs were cut to fit the limits")
    saved = 1 - summary.computed_tokens / summary.tokens if summary.tokens else 0.0
    table.add_row("tokens", f"{summary.tokens:,}; {summary.computed_tokens:,} computed, {saved:.0%} saved by sharing")
    table.add_row("last tenth", f"loss {summary.loss:.3f}, accuracy {summary.accuracy:.1%}, before learning from them")
    table.add_row("steps", f"{summary.steps:,}")
    if summary.starts > 1:
        table.add_row("starts", f"{summary.starts}: workers were lost and replaced")
    table.add_row("time", f"{summary.seconds:.1f} s")
    table.add_row("weights", summary.weights_digest)
    table.add_row("output", summary.output)
    return table
