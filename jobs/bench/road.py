"""How much of an engine's speed is left on the way from Parquet to it and back, without a GPU.

    python jobs/bench/road.py --tokens-per-second 200000 --output build/road.json

The engine is replaced by a sleep as long as one of the stated speed would take for the tokens it is given. What is
compared, unit by unit of a synthetic corpus:

    engine    the sleep alone, on batches that were planned before
    in turn   encode the unit, plan it, then compute it
    ahead     `Scorer.score`, which encodes and plans ahead of the engine, each unit prepared during the one before
    job       a corpus job with one actor, from the first unit's file to the last's

Let nothing else run: encoding needs a processor of its own.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import pyarrow.parquet as pq
import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from make_corpus import Corpus

from polar_ray.bench.provenance import write_results
from polar_ray.config import EngineConfig, ScoreConfig
from polar_ray.corpus.job import score_parquet
from polar_ray.encoding.encode import EncodedTriple
from polar_ray.engines.build import DEFAULT_TOKEN_BUDGET
from polar_ray.scoring import Scorer
from polar_ray.triples import Triple


def sleeping(tokens_per_s: float) -> EngineConfig:
    """An engine that takes as long as one of this speed, with the budget that it would have on a GPU."""
    speed: dict[str, bool | int | float | str] = {"tokens_per_s": tokens_per_s}
    return EngineConfig(kind="fake", arguments=speed, token_budget=DEFAULT_TOKEN_BUDGET["cuda"], threads=1)


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def in_one_process(units: list[list[Triple]], tokens_per_s: float, rounds: int) -> dict[str, list[float]]:
    """Seconds of all units in each round, by method; the methods take turns."""
    scorer = Scorer.open(engine=sleeping(tokens_per_s))
    encoded = [[row for row in scorer.encode(unit) if isinstance(row, EncodedTriple)] for unit in units]
    planned = [scorer.plan(rows) for rows in encoded]

    def in_turn() -> None:
        for unit in units:
            scorer.compute([row for row in scorer.encode(unit) if isinstance(row, EncodedTriple)])

    def ahead() -> None:
        following = scorer.prepare(units[0])
        for unit in [*units[1:], []]:
            prepared, following = following, scorer.prepare(unit)
            scorer.score(prepared)

    methods: dict[str, Callable[[], object]] = {
        "engine": lambda: [scorer.engine.score(batch) for each in planned for batch in each.batches],
        "in turn": in_turn,
        "ahead": ahead,
    }
    taken: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name, run in methods.items():
            taken[name].append(seconds(run))
    return taken


def job_seconds(corpus: Path, output: Path, unit_rows: int, tokens_per_s: float) -> tuple[float, int]:
    """Of a job with one actor: from its first file to its last, and the rows that were scored meanwhile."""
    config = ScoreConfig(unit_rows=unit_rows, actors=1, engine=sleeping(tokens_per_s))
    score_parquet(corpus, output, config)
    files = sorted(output.glob("*.parquet"), key=lambda file: file.stat().st_mtime_ns)
    first, last = (files[place].stat().st_mtime_ns for place in (0, -1))
    return (last - first) / 1e9, sum(pq.read_metadata(file).num_rows for file in files[1:])


def main(
    tokens_per_second: Annotated[float, typer.Option(help="Computed tokens of the engine that is slept for.")] = 2e5,
    units: Annotated[int, typer.Option(min=2)] = 32,
    unit_rows: Annotated[int, typer.Option(min=1)] = 1024,
    length: Annotated[float, typer.Option(help="Factor of all text lengths; at 3, of GSM8K's.")] = 3.0,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    output: Annotated[Path, typer.Option(help="JSON file for the result.")] = Path("build/road.json"),
) -> None:
    """Compare the rows a second of four ways to feed an engine that sleeps."""
    with tempfile.TemporaryDirectory(prefix="road-") as folder:
        corpus = Path(folder, "in")
        Corpus(units * unit_rows, fault_share=0.0, length=length, file_rows=unit_rows).write(corpus)
        columns = ["prompt", "reference", "output"]
        tables = [pq.read_table(file, columns=columns).to_pylist() for file in sorted(corpus.glob("*.parquet"))]
        taken = in_one_process([[Triple(**row) for row in rows] for rows in tables], tokens_per_second, rounds)
        jobs = [job_seconds(corpus, Path(folder, f"out-{n}"), unit_rows, tokens_per_second) for n in range(rounds)]
    rates = {name: units * unit_rows / statistics.median(each) for name, each in taken.items()}
    rates["job"] = statistics.median(rows / passed for passed, rows in jobs)
    shown = Table("", "rows/s", "of the engine's", box=None)
    for name, rate in rates.items():
        shown.add_row(name, f"{rate:,.0f}", f"{rate / rates['engine']:.1%}")
    Console().print(shown)
    command = (
        f"python jobs/bench/road.py --tokens-per-second {tokens_per_second:g} --units {units} "
        f"--unit-rows {unit_rows} --length {length:g} --rounds {rounds}"
    )
    content = {
        "rows_per_s": rates,
        "of_engine": {name: rate / rates["engine"] for name, rate in rates.items()},
        "seconds": taken | {"job": [passed for passed, _ in jobs]},
    }
    write_results(output, command, content)


if __name__ == "__main__":
    os.environ.update(RAY_USAGE_STATS_ENABLED="0")
    typer.run(main)
