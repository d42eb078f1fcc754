"""`polar-ray bench`: measure on this machine what the README claims."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from polar_ray.errors import ConfigError

if TYPE_CHECKING:
    from polar_ray.bench.engine import DtypeResult

app = typer.Typer(no_args_is_help=True, help="Measure speed and exactness on this machine.")


@app.callback()
def bench() -> None:
    """A verb of its own for each thing that is measured."""


@app.command()
def engine(
    shape: Annotated[
        Literal["tiny", "small", "medium"],
        typer.Option(help="Random weights of this shape: 2, 59 or 292 M parameters."),
    ] = "small",
    model: Annotated[
        str | None, typer.Option(help="A checkpoint's folder or hub name instead of random weights.")
    ] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32 or bfloat16. Repeatable; left out, both.")] = None,
    groups: Annotated[int, typer.Option(min=1, help="Groups of outputs that share prompt and reference.")] = 8,
    group_size: Annotated[int, typer.Option(min=1, help="Outputs of one group.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Timed runs of each method, interleaved.")] = 3,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Left out: one per core.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights, ids and lengths.")] = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the results as JSON to this file.")
    ] = None,
) -> None:
    """Compare the torch engine with padded batches through transformers, on a CPU.

    Ids are random; lengths are those of GSM8K triples. The four methods take turns in one process; the least CPU
    seconds of each decide, so that other work on the machine does not. One dtype a run gives the cleanest figures.

    [dim]polar-ray bench engine --shape small --dtype bfloat16 --output engine.json[/]
    """
    from polar_ray.bench.engine import bench_engine
    from polar_ray.bench.workload import SHAPES, random_groups, write_random_checkpoint
    from polar_ray.model.checkpoint import Checkpoint
    from polar_ray.model.locate import locate_model

    dtypes = dtype or ["float32", "bfloat16"]
    if unknown := set(dtypes) - {"float32", "bfloat16"}:
        raise ConfigError(f"--dtype {min(unknown)}: expected float32 or bfloat16")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if model is None else locate_model(model)
        if model is None:
            write_random_checkpoint(folder, SHAPES[shape], seed=seed)
        vocab_size = Checkpoint.open(folder).config.vocab_size
        sequences = random_groups(groups, group_size, vocab_size, seed=seed)
        results = bench_engine(folder, sequences, dtypes=dtypes, rounds=rounds, threads=threads)
    for result in results:
        Console().print(_table(result))
    if output is not None:
        from polar_ray.bench.provenance import provenance

        settings = {
            "shape": asdict(SHAPES[shape]) if model is None else Path(model).name,
            "dtypes": dtypes,
            "groups": groups,
            "group_size": group_size,
            "sequences": len(sequences),
            "rounds": rounds,
            "threads": threads,
            "seed": seed,
        }
        what = f"--shape {shape}" if model is None else f"--model {Path(model).name}"
        command = " ".join(
            [
                f"polar-ray bench engine {what}",
                *(f"--dtype {name}" for name in dtypes),
                f"--groups {groups} --group-size {group_size} --rounds {rounds} --seed {seed}",
                *([f"--threads {threads}"] if threads is not None else []),
            ]
        )
        content = {"command": command, **provenance(), "settings": settings, "results": [asdict(r) for r in results]}
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(content, indent=2) + "\n")


def _table(result: DtypeResult) -> Table:
    gemm = f"{max(result.gemm_flops_per_cpu_s.values()) / 1e9:.0f} GFLOP per CPU second in bare products"
    title = f"{result.dtype}, {result.methods[0].tokens:,} tokens; {gemm}"
    table = Table(title=title, title_justify="left", title_style="bold", padding=(0, 1, 0, 0), box=None)
    table.add_column("method")
    for name in ("computed", "tokens/s", "CPU s", "x readme", "max error", "rms error", "of GEMM"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in result.methods:
        table.add_row(
            row.method,
            f"{row.computed_tokens:,}",
            f"{row.tokens_per_s:,.0f}",
            f"{row.median_cpu_s:.2f}",
            f"{row.speedup_over_readme:.2f}",
            f"{row.max_error:.1e}",
            f"{row.rms_error:.1e}",
            f"{row.fraction_of_gemm_rate:.0%}",
        )
    return table
