"""What the tests of the corpus job share: a receipt, small corpora, and the road from inputs to a manifest."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from polar_ray.columns import detect_message_json
from polar_ray.config import ColumnsConfig
from polar_ray.corpus.inputs import examine, list_inputs
from polar_ray.corpus.manifest import Manifest, make_manifest
from polar_ray.corpus.units import read_sample
from polar_ray.receipts import Receipt

PlanJob = Callable[..., Manifest]


def make_table(rows: int, first: int = 0, **others: Any) -> pa.Table:
    """`rows` triples, numbered from `first`, and other columns."""
    numbers = range(first, first + rows)
    texts = {name: [f"{name} {number}" for number in numbers] for name in ("prompt", "reference", "output")}
    return pa.table({**texts, "id": list(numbers), **others})


def write_corpus(path: Path, table: pa.Table | None = None, **options: Any) -> Path:
    """A Parquet file, and the folders it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(make_table(3) if table is None else table, path, **options)
    return path


def write_lines(path: Path, *lines: str | bytes, end: bytes = b"\n") -> Path:
    """A JSONL file of `lines`, each followed by `end`."""
    path.write_bytes(b"".join((line.encode() if isinstance(line, str) else line) + end for line in lines))
    return path


@pytest.fixture
def receipt() -> Receipt:
    return Receipt(
        weights_digest="a" * 64,
        tokenizer_digest="b" * 64,
        encoding_version=1,
        max_tokens=16384,
        max_response_tokens=4096,
        cut_side="right",
        on_too_long="cut",
        on_empty="error",
        rope_base="hf",
        dtype="float32",
        device="cpu",
        engine="fake",
        engine_version="polar_ray 0",
    )


@pytest.fixture
def plan_job(receipt: Receipt) -> PlanJob:
    """The manifest that a job over some inputs would have."""

    def plan(*inputs: Path | str, unit_rows: int = 4096, columns: ColumnsConfig | None = None) -> Manifest:
        columns = columns or ColumnsConfig()
        files = list_inputs([str(given) for given in inputs])
        contents = examine(files, columns, unit_rows)
        message_json = detect_message_json(read_sample(files, contents, columns), columns)
        return make_manifest(files, contents, receipt, columns, message_json)

    return plan
