"""How long a job with units of very different cost waits for its last one, without a GPU.

    python jobs/bench/tail.py --actors 8 --output build/tail.json

A real job on Ray Data whose engines sleep as long as one of the stated speed would take. Units differ in the length of
their texts as corpora of many sources do. Compared with the best there can be, which is all work divided evenly or the
longest unit alone, are

    job            as measured, from when all engines are up to the last file
    by size        the largest unit first, by bytes, as the job hands them out; by arithmetic
    by cost        the largest first, by what it then took; by arithmetic
    in order       as they come in the input; by arithmetic
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from make_corpus import Corpus

from polar_ray.bench.provenance import write_results
from polar_ray.config import EngineConfig, ScoreConfig
from polar_ray.corpus.actor import open_scorer
from polar_ray.corpus.forecast import makespan
from polar_ray.corpus.job import score_parquet
from polar_ray.corpus.manifest import load_manifest
from polar_ray.corpus.storage import Location
from polar_ray.corpus.units import read_written_report
from polar_ray.scoring import Scorer

LENGTH_SIGMA = 0.8
"""Of the logarithm of a unit's lengths: one unit in a hundred is six times the median."""


def write_corpus(folder: Path, units: int, unit_rows: int, seed: int) -> None:
    """A file for each unit, in folders of their own."""
    factors = np.random.default_rng(seed).lognormal(0.0, LENGTH_SIGMA, size=units)
    for number, factor in enumerate(factors.tolist()):
        Corpus(unit_rows, seed + number, fault_share=0.0, length=factor).write(folder / f"{number:04d}")


def open_later(config: ScoreConfig, *, not_before: float) -> Scorer:
    """The scorer of an actor, once the clock says so: then all of them begin together."""
    time.sleep(max(0.0, not_before - time.time()))
    return open_scorer(config)


def main(
    actors: Annotated[int, typer.Option(min=1)] = 8,
    units: Annotated[int, typer.Option(min=2)] = 64,
    unit_rows: Annotated[int, typer.Option(min=1)] = 128,
    tokens_per_second: Annotated[float, typer.Option(help="Of each engine that is slept for.")] = 5000,
    start: Annotated[float, typer.Option(help="Seconds within which all actors are up.")] = 45,
    seed: Annotated[int, typer.Option(help="Of lengths and texts.")] = 0,
    output: Annotated[Path, typer.Option(help="JSON file for the result.")] = Path("build/tail.json"),
) -> None:
    """Compare a job's time with the best that its units allow."""
    with tempfile.TemporaryDirectory(prefix="tail-") as folder:
        corpus, scored = Path(folder, "in"), Path(folder, "out")
        write_corpus(corpus, units, unit_rows, seed)
        engine = EngineConfig(kind="fake", arguments={"tokens_per_s": tokens_per_second})
        begin = time.time() + start
        config = ScoreConfig(unit_rows=unit_rows, actors=actors, engine=engine)
        score_parquet(corpus, scored, config, build_scorer=partial(open_later, not_before=begin))
        finished = [file.stat().st_mtime for file in scored.glob("**/*.parquet")]
        place = Location(str(scored))
        manifest = load_manifest(place)
        assert manifest is not None
        reports = [read_written_report(place, manifest, unit.index) for unit in manifest.units]
        costs = [report.computed_tokens / tokens_per_second for report in reports]
        sizes = [unit.size for unit in manifest.units]
    by_size = [cost for _, cost in sorted(zip(sizes, costs, strict=True), reverse=True)]
    times = {
        "best": max(sum(costs) / actors, max(costs)),
        "job": max(finished) - begin,
        "by size": makespan(by_size, actors),
        "by cost": makespan(sorted(costs, reverse=True), actors),
        "in order": makespan(costs, actors),
    }
    shown = Table("", "seconds", "of the best", box=None)
    for name, taken in times.items():
        shown.add_row(name, f"{taken:.1f}", f"{taken / times['best']:.3f}")
    Console().print(shown)
    command = (
        f"python jobs/bench/tail.py --actors {actors} --units {units} --unit-rows {unit_rows} "
        f"--tokens-per-second {tokens_per_second:g} --start {start:g} --seed {seed}"
    )
    content = {
        "seconds": times,
        "of_best": {name: taken / times["best"] for name, taken in times.items()},
        "units": [{"bytes": size, "seconds": cost} for size, cost in zip(sizes, costs, strict=True)],
    }
    write_results(output, command, content)


if __name__ == "__main__":
    os.environ.update(RAY_USAGE_STATS_ENABLED="0")
    typer.run(main)
