"""Writes triples.parquet from triples.jsonl, beside it.

`person_rank` is the place a careful reader gives an output among those of its prompt, 1 the best.
"""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

FOLDER = Path(__file__).parent

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("group", pa.string(), nullable=False),
        pa.field("language", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("reference", pa.string(), nullable=False),
        pa.field("output", pa.string(), nullable=False),
        pa.field("person_rank", pa.int32(), nullable=False),
    ]
)


def main() -> None:
    """The same lines give the same bytes, as long as pyarrow's version is the same."""
    lines = (FOLDER / "triples.jsonl").read_text(encoding="utf-8").splitlines()
    table = pa.Table.from_pylist([json.loads(line) for line in lines], schema=SCHEMA)
    pq.write_table(table, FOLDER / "triples.parquet", compression="zstd")
    print(f"{table.num_rows} rows in triples.parquet")


if __name__ == "__main__":
    main()
