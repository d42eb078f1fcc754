"""`polar-ray plan`: what a corpus job will take."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from polar_ray.cli.options import Assignments, ConfigFile, Model, PromptColumn, ReferenceColumn
from polar_ray.config import ScoreConfig, load_config
from polar_ray.report.wording import duration, number, percent, plural

if TYPE_CHECKING:
    from polar_ray.corpus.forecast import Estimate, Forecast


def plan(
    inputs: Annotated[list[str], typer.Argument(help="Parquet or JSONL: files, folders, globs, s3:// and other URLs.")],
    model: Model = None,
    gpu: Annotated[
        str,
        typer.Option(
            help="a100, b200, h100, h20, h200, l4 or l40s, by the data sheet; or here: the engine on this machine, "
            "measured on some of the rows."
        ),
    ] = "h200",
    mfu: Annotated[
        float, typer.Option(help="Share of its dense bfloat16 peak that arithmetic will reach. Measure your own.")
    ] = 0.4,
    gpus: Annotated[
        list[int] | None,
        typer.Option(
            min=1, help="How many at a time, or engines like the one here. Repeatable; left out, 1, 8 and 64."
        ),
    ] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Of one GPU for an hour, in any currency.")] = None,
    tensor_parallel_size: Annotated[int | None, typer.Option(min=1, help="GPUs of one engine.")] = None,
    units: Annotated[int, typer.Option(min=1, help="Units that are read and encoded for the estimate.")] = 8,
    seed: Annotated[int, typer.Option(help="Of their choice.")] = 0,
    prompt_column: PromptColumn = None,
    reference_column: ReferenceColumn = None,
    output_column: Annotated[str | None, typer.Option(help="Column that holds the output.")] = None,
    config: ConfigFile = None,
    assignments: Assignments = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False,
) -> None:
    """Say what scoring a corpus will take, before anything is paid for.

    Reads some units whole, chosen at random, encodes them and plans their
    batches as a job would: tokens, what sharing saves, rows at fault. From
    the model's shape come operations, and GPU-hours at a stated share of the
    peak. Of the model only config.json and the tokenizer are needed; with
    --gpu here the model is loaded, and its speed measured.

    [dim]polar-ray plan 's3://corpus/*.parquet' --model internlm/POLAR-7B --gpu h200[/]
    [dim]polar-ray plan triples.parquet --gpus 16 --price 2.5 --mfu 0.5[/]
    [dim]polar-ray plan triples.parquet --gpu here --gpus 1[/]
    """
    settings = load_config(
        ScoreConfig,
        config,
        assignments or (),
        model=model,
        engine__tensor_parallel_size=tensor_parallel_size,
        columns__prompt=prompt_column,
        columns__reference=reference_column,
        columns__output=output_column,
    )
    from polar_ray.corpus.forecast import forecast

    notes, done = Console(stderr=True), 0
    with notes.status("reading footers") as status:

        def on_unit() -> None:
            nonlocal done
            done += 1
            status.update(f"encoding, {plural(done, 'unit')} done")

        def on_measuring() -> None:
            status.update("measuring the engine here")

        found = forecast(
            inputs, settings, gpu=gpu, mfu=mfu, units=units, seed=seed, on_unit=on_unit, on_measuring=on_measuring
        )
    counts = gpus or [count for count in (1, 8, 64) if count >= found.gpus_per_engine]
    if as_json:
        typer.echo(json.dumps(found.model_dump() | {"hours_by_gpus": {count: found.hours(count) for count in counts}}))
        return
    console = Console(highlight=False)
    console.print(_facts(found, price))
    console.print(_times(found, counts))


def _facts(found: Forecast, price: float | None) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    sampled = "all of them read" if found.sampled_units == found.units else f"{found.sampled_units:,} of them read"
    table.add_row("rows", f"{found.rows:,} in {plural(found.files, 'file')}, {plural(found.units, 'unit')}, {sampled}")
    quantiles = found.length_quantiles
    lengths = f"half of the rows have {quantiles['0.5']:,} or fewer, 95 % {quantiles['0.95']:,}"
    table.add_row("tokens", f"{_with_error(found.tokens)}; {lengths}, the longest read {quantiles['1']:,}")
    saved = 1 - found.computed_tokens.total / found.tokens.total if found.tokens.total else 0.0
    duplicates = f"; {percent(found.duplicates / found.sampled_rows)} of the rows equal another"
    table.add_row("computed", f"{_with_error(found.computed_tokens)}, {percent(saved)} saved by sharing{duplicates}")
    faults = [f"{count:,} {status}" for status, count in sorted(found.statuses.items())]
    table.add_row("no reward", f"{', '.join(faults) or 'none'} of {plural(found.sampled_rows, 'row')} read")
    table.add_row("cut", f"{percent(found.cut_rows / found.sampled_rows)} of the rows, to fit the limits")
    table.add_row("operations", f"{_with_error(found.flops)} floating point")
    cost = "" if price is None else f", {found.gpu_hours * price:,.2f} at {price:g} an hour"
    if found.mfu is None:
        rate = f"at the {number(found.flops_per_s)} operations a second that it has reached here"
        table.add_row("engine-hours", f"{found.gpu_hours:,.3g} {rate}{cost}")
    else:
        table.add_row("GPU-hours", f"{found.gpu_hours:,.3g} on {found.gpu} at {found.mfu:.0%} of its peak{cost}")
    table.add_row("CPU-hours", f"{found.encoding_cpu_hours:,.3g} for reading and encoding, measured on this machine")
    return table


def _times(found: Forecast, counts: list[int]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    one, many = ("engine", "engines") if found.mfu is None else ("GPU", f"{found.gpu} GPUs")
    table.add_column(many, justify="right")
    table.add_column("wall time", justify="right")
    table.add_column(f"one {one} at work", justify="right")
    for count in counts:
        hours = found.hours(count)
        at_work = found.gpu_hours / (hours * count) if hours else 1.0
        table.add_row(f"{count:,}", duration(hours * 3600), percent(min(at_work, 1.0)))
    return table


def _with_error(estimate: Estimate) -> str:
    if estimate.error is None:
        return f"about {number(estimate.total)}"
    share = estimate.error / estimate.total if estimate.total else 0.0
    return number(estimate.total) + (f" ± {percent(share)}" if share else "")
