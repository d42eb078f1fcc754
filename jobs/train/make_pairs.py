"""Makes the preference pairs that the small checkpoint is trained on, one curriculum stage a call.

Groups of graded outputs, some synthetic (synthetic.py), some from public data (sources.py), become pairs: the better
output of two is `chosen`. The same arguments, data and library versions give the same bytes.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Annotated

import pyarrow as pa
import pyarrow.parquet as pq
import typer
from sources import Sources, Wrapper
from synthetic import KINDS, Graded, solution


@dataclass(frozen=True, slots=True)
class Stage:
    """What a stage of the curriculum draws from, by weight."""

    sources: Mapping[str, float]
    """`synthetic`, `qa` (solutions of GSM8K, spoilt), `gsm8k`, `chinese`, `mixed`, `alike`, `same-policy`."""

    kinds: Mapping[str, float]
    """Of the synthetic groups; names of synthetic.py."""


STAGES = {
    "copy": Stage(
        sources={"synthetic": 1.0},
        kinds={"tiny": 1.0},
    ),
    "answers": Stage(
        sources={"synthetic": 0.5, "qa": 0.2, "gsm8k": 0.3},
        kinds={"tiny": 0.1, "final_answer": 0.55, "fact": 0.1, "count": 0.05, "listing": 0.05, "similar": 0.15},
    ),
    "likeness": Stage(
        sources={"synthetic": 0.25, "qa": 0.04, "gsm8k": 0.05, "chinese": 0.08, "mixed": 0.13, "alike": 0.45},
        kinds={"final_answer": 0.15, "fact": 0.15, "count": 0.1, "listing": 0.15, "similar": 0.2, "overlap": 0.25},
    ),
    "everything": Stage(
        sources={
            "synthetic": 0.22,
            "qa": 0.06,
            "gsm8k": 0.06,
            "chinese": 0.08,
            "mixed": 0.05,
            "alike": 0.2,
            "same-policy": 0.33,
        },
        kinds={"tiny": 0.05, "final_answer": 0.2, "fact": 0.25, "count": 0.15, "listing": 0.2, "similar": 0.15},
    ),
}
"""The curriculum. A small model that starts with real pairs learns lengths and topics; one that can compare tokens
already learns from the same pairs what they have in common with the reference."""

HELD_OUT = "held-out"

OF_POLICIES = ("mixed", "alike", "same-policy")
"""Sources that compare any models' answers to a prompt, as pre-training does, and are wrapped as it wraps them."""

MOST_PAIRS_OF_A_GROUP = 12
"""Groups of many outputs would otherwise count most: pairs grow with the square of them."""

LONGEST_TEXT = 3000
"""Characters. A group with a longer text costs what a dozen others cost."""

PRETRAIN_SHARE = 0.15
"""Of synthetic groups, wrapped as pre-training wraps them, so that the wrapper does not give the task away."""

ROWS_OF_A_ROW_GROUP = 4096

SCHEMA = pa.schema(
    [
        *(pa.field(name, pa.string(), nullable=False) for name in ("prompt", "reference", "chosen", "rejected")),
        pa.field("wrapper", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("group", pa.int32(), nullable=False),
    ]
)

Row = tuple[str, str, str, str, str, str, int]


@dataclass(frozen=True, slots=True)
class Group:
    """Outputs to one prompt and reference, graded."""

    prompt: str
    reference: str
    outputs: Sequence[Graded]
    source: str
    wrapper: Wrapper


def draw_group(rng: Random, stage: Stage, sources: Sources) -> Group:
    """A group of a source, and of a kind, by their weights."""
    source = _pick(rng, stage.sources)
    wrapper: Wrapper = "sft"
    if source == "synthetic":
        source = _pick(rng, stage.kinds)
        drawn = KINDS[source](rng, sources.piece)
        wrapper = "pretrain" if rng.random() < PRETRAIN_SHARE else "sft"
    elif source == "qa":
        drawn = solution(rng, sources.piece, sources.questions)
    else:
        drawn = sources.draw(rng, source)
        wrapper = "pretrain" if source in OF_POLICIES else "sft"
    return Group(*drawn, source, wrapper)


def pairs_of(rng: Random, group: Group) -> list[tuple[str, str]]:
    """(chosen, rejected) of outputs whose grades differ, in any order; none of a group with a text too long or empty.

    A text that the group has under two grades is left out: whatever it is paired with, one of its grades is wrong.
    """
    grades: dict[str, set[float]] = {}
    for text, grade in group.outputs:
        if text.strip():
            grades.setdefault(text, set()).add(grade)
    if not _fits(group.prompt, group.reference, *grades):
        return []
    outputs = [(text, found.pop()) for text, found in grades.items() if len(found) == 1]
    pairs = [(better, worse) for better, high in outputs for worse, low in outputs if high > low]
    return rng.sample(pairs, min(MOST_PAIRS_OF_A_GROUP, len(pairs)))


def training_rows(rng: Random, stage: Stage, sources: Sources, groups: int) -> Iterator[Row]:
    """Rows of that many groups; a group that gives no pair does not count."""
    number = 0
    while number < groups:
        group = draw_group(rng, stage, sources)
        pairs = pairs_of(rng, group)
        for chosen, rejected in pairs:
            yield group.prompt, group.reference, chosen, rejected, group.wrapper, group.source, number
        number += bool(pairs)


def held_out_rows(sources: Sources) -> Iterator[Row]:
    """Rows of the held-out pairs, whatever their length; a group is a question or prompt."""
    numbers: dict[str, int] = {}
    for pair in sources.held_out_pairs():
        texts = (pair.prompt, pair.reference, pair.chosen, pair.rejected)
        if all(text and text.strip() for text in texts) and pair.chosen != pair.rejected:
            yield *texts, pair.wrapper, pair.source, numbers.setdefault(pair.question, len(numbers))


def write_pairs(rows: Sequence[Row], output: Path, provenance: Mapping[str, object]) -> None:
    """One Parquet file, which says in its schema where the texts come from."""
    columns = zip(*rows, strict=True)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
    metadata = {"provenance": json.dumps(provenance, ensure_ascii=False)}
    output.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_arrays(arrays, schema=SCHEMA.with_metadata(metadata))
    pq.write_table(table, output, compression="zstd", row_group_size=ROWS_OF_A_ROW_GROUP)


def _pick(rng: Random, weights: Mapping[str, float]) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]


def _fits(*texts: str) -> bool:
    return all(text.strip() and len(text) <= LONGEST_TEXT for text in texts)


def main(
    data: Annotated[Path, typer.Option(help="Folder of the public data.", exists=True, file_okay=False)],
    stage: Annotated[str, typer.Option(help=f"{', '.join(STAGES)}; or {HELD_OUT}, for pairs to evaluate on.")],
    output: Annotated[Path, typer.Option(help="Parquet file to write.", dir_okay=False)],
    groups: Annotated[
        int, typer.Option(help="Groups to draw, each of up to 12 pairs. Not for held-out.", min=1)
    ] = 12_000,
    seed: Annotated[int, typer.Option(help="Seed of all that is drawn.")] = 0,
) -> None:
    """Write the pairs of one stage."""
    if stage not in (*STAGES, HELD_OUT):
        raise typer.BadParameter(f"{stage}: expected {', '.join(STAGES)} or {HELD_OUT}", param_hint="--stage")
    started = time.perf_counter()
    sources = Sources(data)
    command = f"python jobs/train/make_pairs.py --stage {stage}"
    if stage == HELD_OUT:
        rows = list(held_out_rows(sources))
    else:
        rows = list(training_rows(Random(seed), STAGES[stage], sources, groups))
        command += f" --groups {groups} --seed {seed}"
    files = dict(sorted(sources.provenance.items()))
    write_pairs(rows, output, {"command": command, "sources": files, "synthetic": "made up; Apache-2.0"})
    for source, count in sorted(Counter(row[5] for row in rows).items()):
        print(f"{count:>9,}  {source}")
    size = output.stat().st_size / 1e6
    print(f"{len(rows):>9,}  pairs of {len({row[6] for row in rows}):,} groups in {output}, {size:.1f} MB, ", end="")
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    typer.run(main)
