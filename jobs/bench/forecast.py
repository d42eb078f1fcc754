"""How well `polar-ray plan --gpu here` foretells a job: the forecast from some units, and then the job.

    python jobs/bench/forecast.py --rows 8000 --output build/forecast.json

A corpus of several sources, whose texts differ in length, is scored by one actor. Its time runs from its first unit to
its last file, without what starting takes, which a forecast leaves out. Let nothing else run.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from make_corpus import Corpus

from polar_ray.bench.provenance import write_results
from polar_ray.config import EMBEDDED_MODEL, ScoreConfig
from polar_ray.corpus.forecast import HERE, forecast
from polar_ray.corpus.job import score_parquet
from polar_ray.corpus.manifest import load_manifest
from polar_ray.corpus.storage import Location
from polar_ray.corpus.units import read_written_report

LENGTHS = (0.5, 1.0, 2.0, 4.0)
"""Factors of the sources' text lengths."""


def write_corpus(folder: Path, rows: int, seed: int) -> None:
    for number, length in enumerate(LENGTHS):
        Corpus(rows // len(LENGTHS), seed + number, length=length).write(folder / f"source-{number}")


def job_seconds(scored: Path) -> float:
    """From the begin of the first unit of a job to its last file."""
    place = Location(str(scored))
    manifest = load_manifest(place)
    assert manifest is not None
    written = {unit.index: scored.joinpath(manifest.part(unit.index)).stat().st_mtime for unit in manifest.units}
    first = min(written, key=written.__getitem__)
    return max(written.values()) - written[first] + read_written_report(place, manifest, first).seconds


def main(
    rows: Annotated[int, typer.Option(min=len(LENGTHS), help="Of the corpus.")] = 8000,
    unit_rows: Annotated[int, typer.Option(min=1)] = 256,
    units: Annotated[int, typer.Option(min=1, help="That the forecast reads.")] = 8,
    model: Annotated[str, typer.Option(help="Checkpoint folder or hub name.")] = EMBEDDED_MODEL,
    rounds: Annotated[int, typer.Option(min=1, help="Each another corpus and another sample.")] = 3,
    seed: Annotated[int, typer.Option(help="Of the first round.")] = 0,
    output: Annotated[Path, typer.Option(help="JSON file for the result.")] = Path("build/forecast.json"),
) -> None:
    """Compare forecasts with what the jobs took."""
    config = ScoreConfig(model=model, unit_rows=unit_rows, actors=1)
    found: list[dict[str, Any]] = []
    for number in range(seed, seed + rounds):
        with tempfile.TemporaryDirectory(prefix="forecast-") as folder:
            corpus, scored = Path(folder, "in"), Path(folder, "out")
            write_corpus(corpus, rows, number * len(LENGTHS))
            began = time.perf_counter()
            told = forecast(corpus, config, gpu=HERE, units=units, seed=number)
            took = time.perf_counter() - began
            summary = score_parquet(corpus, scored, config)
            found.append(
                {
                    "foretold_s": 3600 * told.hours(1),
                    "job_s": job_seconds(scored),
                    "foretold_tokens": told.computed_tokens.total,
                    "computed_tokens": summary.computed_tokens,
                    "units": told.units,
                    "forecasting_s": took,
                }
            )
    shown = Table("foretold", "job", "off by", "tokens off by", "forecasting", box=None)
    for row in found:
        off, tokens_off = row["foretold_s"] / row["job_s"] - 1, row["foretold_tokens"] / row["computed_tokens"] - 1
        seconds = [f"{row[name]:.1f} s" for name in ("foretold_s", "job_s", "forecasting_s")]
        shown.add_row(*seconds[:2], f"{off:+.1%}", f"{tokens_off:+.1%}", seconds[2])
    Console().print(shown)
    command = (
        f"python jobs/bench/forecast.py --rows {rows} --unit-rows {unit_rows} --units {units} "
        f"--model {model if model == EMBEDDED_MODEL else Path(model).name} --rounds {rounds} --seed {seed}"
    )
    write_results(output, command, {"rounds": found})


if __name__ == "__main__":
    os.environ.update(RAY_USAGE_STATS_ENABLED="0")
    typer.run(main)
