"""A synthetic corpus of any size, for scale and fault tests: skewed lengths and group sizes, and some rows at fault.

    python jobs/make_corpus.py --rows 2000000 --output build/corpus

Texts are runs of words and mean nothing. The same settings make the same files, byte for byte, whatever their number.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import typer

GROUP_SIZES = (1, 4, 8, 16, 64)
GROUP_SHARES = (0.25, 0.2, 0.35, 0.15, 0.05)
"""Of groups: single rows as in chat logs, and what GRPO runs and best-of-n samplers leave. 10.3 rows on average."""

WORDS = {"prompt": 18, "reference": 24, "output": 24}
"""Median number of words of each field."""

LENGTH_SIGMA = 0.7
"""Of the logarithm of a length: one text in a hundred is five times as long as the median."""

LONG_WORDS = 12_000
"""Of an output at fault for its length; beyond `limits.max_response_tokens` = 4096 by any tokenizer."""

FAULTS = ("null", "empty", "spoof", "long")
"""What is wrong with a row: its output is missing, empty, holds a control token, or is too long.

The first two get no reward. A control token is removed and a long output is cut, and both are counted.
"""

POOL_WORDS = 400_000
SYLLABLES = ("ka", "lo", "mi", "ten", "ra", "so", "ber", "in", "du", "vel", "an", "pos")

Lengths = np.ndarray[tuple[int], np.dtype[np.int64]]

SCHEMA = pa.schema(
    {
        "row": pa.int64(),
        "group": pa.int64(),
        "prompt": pa.string(),
        "reference": pa.string(),
        "output": pa.string(),
        "fault": pa.string(),
    }
)


class WordPool:
    """A long text of random words, from which texts are cut: no text is put together word by word."""

    def __init__(self, generator: np.random.Generator) -> None:
        syllables = generator.integers(len(SYLLABLES), size=(POOL_WORDS, 3))
        counts = generator.integers(1, 4, size=POOL_WORDS)
        words = ["".join(SYLLABLES[s] for s in row[:n]) for row, n in zip(syllables.tolist(), counts, strict=True)]
        self._text = " ".join(words)
        self._starts = np.concatenate([[0], np.cumsum([len(word) + 1 for word in words])])

    def texts(self, words: Lengths, generator: np.random.Generator) -> list[str]:
        """Texts of so many words each."""
        first = generator.integers(POOL_WORDS - words.max(initial=0), size=len(words))
        begins, ends = self._starts[first], self._starts[first + words] - 1
        return [self._text[begin:end] for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)]


@dataclass(frozen=True)
class Corpus:
    """What a synthetic corpus is like."""

    rows: int
    seed: int = 0
    fault_share: float = 0.001
    length: float = 1.0
    """Factor of all lengths."""

    file_rows: int = 250_000

    def write(self, output: Path) -> Counter[str]:
        """Write Parquet files below `output`; gives how many rows have which fault ("" for none).

        Columns are `SCHEMA`'s; groups are whole but for the last of a file. Files are independent of each other: the
        first ones of a larger corpus are those of a smaller one. Raises `FileExistsError` if `output` is there.
        """
        output.mkdir(parents=True)
        pool = WordPool(np.random.default_rng(self.seed))
        faults: Counter[str] = Counter()
        for number, start in enumerate(range(0, self.rows, self.file_rows)):
            generator = np.random.default_rng([self.seed, number])
            table = self._table(pool, generator, start, min(self.file_rows, self.rows - start))
            pq.write_table(table, output / f"{number:05d}.parquet", compression="zstd", row_group_size=16_384)
            faults.update(table["fault"].to_pylist())
        return faults

    def _table(self, pool: WordPool, generator: np.random.Generator, start: int, rows: int) -> pa.Table:
        sizes = np.array(list(_group_sizes(generator, rows)))
        group = np.repeat(np.arange(len(sizes)), sizes)
        prompts = pool.texts(self._lengths("prompt", len(sizes), generator), generator)
        references = pool.texts(self._lengths("reference", len(sizes), generator), generator)
        outputs = pool.texts(self._lengths("output", rows, generator), generator)
        faults = [""] * rows
        texts: list[str | None] = [f"{text} {start + row}" for row, text in enumerate(outputs)]
        for row in np.flatnonzero(generator.random(rows) < self.fault_share).tolist():
            faults[row] = FAULTS[generator.integers(len(FAULTS))]
            texts[row] = {
                "null": None,
                "empty": "",
                "spoof": f"{texts[row]} <|reward|> 10",
                "long": pool.texts(np.array([LONG_WORDS]), generator)[0],
            }[faults[row]]
        columns = {
            "row": np.arange(start, start + rows),
            "group": start + np.repeat(np.cumsum(sizes) - sizes, sizes),
            "prompt": pa.array(prompts).take(pa.array(group)),
            "reference": pa.array(references).take(pa.array(group)),
            "output": texts,
            "fault": faults,
        }
        return pa.table(columns, schema=SCHEMA)

    def _lengths(self, field: str, count: int, generator: np.random.Generator) -> Lengths:
        words = generator.lognormal(np.log(self.length * WORDS[field]), LENGTH_SIGMA, size=count)
        return np.clip(words.round(), 1, 40 * WORDS[field]).astype(np.int64)


def _group_sizes(generator: np.random.Generator, rows: int) -> Iterator[int]:
    left = rows
    while left:
        size = min(left, int(generator.choice(GROUP_SIZES, p=GROUP_SHARES)))
        left -= size
        yield size


def main(
    rows: Annotated[int, typer.Option(min=1, help="Rows in all.")] = 100_000,
    output: Annotated[Path, typer.Option(help="Folder to make; it must not be there.")] = Path("build/corpus"),
    seed: Annotated[int, typer.Option(help="Another seed, another corpus.")] = 0,
    fault_share: Annotated[float, typer.Option(min=0, max=1, help="Share of rows at fault.")] = 0.001,
    length: Annotated[float, typer.Option(min=0.05, help="Factor of all lengths.")] = 1.0,
    file_rows: Annotated[int, typer.Option(min=1, help="Rows of a file.")] = 250_000,
) -> None:
    """Make a synthetic corpus of triples, with known faults; print how many rows have which, as JSON."""
    if output.exists():
        raise typer.BadParameter(f"{output} is there already; remove it or name another folder", param_hint="--output")
    faults = Corpus(rows, seed, fault_share, length, file_rows).write(output)
    typer.echo(json.dumps({"rows": rows, "faults": {fault: faults[fault] for fault in FAULTS}}))


if __name__ == "__main__":
    typer.run(main)
