"""`polar-ray rank`: the outputs of each prompt in order of their rewards, beside a person's order if there is one."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from polar_ray.config import ColumnsConfig, validate
from polar_ray.errors import InputError, SchemaError, TripleError
from polar_ray.triples import STATUS_OK, join_text, parse_text

if TYPE_CHECKING:
    import pyarrow as pa

PERSON_COLUMN = "person_rank"
"""Shown without being asked for, where there is one."""

NO_STATUS = "no reward"
"""Status of a row without a reward in a file that has no column of statuses."""

BATCH_ROWS = 4096
BAR_CELLS = 10
EIGHTHS = " ▏▎▍▌▋▊▉█"

SHOWN_CHARACTERS = 1000
"""Of a text on the terminal, which is at most some hundreds wide."""


@dataclass(frozen=True, slots=True)
class Row:
    """One output with its reward, or with the status that says why it has none."""

    output: str
    reward: float | None
    status: str
    person: float | None


@dataclass(slots=True)
class Group:
    """The outputs to one prompt and reference."""

    prompt: str
    reference: str
    is_shown: bool = True
    """Of a group that is not shown no texts are kept, and rows only if a person ranked them."""

    rows: list[Row] = field(default_factory=list)

    def ranked(self) -> list[tuple[int | None, Row]]:
        """(rank, row), best first; equal rewards have equal ranks, and rows without a reward come last with none."""
        rewards = sorted((row.reward for row in self.rows if row.reward is not None), reverse=True)
        places = {reward: len(rewards) - index for index, reward in enumerate(reversed(rewards))}
        ranks = [None if row.reward is None else places[row.reward] for row in self.rows]
        return sorted(zip(ranks, self.rows, strict=True), key=lambda pair: (pair[0] is None, pair[0] or 0))

    def spearman(self) -> float | None:
        """Correlation of the order by reward with the person's, over the rows that have both."""
        pairs = [(-row.reward, row.person) for row in self.rows if row.reward is not None and row.person is not None]
        return spearman([reward for reward, _ in pairs], [person for _, person in pairs])


def rank(
    scored: Annotated[str, typer.Argument(help="Scored Parquet: the folder of a job, a file, a glob or a URL.")],
    top: Annotated[int | None, typer.Option(min=1, help="Outputs to show of each prompt. Left out: all.")] = None,
    max_groups: Annotated[int, typer.Option(min=0, help="Prompts to show; 0 for all.")] = 20,
    rank_column: Annotated[
        str | None, typer.Option(help="Column of a person's ranks, 1 the best. Left out: person_rank, if there is one.")
    ] = None,
    prompt_column: Annotated[str, typer.Option(help="Column that holds the prompt.")] = "prompt",
    reference_column: Annotated[str, typer.Option(help="Column that holds the reference.")] = "reference",
    output_column: Annotated[str, typer.Option(help="Column that holds the output.")] = "output",
    reward_column: Annotated[str, typer.Option(help="Column that holds the reward.")] = "reward",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each prompt.")] = False,
) -> None:
    """Show the outputs of each prompt in order of their rewards.

    A bar is a reward's place between the lowest and the highest of its
    prompt: rewards of different prompts are not compared. With a person's
    ranks it also says how far the two orders agree, as Spearman's correlation
    from -1 (reversed) to 1 (the same).

    [dim]polar-ray rank scored --top 3[/]
    [dim]polar-ray rank scored --rank-column person_rank --max-groups 5[/]
    """
    names = {"prompt": prompt_column, "reference": reference_column, "output": output_column, "reward": reward_column}
    columns = validate(ColumnsConfig, names, source="polar-ray rank")
    groups, has_persons = read_groups(scored, columns, rank_column, max_groups or None)
    if not groups:
        raise InputError(f"{scored}: no rows; there is nothing to rank")
    console = Console(highlight=False)
    for group in groups[: max_groups or None]:
        if as_json:
            typer.echo(json.dumps(_as_dict(group, top, has_persons), ensure_ascii=False))
        else:
            _print_group(console, group, top, has_persons)
            console.print()
    notes = Console(highlight=False, stderr=as_json)
    if has_persons:
        notes.print(_agreement(groups))
    if 0 < max_groups < len(groups):
        left_out = f"{len(groups) - max_groups:,} of {len(groups):,} prompts are not shown; --max-groups 0 shows all"
        notes.print(left_out, style="dim")


def read_groups(
    scored: str, columns: ColumnsConfig, rank_column: str | None = None, max_groups: int | None = None
) -> tuple[list[Group], bool]:
    """The groups of `scored` in order of appearance, and whether they have a person's ranks.

    All rows are read, as rows of a group may lie anywhere, but texts are kept of the first `max_groups` groups only.
    Raises `InputError` or `SchemaError`.
    """
    from polar_ray.columns import detect_message_json, read_column

    groups: dict[bytes, Group] = {}
    has_persons = False
    message_json: frozenset[str] | None = None
    person_column = rank_column or PERSON_COLUMN
    for table in _read(scored, columns, rank_column):
        if message_json is None:
            message_json = detect_message_json(table, columns)
        has_persons = has_persons or person_column in table.column_names
        texts = [
            [_to_text(value, name in message_json) for value in read_column(table, column, table.num_rows)]
            for name, column in columns.fields.items()
        ]
        others = [
            table.column(name).to_pylist() if name in table.column_names else [None] * table.num_rows
            for name in (columns.reward, columns.written[1], person_column)
        ]
        for prompt, reference, output, reward, status, person in zip(*texts, *others, strict=True):
            key = hashlib.blake2b(f"{len(prompt)} {prompt}{reference}".encode(), digest_size=16).digest()
            if key not in groups:
                is_shown = max_groups is None or len(groups) < max_groups
                groups[key] = Group(prompt, reference) if is_shown else Group("", "", is_shown=False)
            group = groups[key]
            if group.is_shown or person is not None:
                group.rows.append(_to_row(output if group.is_shown else "", reward, status, person))
    return list(groups.values()), has_persons


def spearman(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Spearman's rank correlation; None where either has no order."""
    import numpy as np

    from polar_ray.evaluation.measures import rank_correlation

    if len(set(one)) < 2 or len(set(other)) < 2:
        return None
    return rank_correlation(np.asarray(one, np.float64), np.asarray(other, np.float64))


def _read(scored: str, columns: ColumnsConfig, rank_column: str | None) -> Iterator[pa.Table]:
    """The rows of every Parquet file, batch by batch, only the columns that are shown."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from polar_ray.corpus.inputs import list_inputs
    from polar_ray.corpus.storage import Location

    files = [file for file in list_inputs([scored]) if file.format == "parquet"]
    if not files:
        raise InputError(f"{scored}: not Parquet; give what `polar-ray score` wrote")
    for file in files:
        location = Location(file.url)
        try:
            with location.filesystem.open_input_file(location.path) as stream:
                parquet = pq.ParquetFile(stream)
                names = _columns_to_read(parquet.schema_arrow, columns, rank_column, file.url)
                for batch in parquet.iter_batches(BATCH_ROWS, columns=names):
                    yield pa.Table.from_batches([batch])
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{file.url}: not a readable Parquet file ({error})") from None


def _columns_to_read(schema: pa.Schema, columns: ColumnsConfig, rank_column: str | None, source: str) -> list[str]:
    from polar_ray.columns import require_column

    needed = {**columns.fields, "reward": columns.reward, **({"rank": rank_column} if rank_column else {})}
    for what, column in needed.items():
        require_column(schema.names, column, what, source)
    optional = [name for name in (columns.written[1], PERSON_COLUMN) if name in schema.names]
    for column in (columns.reward, rank_column or PERSON_COLUMN):
        if column in schema.names and not _is_number(schema.field(column).type):
            raise SchemaError(f"{source}: column {column!r} is {schema.field(column).type}; it must hold numbers")
    return list(dict.fromkeys([*needed.values(), *optional]))


def _is_number(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind))


def _to_text(value: object, is_json: bool) -> str:
    """A field's text, messages joined; of a value that is no field, something that can be shown."""
    try:
        content = json.loads(value) if is_json and isinstance(value, str) else value
        return join_text(parse_text(content, "text"), "text")
    except (TripleError, ValueError):
        return "" if value is None else str(value)


def _to_row(output: str, reward: float | None, status: str | None, person: float | None) -> Row:
    is_rewarded = reward is not None and math.isfinite(reward)
    if not is_rewarded and status in (None, STATUS_OK):
        status = NO_STATUS
    is_ranked = person is not None and math.isfinite(person)
    return Row(output, reward if is_rewarded else None, status or STATUS_OK, person if is_ranked else None)


def _as_dict(group: Group, top: int | None, has_persons: bool) -> dict[str, Any]:
    agreement = {"spearman": group.spearman()} if has_persons else {}
    rows = [
        {"rank": place, "reward": row.reward, "status": row.status, "output": row.output}
        | ({PERSON_COLUMN: row.person} if has_persons else {})
        for place, row in group.ranked()[:top]
    ]
    return {"prompt": group.prompt, "reference": group.reference, **agreement, "rows": rows}


def _print_group(console: Console, group: Group, top: int | None, has_persons: bool) -> None:
    prompt = Text(_one_line(group.prompt), "bold")
    reference = Text.assemble(("reference ", "dim"), _one_line(group.reference))
    for heading in (prompt, reference):
        console.print(heading, no_wrap=True, overflow="ellipsis")
    ranked = group.ranked()
    console.print(_table(ranked, top, has_persons))
    if top is not None and len(ranked) > top:
        console.print(f"{len(ranked) - top:,} more not shown", style="dim")
    if has_persons:
        correlation = group.spearman()
        console.print(f"Spearman {'–' if correlation is None else f'{correlation:z.3f}'}", style="dim")


def _table(ranked: Sequence[tuple[int | None, Row]], top: int | None, has_persons: bool) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", expand=True)
    table.add_column("rank", justify="right")
    table.add_column("", width=BAR_CELLS, style="cyan")
    table.add_column("reward", justify="right")
    if has_persons:
        table.add_column("person", justify="right")
    table.add_column("output", ratio=1, no_wrap=True, overflow="ellipsis")
    rewards = [row.reward for _, row in ranked if row.reward is not None]
    for place, row in ranked[:top]:
        person = ["–" if row.person is None else f"{row.person:g}"] if has_persons else []
        if row.reward is None:
            output = Text.assemble((row.status, "red"), " ", (_one_line(row.output), "dim"))
            table.add_row("–", "", "–", *person, output)
        else:
            bar = _bar(row.reward, rewards[-1], rewards[0])
            table.add_row(str(place), bar, f"{row.reward:z.3f}", *person, Text(_one_line(row.output)))
    return table


def _agreement(groups: Iterable[Group]) -> str:
    """The mean over all prompts, shown or not."""
    correlations = [value for group in groups if (value := group.spearman()) is not None]
    if not correlations:
        return "mean Spearman –: no prompt has two different rewards with different ranks"
    return f"mean Spearman {math.fsum(correlations) / len(correlations):z.3f} over {len(correlations):,} prompts"


def _bar(reward: float, lowest: float, highest: float) -> str:
    """The reward's place from lowest (a sliver) to highest (all cells), in eighths of a cell."""
    share = (reward - lowest) / (highest - lowest) if highest > lowest else 1.0
    eighths = max(1, round(share * BAR_CELLS * 8))
    return EIGHTHS[8] * (eighths // 8) + (EIGHTHS[eighths % 8] if eighths % 8 else "")


def _one_line(text: str) -> str:
    """The text on one line; what would steer the terminal, or turn its writing round, is replaced."""
    words = " ".join(text[:SHOWN_CHARACTERS].split())
    return "".join(character if character.isprintable() else "\ufffd" for character in words)
