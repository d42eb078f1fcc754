"""Who is answered in time where calls of every size and every deadline queue for one engine, without a GPU.

    python jobs/bench/deadlines.py --output build/deadlines.json

The batcher and the admission of an endpoint's replica, around an engine that sleeps as long as one of the stated speed
would take. Calls come at random times: three of four are one group, some are a trainer's batch, a few a whole
rollout's; half have a default deadline, the others one that is 1.5 to 20 times what the engine would take alone. The
same calls, at the same times, are given to

    by due time    a call is due at its deadline, or after some times what it takes alone: what the endpoint does
    by deadline    the shortest deadline first
    by arrival     first come, first served

Refused is whom admission sends away at once, late who was let in and is told `deadline_exceeded` in the end, and wasted
the share of the computed tokens whose call had no answer. Times are the median and the 99th percentile of calls that
had one.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from polar_ray.bench.provenance import write_results
from polar_ray.encoding.encode import EncodedTriple
from polar_ray.errors import DeadlineExceeded, Overloaded
from polar_ray.scoring import Outcome
from polar_ray.serving.admission import Admission
from polar_ray.serving.batcher import Batcher

GROUP_ROWS, GROUP_PREFIX_TOKENS, GROUP_TOKENS = 8, 600, 3000
GROUPS_OF_A_CALL = {1: 0.75, 28: 0.2, 110: 0.05}
"""Groups, and the share of the calls that have so many."""

DEADLINE_FACTORS = (1.5, 3.0, 6.0, 20.0)
"""Of a tight deadline: by what the engine alone would take, beyond `LEAST_ENGINE_CALLS`."""

LEAST_ENGINE_CALLS, DEFAULT_ENGINE_CALLS = 2, 400
"""That any deadline allows for, and that the default one does: 60 s, where an engine call takes 0.15."""

TOKEN_BUDGET = 32_768


class ByDeadline(Batcher):
    def due(self, arrived: float, tokens: int, deadline: float) -> float:
        return deadline


class ByArrival(Batcher):
    def due(self, arrived: float, tokens: int, deadline: float) -> float:
        return arrived


ORDERS: dict[str, type[Batcher]] = {"by due time": Batcher, "by deadline": ByDeadline, "by arrival": ByArrival}


@dataclass(frozen=True)
class Call:
    at: float
    groups: int
    deadline_s: float

    @property
    def tokens(self) -> int:
        return self.groups * GROUP_TOKENS


@dataclass
class Tally:
    """What became of the calls of one run."""

    answered_after: defaultdict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Seconds of each call that was answered, by its groups."""

    answered_tokens: int = 0
    computed_tokens: int = 0
    refused: int = 0
    late: int = 0

    def figures(self) -> dict[str, float]:
        calls = self.refused + self.late + sum(map(len, self.answered_after.values()))
        few, *many = sorted(GROUPS_OF_A_CALL)
        times = {"one_group": self.answered_after[few], "larger": [s for n in many for s in self.answered_after[n]]}
        quantiles = {
            f"{name}_p{percent}_s": float(np.percentile(seconds, percent)) if seconds else float("nan")
            for name, seconds in times.items()
            for percent in (50, 99)
        }
        return {
            "calls": calls,
            "refused": self.refused / calls,
            "late": self.late / calls,
            "wasted": 1 - self.answered_tokens / max(1, self.computed_tokens),
            **quantiles,
        }


def calls_of(load: float, seconds: float, tokens_per_s: float, seed: int) -> list[Call]:
    """Random calls that ask for `load` of what the engine can do."""
    random = np.random.default_rng(seed)
    mean = sum(groups * GROUP_TOKENS * share for groups, share in GROUPS_OF_A_CALL.items())
    engine_call_s = TOKEN_BUDGET / tokens_per_s
    calls, at = [], 0.0
    while (at := at + float(random.exponential(mean / (load * tokens_per_s)))) < seconds:
        groups = int(random.choice(list(GROUPS_OF_A_CALL), p=list(GROUPS_OF_A_CALL.values())))
        alone = groups * GROUP_TOKENS / tokens_per_s
        tight = LEAST_ENGINE_CALLS * engine_call_s + float(random.choice(DEADLINE_FACTORS)) * alone
        is_tight = random.random() < 0.5
        calls.append(Call(at, groups, tight if is_tight else DEFAULT_ENGINE_CALLS * engine_call_s))
    return calls


def rows_of(call: Call, number: int) -> list[EncodedTriple]:
    own = (GROUP_TOKENS - GROUP_PREFIX_TOKENS) // GROUP_ROWS
    rows = []
    for group in range(call.groups):
        ids = np.full(GROUP_PREFIX_TOKENS + own, group, dtype=np.int32)
        ids[0] = number
        rows += [EncodedTriple(ids, GROUP_PREFIX_TOKENS, GROUP_PREFIX_TOKENS)] * GROUP_ROWS
    return rows


async def run(order: type[Batcher], calls: Sequence[Call], tokens_per_s: float) -> Tally:
    """What became of the calls where this order decides who is next."""
    tally = Tally()

    def compute(rows: Sequence[EncodedTriple]) -> list[Outcome]:
        computed = len(rows) * GROUP_TOKENS // GROUP_ROWS
        time.sleep(computed / tokens_per_s)
        tally.computed_tokens += computed
        return [Outcome(0.0, GROUP_TOKENS // GROUP_ROWS)] * len(rows)

    batcher = order(compute, token_budget=TOKEN_BUDGET, batch_wait_s=0.0)
    batcher.tokens_per_s = tokens_per_s
    admission = Admission(batcher, max_queued_tokens=2**62)
    began = time.monotonic()

    async def ask(number: int, call: Call) -> None:
        rows = rows_of(call, number)
        await asyncio.sleep(began + call.at - time.monotonic())
        arrived = time.monotonic()
        deadline = arrived + call.deadline_s
        try:
            admission.check_deadline(call.tokens, "interactive", deadline)
            await batcher.run(rows, priority="interactive", deadline=deadline)
        except Overloaded:
            tally.refused += 1
        except DeadlineExceeded:
            tally.late += 1
        else:
            tally.answered_tokens += call.tokens
            tally.answered_after[call.groups].append(time.monotonic() - arrived)

    await asyncio.gather(*(ask(number, call) for number, call in enumerate(calls)))
    await batcher.close()
    return tally


def main(
    loads: Annotated[list[float] | None, typer.Option("--load", help="Of what the engine can do; 0.8 and 1.1.")] = None,
    seconds: Annotated[float, typer.Option(help="Within which calls come, of each run.")] = 40.0,
    tokens_per_second: Annotated[float, typer.Option(help="Of the engine that is slept for.")] = 1e6,
    seed: Annotated[int, typer.Option(help="Of sizes, times and deadlines.")] = 0,
    output: Annotated[Path, typer.Option(help="JSON file for the result.")] = Path("build/deadlines.json"),
) -> None:
    """Compare orders in which calls that queue for one engine can be taken."""
    loads = loads or [0.8, 1.1]
    runs = [(load, name) for load in loads for name in ORDERS]
    results = []
    for load, name in track(runs, "orders and loads"):
        calls = calls_of(load, seconds, tokens_per_second, seed)
        tally = asyncio.run(run(ORDERS[name], calls, tokens_per_second))
        results.append({"load": load, "order": name, **tally.figures()})
    columns = ["load", "order", "refused", "late", "wasted", "one group, s", "larger, s"]
    shown = Table(*columns, box=None)
    for row in results:
        shares = [f"{row[name]:.1%}" for name in ("refused", "late", "wasted")]
        times = [f"{row[f'{name}_p50_s']:.2f} / {row[f'{name}_p99_s']:.2f}" for name in ("one_group", "larger")]
        shown.add_row(f"{row['load']:g}", str(row["order"]), *shares, *times)
    Console().print(shown)
    command = (
        f"python jobs/bench/deadlines.py {' '.join(f'--load {load:g}' for load in loads)} --seconds {seconds:g} "
        f"--tokens-per-second {tokens_per_second:g} --seed {seed}"
    )
    write_results(output, command, {"results": results})


if __name__ == "__main__":
    typer.run(main)
