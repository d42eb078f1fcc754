"""How a corpus job behaves at scale: rows a second beside the zero-cost bound, and its driver's memory over time.

    python jobs/bench/scale.py --rows 2000000 --output jobs/bench/results/scale_2m.json

A synthetic corpus is scored with the fake engine, which costs next to nothing, on a cluster of several raylets on this
machine: what is left is everything around a model. The bound is one process that does the same to some of the units,
reading, encoding, planning, adding up and writing, without Ray. A plot is drawn beside the result. Let nothing else
run: the processor time that is told is the whole machine's.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))

from make_corpus import Corpus

BOUND_UNITS = 12
SAMPLE_SECONDS = 1.0
MIB = 1 << 20


@contextmanager
def local_cluster(nodes: int, cpus: int) -> Iterator[str]:
    """The address of a cluster of a head without CPUs and `nodes` raylets of `cpus` CPUs each, on this machine."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(nodes):
            cluster.add_node(num_cpus=cpus, object_store_memory=80 * MIB)
        yield cluster.address
    finally:
        cluster.shutdown()


def run_job(command: list[str], output: Path, address: str) -> dict[str, Any]:
    """Run the job in a process of its own; its summary, and its memory in MiB over the seconds since its start."""
    started = time.monotonic()
    job = subprocess.Popen(command, env={**os.environ, "RAY_ADDRESS": address}, stdout=subprocess.PIPE, text=True)
    driver, samples = psutil.Process(job.pid), []
    while job.poll() is None:
        with suppress(psutil.Error, OSError):  # it may end at any moment
            memory = driver.memory_full_info().uss / MIB
            samples.append((time.monotonic() - started, memory, len(list(output.glob("*.parquet")))))
        time.sleep(SAMPLE_SECONDS)
    assert job.stdout is not None
    printed = job.stdout.read()
    if job.returncode:
        raise RuntimeError(f"the job ended with status {job.returncode}")
    return {"summary": json.loads(printed), "driver_memory": samples}


def bound(output: Path) -> dict[str, float]:
    """Seconds of one processor for a row, of what must be done in any case, by step: medians over some units."""
    from polar_ray.config import EngineConfig
    from polar_ray.corpus.manifest import load_manifest
    from polar_ray.corpus.storage import Location
    from polar_ray.corpus.summary import report_unit
    from polar_ray.corpus.units import read_unit, write_unit
    from polar_ray.scoring import Scorer

    manifest = load_manifest(Location(str(output)))
    assert manifest is not None
    every = max(1, len(manifest.units) // BOUND_UNITS)
    taken: dict[str, list[float]] = {"read": [], "encode": [], "plan_and_score": [], "add_up": [], "write": []}
    with Scorer.open(engine=EngineConfig(kind="fake", device="cpu")) as scorer, tempfile.TemporaryDirectory() as aside:
        for index in list(range(0, len(manifest.units), every))[:BOUND_UNITS]:
            moments = [time.process_time()]
            table, triples = read_unit(manifest, index)
            moments.append(time.process_time())
            scorer.encode(triples)
            moments.append(time.process_time())
            before = scorer.usage.copy()
            scored = scorer.score(triples)
            moments.append(time.process_time())
            report = report_unit(triples, scored, scorer.usage - before, 0.0)
            moments.append(time.process_time())
            write_unit(Location(aside), manifest, index, table, scored, report)
            moments.append(time.process_time())
            read, encode, both, add_up, write = (b - a for a, b in pairwise(moments))
            for step, seconds in zip(taken, (read, encode, both - encode, add_up, write), strict=True):
                taken[step].append(seconds / len(triples))
    return {step: statistics.median(values) for step, values in taken.items()}


def busy_seconds() -> float:
    """Processor time of this machine so far, whoever used it: workers that have ended take their own with them."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq)


def resume(command: list[str], address: str) -> float:
    """Seconds of the same command on a job that is finished: all that a resumed job does before and after its work."""
    started = time.monotonic()
    subprocess.run(command, env={**os.environ, "RAY_ADDRESS": address}, stdout=subprocess.DEVNULL, check=True)
    return time.monotonic() - started


def plot(result: dict[str, Any], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    seconds, memory, units = zip(*result["driver_memory"], strict=True)
    figure, axes = pyplot.subplots(figsize=(8, 4), constrained_layout=True)
    axes.plot(seconds, memory, color="#1f77b4")
    axes.set(xlabel="seconds", ylabel="driver's own memory, MiB", ylim=(0, max(memory) * 1.3))
    axes.set_title(
        f"{result['rows']:,} rows in {result['units']:,} units, {result['actors']} actors on {result['nodes']} raylets"
    )
    done = axes.twinx()
    done.plot(seconds, units, color="#999999", linestyle="--")
    done.set(ylabel="units written (dashed)", ylim=(0, None))
    figure.savefig(file, dpi=110)


def main(
    rows: Annotated[int, typer.Option(min=1000)] = 2_000_000,
    nodes: Annotated[int, typer.Option(min=1, help="Raylets with CPUs.")] = 3,
    actors: Annotated[int, typer.Option(min=1)] = 3,
    unit_rows: Annotated[int, typer.Option(min=1)] = 4096,
    length: Annotated[float, typer.Option(help="Factor of all text lengths.")] = 1.0,
    output: Annotated[Path, typer.Option(help="JSON file for the result; the plot lies beside it.")] = Path(
        "build/scale.json"
    ),
) -> None:
    """Score a synthetic corpus with the fake engine and report what everything around a model costs."""
    notes = Console(stderr=True)
    settings = [f"--set=actors={actors}", f"--set=unit_rows={unit_rows}", "--set=engine.device=cpu", "--engine=fake"]
    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        corpus, scored = Path(folder, "in"), Path(folder, "out")
        started = time.monotonic()
        faults = Corpus(rows, length=length).write(corpus)
        notes.print(f"corpus: {rows} rows in {time.monotonic() - started:.0f} s")
        command = [
            sys.executable,
            "-m",
            "polar_ray",
            "score",
            str(corpus),
            "--output",
            str(scored),
            "--json",
            *settings,
        ]
        with local_cluster(nodes, max(1, actors // nodes)) as address:
            before = busy_seconds()
            job = run_job(command, scored, address)
            spent = busy_seconds() - before
            notes.print(f"scored in {job['summary']['seconds']:.0f} s")
            resumed = resume(command, address)
            notes.print(f"the same command again: {resumed:.1f} s")
        steps = bound(scored)
    least = sum(steps.values())
    memory = [value for _, value, _ in job["driver_memory"]]
    half = len(memory) // 2
    result = {
        "rows": rows,
        "faults": dict(faults),
        "by_status": job["summary"]["by_status"],
        "units": job["summary"]["units"],
        "nodes": nodes,
        "actors": actors,
        "tokens": job["summary"]["tokens"],
        "computed_tokens": job["summary"]["computed_tokens"],
        "seconds": job["summary"]["seconds"],
        "rows_per_second": rows / job["summary"]["seconds"],
        "cpu_seconds_per_row": spent / rows,
        "bound_cpu_seconds_per_row": least,
        "bound_by_step": steps,
        "overhead": spent / rows / least - 1,
        "resume_seconds": resumed,
        "driver_memory_mib": {
            "first_half": statistics.median(memory[:half]),
            "second_half": statistics.median(memory[half:]),
            "highest": max(memory),
        },
        "driver_memory": job["driver_memory"],
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    plot(result, output.with_suffix(".png"))
    typer.echo(json.dumps({name: value for name, value in result.items() if name != "driver_memory"}, indent=2))


if __name__ == "__main__":
    os.environ.update(RAY_USAGE_STATS_ENABLED="0")
    typer.run(main)
