"""Fixtures of evaluations."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest


@pytest.fixture
def write(tmp_path):
    def write(rows, name="rows.jsonl", schema=None):
        """Rows as a file, Parquet or JSON Lines by its name."""
        path = tmp_path / name
        if path.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
        else:
            path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write
