"""How near the torch engine comes to what one GPU can do, in time and memory, with everything that goes into it.

    python jobs/bench/gpu.py --output build/gpu.json

Needs this source tree, torch, transformers, pydantic and typer: no Ray, no checkpoint and no tokenizer. Weights are
random, in the shapes of POLAR-1.8B and POLAR-7B. Compared are padded batches on transformers (SDPA), and the torch
engine with each sequence whole (`unshared`) and with common prefixes once (`shared`), its steps between the products
as torch's own kernels (`eager`), compiled (`compiled`), and compiled around float8 products (`fp8`).

All of it is planned to take under 9 minutes on an H200: at half of the rate of bare products a round of all methods is
10 s for 1.8B and 48 s for 7B, and there are four of each, the first to warm up; compiling, drawing weights and the
float32 rewards that errors are counted from are two minutes more. `--shape` and `--workload` run a part, `--rounds 1`
is quick, and the file is written after each shape. On a CPU

    python jobs/bench/gpu.py --device cpu --shape tiny --shorter 64

shows that the script itself works.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import typer
from rich.console import Console
from rich.table import Table

from polar_ray.bench.gpu import GPU_SHAPES, LOADS, Goal, ShapeResult, bench_shape, goals
from polar_ray.bench.provenance import write_results

WORDS = {True: "met", False: "not met", None: "open"}


class Kept(logging.Handler):
    """Warnings, for the results: what the engine does without on this machine."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def gpu(device: torch.device) -> dict[str, Any] | None:
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "triton": triton,
    }


def show(result: ShapeResult, console: Console) -> None:
    rates = (
        f"{result.matmul_flops_per_s / 1e12:.1f} TFLOP/s in products, {result.bytes_per_s / 1e12:.2f} TB/s in copies"
    )
    columns = ("workload", "method", "s", "tokens/s", "effective", "TFLOP", "GB", "of products", "of bound")
    table = Table(*columns, "max error", "rms", "peak GiB", title=f"{result.shape}: {rates}", box=None)
    for row in result.rows:
        if row.median_s is None:
            table.add_row(row.workload, row.method, row.error or "")
            continue
        table.add_row(
            row.workload,
            row.method,
            f"{row.median_s:.3f}",
            f"{row.tokens_per_s:,.0f}",
            f"{row.effective_tokens_per_s:,.0f}",
            f"{row.flops / 1e12:.1f}",
            f"{row.bytes / 1e9:.1f}",
            f"{row.fraction_of_matmul_rate:.1%}",
            f"{row.fraction_of_bound:.1%}",
            "" if row.max_error is None else f"{row.max_error:.3f}",
            "" if row.rms_error is None else f"{row.rms_error:.3f}",
            "" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.1f}",
        )
    console.print(table)


def show_goals(found: Sequence[Goal], console: Console) -> None:
    table = Table("goal, on one H200", "at least", "measured", "", box=None)
    for goal in found:
        measured = "" if goal.figure is None else f"{goal.figure:.2f}"
        table.add_row(goal.what, f"{goal.target:.2f}", measured, WORDS[goal.is_met])
    console.print(table)


def main(
    device: Annotated[str, typer.Option(help="cuda, cuda:1, or cpu to try the script out.")] = "cuda",
    shape: Annotated[
        list[str] | None, typer.Option(help=f"Repeatable, of {', '.join(GPU_SHAPES)}; POLAR's two if left out.")
    ] = None,
    workload: Annotated[
        list[str] | None, typer.Option(help=f"Repeatable, of {', '.join(LOADS)}; all if left out.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    shorter: Annotated[int, typer.Option(min=1, help="Divide all lengths by this.")] = 1,
    profile: Annotated[bool, typer.Option("--profile", help="Add each method's kernels and their time.")] = False,
    output: Annotated[Path, typer.Option(help="JSON file for the result.")] = Path("build/gpu.json"),
) -> None:
    """Compare the torch engine with padded batches and with the GPU's own rates."""
    shapes, workloads = shape or ["1.8b", "7b"], workload or list(LOADS)
    for kind, names, known in (("shape", shapes, GPU_SHAPES), ("workload", workloads, LOADS)):
        if unknown := [name for name in names if name not in known]:
            raise typer.BadParameter(f"{unknown[0]}: expected one of {', '.join(known)}", param_hint=f"--{kind}")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("polar_ray").addHandler(kept := Kept())
    place, console = torch.device(device), Console(width=160)
    arguments = [
        *("--device", device, *(word for name in shapes for word in ("--shape", name))),
        *(word for name in workloads for word in ("--workload", name)),
        *("--rounds", str(rounds), "--shorter", str(shorter), *(["--profile"] if profile else [])),
    ]
    command = f"python jobs/bench/gpu.py {' '.join(arguments)}"
    loads = {name: LOADS[name].shorter(shorter) for name in workloads}
    results: list[ShapeResult] = []
    for name in shapes:
        results.append(bench_shape(name, loads, place, rounds=rounds, with_kernels=profile))
        show(results[-1], console)
        wanted = [asdict(goal) | {"is_met": goal.is_met} for goal in goals(results)]
        measured = {"goals": wanted, "results": [asdict(result) for result in results]}
        write_results(output, command, {"gpu": gpu(place), "warnings": kept.lines, **measured})
    show_goals(goals(results), console)


if __name__ == "__main__":
    typer.run(main)
