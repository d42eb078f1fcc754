"""`polar-ray bench`: measure on this machine what the README claims."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from polar_ray.cli.options import Assignments, ConfigFile, engine_settings
from polar_ray.config import EMBEDDED_MODEL, ScoreConfig, load_config
from polar_ray.errors import ConfigError

if TYPE_CHECKING:
    from polar_ray.bench.engines import EngineResult
    from polar_ray.bench.serve import Comparison, Result
    from polar_ray.planning import Ids

ShapeName = Annotated[
    Literal["tiny", "small", "medium"], typer.Option(help="Random weights of this shape: 2, 59 or 292 M parameters.")
]
WeightsInstead = Annotated[
    str | None, typer.Option("--model", help="A checkpoint's folder or hub name instead of random weights.")
]
Workloads = Annotated[
    list[str] | None,
    typer.Option(
        help="Lengths, and what sequences have in common: gsm8k, gsm8k-44, gaokao, long, longest, references or "
        "strangers. Repeatable; left out, gsm8k."
    ),
]
GroupSize = Annotated[int | None, typer.Option(min=1, help="Outputs of one group. Left out: the workload's.")]
Seed = Annotated[int, typer.Option(help="Of weights, ids and lengths.")]
Results = Annotated[Path | None, typer.Option("--output", "-o", help="Write the results as JSON to this file.")]

app = typer.Typer(no_args_is_help=True, help="Measure speed and exactness on this machine.")


@app.callback()
def bench() -> None:
    """A verb of its own for each thing that is measured."""


@app.command()
def engines(
    engine: Annotated[
        list[str] | None,
        typer.Option(
            help="readme, sorted (padded batches through transformers), torch, torch-int8, torch-fp8, "
            "torch-deterministic, vllm or sglang; or as vllm=PYTHON with the interpreter that has it. Repeatable. Left "
            "out: all that this environment and machine have."
        ),
    ] = None,
    shape: ShapeName = "small",
    model: WeightsInstead = None,
    workload: Workloads = None,
    tokens: Annotated[int, typer.Option(min=1, help="Of each workload, in as many whole groups as that takes.")] = 8000,
    group_size: GroupSize = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each engine on each workload.")] = 3,
    profile: Annotated[bool, typer.Option("--profile", help="Keep where the time of one more turn went.")] = False,
    seed: Seed = 0,
    config: ConfigFile = None,
    assignments: Assignments = None,
    output: Results = None,
) -> None:
    """Compare engines with each other and with the ways they replace.

    Each is started as a job would start it, in processes of its own, and they take turns on the same ids; those of the
    others stand still. Engines run with shared prefixes and without. The ids of each round are new. Errors are from
    float32 of the same weights.

    [dim]polar-ray bench engines --engine torch --engine vllm=.engines/vllm/bin/python[/]
    [dim]polar-ray bench engines --set engine.dtype=bfloat16 --model internlm/POLAR-1_8B[/]
    """
    from polar_ray.bench.engines import PADDED, VARIANTS, bench_engines, installed_methods
    from polar_ray.bench.workload import SHAPES, WORKLOADS
    from polar_ray.model.checkpoint import read_config

    workload = workload or ["gsm8k"]
    _refuse_unknown("workload", workload, WORKLOADS)
    settings = {}
    for named in engine or installed_methods():
        method = named.partition("=")[0]
        chosen = engine_settings(named) | ({"engine__kind": "torch"} if method in (*PADDED, *VARIANTS) else {})
        settings[method] = load_config(ScoreConfig, config, assignments or (), **chosen).engine
    busy_before, notes = os.getloadavg(), Console(stderr=True)
    with _checkpoint(shape, model, seed) as folder, notes.status("") as status:
        vocab_size = read_config(folder).vocab_size
        work = {name: _sequences(name, tokens, group_size, vocab_size, seed) for name in workload}
        compared = bench_engines(folder, settings, work, rounds=rounds, profiled=profile, on_stage=status.update)
    console = Console(highlight=False)
    for name in work:
        console.print(_engines_table([result for result in compared.results if result.workload == name]))
    console.print(_processes_table([result for result in compared.results if result.workload == workload[-1]]))
    console.print(ENGINES_LEGEND, style="dim")
    if output is not None:
        from polar_ray.bench.provenance import write_results

        options = [
            *_repeated("engine", settings),
            f"--shape {shape}" if model is None else f"--model {Path(model).name}",  # results are published: no paths
            *_repeated("workload", work),
            f"--tokens {tokens}",
            *([] if group_size is None else [f"--group-size {group_size}"]),
            f"--rounds {rounds} --seed {seed}",
            *(["--profile"] if profile else []),
            *_repeated("set", assignments or ()),
        ]
        content = {
            "load_average": {"before": busy_before, "after": os.getloadavg()},
            "shape": asdict(SHAPES[shape]) if model is None else Path(model).name,
            "workloads": {name: _described(name, sequences) for name, sequences in work.items()},
            **asdict(compared),
        }
        write_results(output, " ".join(["polar-ray bench engines", *options]), content)


@app.command()
def serve(
    engine: Annotated[
        list[str] | None,
        typer.Option(help="torch, or fake for the road alone. Repeatable; left out, both."),
    ] = None,
    model: Annotated[str, typer.Option(help="Checkpoint folder or hub name.")] = EMBEDDED_MODEL,
    road: Annotated[
        list[str] | None,
        typer.Option(help="bare: no Ray; proxy: Ray Serve's own; or haproxy. Repeatable; left out, all."),
    ] = None,
    callers: Annotated[list[int] | None, typer.Option(min=1, help="At a time. Repeatable; left out, 1, 8, 32.")] = None,
    rows: Annotated[
        list[int] | None, typer.Option(min=1, help="Of a request. Repeatable; left out, 1, 4, 64, 512.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each road under each load.")] = 3,
    seconds: Annotated[float, typer.Option("--seconds-per-load", min=0.01, help="Of one turn, at least.")] = 1.0,
    wire: Annotated[Literal["json", "arrow"], typer.Option(help="What bodies and replies are written in.")] = "json",
    tokens_per_s: Annotated[
        float | None,
        typer.Option(help="Have the fake engine take as long as one of this speed would, to see what is left of it."),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of an engine, on every road.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the words.")] = 0,
    output: Results = None,
) -> None:
    """Compare endpoints with the Scorer in one process, on a CPU.

    Starts the API alone, Ray Serve's default proxy and its HAProxy mode beside
    each other, lets them take turns, and holds every reward to the Scorer's.

    [dim]polar-ray bench serve --engine fake --callers 8 --rows 64[/]
    [dim]polar-ray bench serve --engine fake --tokens-per-s 100000 --wire arrow[/]
    """
    from polar_ray.bench.roads import ROADS
    from polar_ray.bench.serve import METHOD, ROWS_IN_FLIGHT, bench_serve, settings_for, within_reach

    roads, engines = list(road or ROADS), list(engine or ROWS_IN_FLIGHT)
    _refuse_unknown("road", roads, ROADS)
    _refuse_unknown("engine", engines, ROWS_IN_FLIGHT)
    callers, rows = callers or [1, 8, 32], rows or [1, 4, 64, 512]
    loads = [within_reach(callers, rows, kind) for kind in engines]
    busy_before, results = os.getloadavg(), []
    for kind, some in zip(engines, loads, strict=True):
        settings = settings_for(kind, model, threads, tokens_per_s)
        compared = bench_serve(settings, some, roads, rounds=rounds, seconds=seconds, wire=wire, seed=seed)
        _show_comparison(compared)
        results.append(asdict(compared))
    Console().print(SERVE_LEGEND, style="dim", highlight=False)
    if output is not None:
        from polar_ray.bench.provenance import write_results

        name = model if model == EMBEDDED_MODEL else Path(model).name
        words = ["polar-ray bench serve", *_repeated("engine", engines), f"--model {name}", *_repeated("road", roads)]
        words += [*_repeated("callers", callers), *_repeated("rows", rows)]
        words += [f"--rounds {rounds} --seconds-per-load {seconds:g} --wire {wire} --threads {threads} --seed {seed}"]
        words += [] if tokens_per_s is None else [f"--tokens-per-s {tokens_per_s:g}"]
        measured = {
            "model": name, "rounds": rounds, "seconds_per_load": seconds, "wire": wire, "tokens_per_s": tokens_per_s,
            "threads": threads, "seed": seed,
        }  # fmt: skip
        content = {
            "load_average": {"before": busy_before, "after": os.getloadavg()},
            "settings": METHOD | measured,
            "results": results,
        }
        write_results(output, " ".join(words), content)


def _sequences(workload: str, tokens: int, group_size: int | None, vocab_size: int, seed: int) -> list[Ids]:
    """As many whole groups as hold `tokens` tokens, with other ids for other workloads."""
    from polar_ray.bench.workload import WORKLOADS, draw_groups

    lengths = WORKLOADS[workload]
    sequences: list[Ids] = []
    groups = draw_groups(lengths, vocab_size, group_size=group_size, seed=seed + list(WORKLOADS).index(workload))
    while sum(map(len, sequences)) < tokens:
        sequences += [ids for group in islice(groups, lengths.references) for ids in group]
    return sequences


def _described(workload: str, sequences: Sequence[Ids]) -> dict[str, Any]:
    from polar_ray.bench.workload import WORKLOADS

    return {**asdict(WORKLOADS[workload]), "sequences": len(sequences), "tokens": sum(map(len, sequences))}


def _refuse_unknown(option: str, given: Iterable[str], known: Iterable[str]) -> None:
    if unknown := set(given) - set(known):
        raise ConfigError(f"--{option} {min(unknown)}: expected {' or '.join(known)}")


def _repeated(option: str, values: Iterable[object]) -> list[str]:
    return [f"--{option} {value}" for value in values]


def _show_comparison(compared: Comparison) -> None:
    Console().print(_serve_table(compared))
    for road, reason in compared.left_out.items():
        Console(stderr=True, highlight=False).print(f"{road} is left out: {reason}", markup=False)


@contextmanager
def _checkpoint(shape: str, model: str | None, seed: int) -> Iterator[Path]:
    """The folder of `model`, or of random weights for as long as this lasts."""
    from polar_ray.bench.workload import SHAPES, write_random_checkpoint
    from polar_ray.model.locate import locate_model

    if model is not None:
        yield locate_model(model)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_random_checkpoint(Path(folder), SHAPES[shape], seed=seed)
        yield Path(folder)


ENGINES_LEGEND = (
    "CPU s: of all processes. x: CPU time of readme over its own. of rate: of what bare products in the same "
    "arithmetic reach. plan: planning's part of the CPU time. Errors are from float32 of the same weights."
)


def _engines_table(results: Sequence[EngineResult]) -> Table:
    table = _plain_table(f"{results[0].workload}, {results[0].tokens:,} tokens a round", ("engine", "", "prefixes"))
    for name in ("tokens/s", "CPU s", "x", "of rate", "plan", "max error"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in results:
        table.add_row(
            row.method,
            row.arithmetic,
            _prefixes(row),
            f"{row.tokens_per_s:,.0f}",
            f"{row.median_cpu_s:.2f}",
            "" if row.speedup_over_readme is None else f"{row.speedup_over_readme:.2f}",
            "" if row.fraction_of_product_rate is None else f"{row.fraction_of_product_rate:.0%}",
            f"{row.planning_share:.1%}",
            f"{row.max_error:.1e}",
        )
    return table


def _processes_table(results: Sequence[EngineResult]) -> Table:
    """What each takes besides time."""
    table = _plain_table("Processes", ("engine", "prefixes"))
    for name in ("memory", "start"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("version")
    for row in results:
        memory, start = f"{row.memory_bytes / 2**30:.2f} GiB", f"{row.start_s:.0f} s"
        table.add_row(row.method, _prefixes(row), memory, start, row.version)
    return table


def _plain_table(title: str, names: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", padding=(0, 1, 0, 0), box=None)
    for name in names:
        table.add_column(name, no_wrap=True)
    return table


def _prefixes(row: EngineResult) -> str:
    return "shared" if row.share_prefixes else "unshared"


SERVE_COLUMNS = (
    "req/s", "rows/s", "of engine", "x proxy", "p50 ms", "p99 ms", "wall", "CPU us", "+ us", "+ ms", "+", "tokens",
)  # fmt: skip

SERVE_LEGEND = (
    "of engine: of the tokens a second that are slept for. wall: time beyond the Scorer's. CPU us, tokens: of a row. "
    "+ us, + ms, +: CPU time beyond the Scorer's, for a row, for a request, and as a part of it; what a cluster takes "
    "at rest is left out."
)


def _serve_table(compared: Comparison) -> Table:
    table = _plain_table(f"{compared.engine} engine", ())
    for name in ("callers", "rows"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("road", no_wrap=True)
    names = [name for name in SERVE_COLUMNS if name != "of engine" or compared.results[0].of_engine is not None]
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    load = None
    for row in compared.results:
        is_next = (row.callers, row.rows_per_request) != load
        if is_next and load is not None:
            table.add_section()
        load = (row.callers, row.rows_per_request)
        table.add_row(*_load_cells(row, is_next), *_road_cells(row, names))
    return table


def _load_cells(row: Result, is_first: bool) -> list[str]:
    return [str(row.callers), str(row.rows_per_request)] if is_first else ["", ""]


def _road_cells(row: Result, names: Sequence[str]) -> list[str]:
    """The road's name and a cell for each of `names`, which are some of `SERVE_COLUMNS`."""
    from polar_ray.bench.serve import SCORER

    cells = {
        "req/s": f"{row.requests_per_s:,.4g}",
        "rows/s": f"{row.rows_per_s:,.4g}",
        "p50 ms": f"{row.p50_ms:,.1f}",
        "p99 ms": f"{row.p99_ms:,.1f}",
        "CPU us": f"{row.road_cpu_us_per_row:,.0f}",
        "tokens": f"{row.computed_tokens_per_row:.0f}",
    }
    if row.of_engine is not None:
        cells["of engine"] = f"{row.of_engine:.1%}"
    if row.speed_over_proxy is not None:
        cells["x proxy"] = f"{row.speed_over_proxy:.2f}"
    if row.road != SCORER:
        cells |= {
            "wall": f"{row.overhead_percent:,.0f}%",
            "+ us": f"{row.cpu_overhead_us_per_row:,.0f}",
            "+ ms": f"{row.cpu_overhead_ms_per_request:,.1f}",
            "+": f"{row.cpu_overhead_percent:,.0f}%",
        }
    return [row.road, *(cells.get(name, "") for name in names)]
