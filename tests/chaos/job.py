"""A corpus job through a random schedule of faults, compared row for row with one that nobody disturbed.

    python -m tests.chaos.job --seed 1 --faults 20 --output build/chaos.json

The job runs on a cluster of several raylets and writes to an object store, or (`--storage disk`) to a small disk. When
it ends with an error it is started again, as a cluster's job controller would, and goes on where it was.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import pyarrow.parquet as pq
import typer
from rich.console import Console

from jobs.make_corpus import Corpus
from polar_ray.corpus.storage import Location
from tests.chaos.cluster import ChaosCluster, chaos_cluster
from tests.serve.conftest import free_port
from tests.support.flaky_s3 import flaky_s3

PROJECT = Path(__file__).parents[2]

FILLER_BYTES = 1 << 20
DISK_MIB = 24

MOST_RUNS = 50

GIVE_UP_S = 300.0
"""For a driver to come to its end once it is left alone."""


class World:
    """Everything that a fault may touch."""

    def __init__(self, cluster: ChaosCluster, chance: random.Random, folder: Path, source: Path) -> None:
        self.cluster = cluster
        self.chance = chance
        self.folder = folder
        self.source = source
        self.runs = 0
        self.errors: list[str] = []
        self._pace = folder / "pace"
        self._ledger = folder / "ledger"
        self._ledger.mkdir()
        self.driver: subprocess.Popen[str] | None = None

    def set_pace(self, seconds_per_row: float) -> None:
        aside = self._pace.with_suffix(".tmp")
        aside.write_text(str(seconds_per_row))
        aside.rename(self._pace)

    def start(self, output: str) -> None:
        """Start the job's driver, anew or again."""
        self.runs += 1
        command = [sys.executable, "-m", "tests.chaos.paced_job", str(self.source), output]
        self.driver = subprocess.Popen(
            [*command, str(self._pace), str(self._ledger)], cwd=PROJECT, text=True,
            env={**os.environ, "RAY_ADDRESS": self.cluster.address}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip

    def is_done(self, output: str) -> bool:
        """Whether the driver has come to a good end; one that has come to another is started again."""
        assert self.driver is not None
        if self.driver.poll() is None:
            return False
        _, complaints = self.driver.communicate()
        if self.driver.returncode == 0:
            return True
        self.errors.append((complaints.strip().splitlines() or [f"signal {-self.driver.returncode}"])[-1][:300])
        assert self.runs < MOST_RUNS, f"the job fails again and again: {self.errors}"
        self.start(output)
        return False

    def computed_rows(self) -> int:
        return sum(int(line) for file in self._ledger.iterdir() for line in file.read_text().splitlines())


class Faults:
    """What may happen, by name: the methods that do not begin with an underscore. Each gives whether it happened."""

    def __init__(self, world: World) -> None:
        self._world = world

    def kill_actor(self) -> bool:
        return self._world.cluster.kill_process("ScoringActor")

    def kill_tracker(self) -> bool:
        return self._world.cluster.kill_process("JobTracker")

    def kill_driver(self) -> bool:
        assert self._world.driver is not None
        self._world.driver.send_signal(signal.SIGKILL)
        self._world.driver.wait()
        return True

    def lose_node(self) -> bool:
        self._world.cluster.lose_node()
        return True

    def drain_node(self) -> bool:
        self._world.cluster.drain_node(notice_s=3)
        return True

    def freeze_node(self) -> bool:
        self._world.cluster.freeze_node(seconds=6)
        return True

    def slow_actor(self) -> bool:
        return self._world.cluster.pause_process("ScoringActor", seconds=5)

    def restart_gcs(self) -> bool:
        self._world.cluster.restart_gcs(seconds=2)
        return True


class ObjectStoreFaults(Faults):
    """And what an object store does."""

    def __init__(self, world: World, store) -> None:
        super().__init__(world)
        self._store = store

    def store_outage(self) -> bool:
        return self._fail_for(8, refused=1.0)

    def store_lies(self) -> bool:
        """Refuses a third of all requests, does another third of the writes and says that it did not."""
        return self._fail_for(5, refused=0.3, lost=0.3)

    def _fail_for(self, seconds: float, **shares: float) -> bool:
        before = self._store.failures()
        self._store.fail(**shares)
        time.sleep(seconds)
        self._store.fail()
        return self._store.failures() > before


class DiskFaults(Faults):
    """And what a disk does."""

    def __init__(self, world: World, disk: Path) -> None:
        super().__init__(world)
        self._filler = disk / "somebody-elses-file"

    def full_disk(self) -> bool:
        """Until a unit could not be written; then there is room again."""
        assert self._world.driver is not None
        with self._filler.open("wb", buffering=0) as filler:
            try:
                while True:
                    filler.write(bytes(FILLER_BYTES))
            except OSError:
                pass
        try:
            self._world.driver.wait(60)
        finally:
            self._filler.unlink()
        return True


@contextmanager
def small_disk(folder: Path):
    """A file system of a few MiB. Raises `CalledProcessError` where this process may not mount one."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def run(seed: int, n_faults: int, rows: int, storage: str, only: list[str], say=lambda line: None) -> dict:
    """Do it; gives what came of it. Every kind of fault, or those in `only`, happens before one happens twice."""
    chance = random.Random(seed)
    started = time.monotonic()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        Corpus(rows, seed, fault_share=0.01, length=0.2).write(folder / "in")
        cluster = stack.enter_context(chaos_cluster(chance, folder / "gcs"))
        world = World(cluster, chance, folder, folder / "in")
        stack.callback(lambda: world.driver and world.driver.kill())
        if storage == "s3":
            store = stack.enter_context(flaky_s3(free_port(), seed))
            store.filesystem().create_dir("corpus")
            faults: Faults = ObjectStoreFaults(world, store)
            place = store.url
        else:
            disk = stack.enter_context(small_disk(folder / "disk"))
            faults = DiskFaults(world, disk)
            place = lambda path: str(disk / path.removeprefix("corpus/"))  # noqa: E731
        expected = _undisturbed(world, place("corpus/undisturbed"))
        say(f"undisturbed: {len(expected)} rows in {time.monotonic() - started:.0f} s")
        computed_before = world.computed_rows()
        world.runs = 0
        kinds = only or [name for name in dir(faults) if not name.startswith("_")]
        schedule = [name for _ in range(-(-n_faults // len(kinds))) for name in chance.sample(kinds, len(kinds))]
        done = _disturb(world, faults, place("corpus/out"), schedule[:n_faults], say)
        found = _read(place("corpus/out"))
        computed = world.computed_rows() - computed_before
    return {
        "seed": seed,
        "storage": storage,
        "faults": dict(sorted(done.items())),
        "faults_survived": sum(done.values()),
        "runs": world.runs,
        "errors": world.errors,
        "rows": len(expected),
        **_compare(expected, found),
        "rows_computed": computed,
        "work_repeated": computed / computed_before - 1,
        "seconds": time.monotonic() - started,
    }


def _undisturbed(world: World, output: str) -> pa.Table:
    world.set_pace(0)
    world.start(output)
    _finish(world, output)
    return _read(output)


def _disturb(world: World, faults: Faults, output: str, schedule: list[str], say) -> Counter[str]:
    done: Counter[str] = Counter()
    world.set_pace(0.04)
    world.start(output)
    for name in schedule:
        _wait_for_progress(world, output)
        happened = getattr(faults, name)()
        done[name] += happened
        say(f"{name}{'' if happened else ' (nothing there to be hit)'}")
    world.set_pace(0)
    _finish(world, output)
    return done


def _wait_for_progress(world: World, output: str) -> None:
    """Until rows have been computed since the last fault, and a little longer, so that faults hit all stages."""
    before = world.computed_rows()
    deadline = time.monotonic() + GIVE_UP_S
    while world.computed_rows() == before:
        assert not world.is_done(output), "the job was over before all faults were done; give it more rows"
        assert time.monotonic() < deadline, f"no progress after a fault; errors so far: {world.errors}"
        time.sleep(0.2)
    time.sleep(world.chance.uniform(0, 1.5))


def _finish(world: World, output: str) -> None:
    deadline = time.monotonic() + GIVE_UP_S
    while not world.is_done(output):
        assert time.monotonic() < deadline, f"the job did not end; errors so far: {world.errors}"
        time.sleep(0.2)


def _read(output: str) -> pa.Table:
    """All files of an output, in order."""
    place = Location(output)
    return pa.concat_tables(pq.read_table(info.path, filesystem=place.filesystem) for info in place.walk())


def _compare(expected: pa.Table, found: pa.Table) -> dict[str, int]:
    rows = Counter(found["row"].to_pylist())
    wanted = {row["row"]: row for row in expected.to_pylist()}
    return {
        "rows_lost": len(wanted.keys() - rows.keys()),
        "rows_duplicated": sum(count - 1 for count in rows.values()),
        "rows_different": sum(wanted.get(row["row"]) != row for row in found.to_pylist()),
        "order_kept": found["row"].to_pylist() == expected["row"].to_pylist(),
    }


def main(
    seed: Annotated[int, typer.Option(help="Another seed, another schedule.")] = 0,
    faults: Annotated[int, typer.Option(min=1, help="How many.")] = 20,
    rows: Annotated[int, typer.Option(min=500, help="Rows of the corpus; more faults take more.")] = 12_000,
    storage: Annotated[str, typer.Option(help="Where the output goes: s3 or disk.")] = "s3",
    only: Annotated[list[str] | None, typer.Option(help="Of faults, these alone.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file for the result.")] = None,
) -> None:
    """Drive a corpus job through faults and compare its output with that of an undisturbed run."""
    notes = Console(stderr=True)
    faults = len(only) if only else faults
    result = run(
        seed, faults, rows, storage, only or [], lambda line: notes.print(f"{time.strftime('%H:%M:%S')} {line}")
    )
    text = json.dumps(result, indent=2)
    typer.echo(text)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n")
    raise typer.Exit(any(result[name] for name in ("rows_lost", "rows_duplicated", "rows_different")))


if __name__ == "__main__":
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="disabled")
    os.environ.update(AWS_ACCESS_KEY_ID="for-a-test-server", AWS_SECRET_ACCESS_KEY="for-a-test-server")
    typer.run(main)
