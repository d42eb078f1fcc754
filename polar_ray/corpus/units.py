"""Reading one unit's rows and writing its file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from polar_ray.columns import (
    DETECTION_ROWS,
    FieldColumns,
    detect_message_json,
    parse_rows,
    read_fields,
    reward_columns,
)
from polar_ray.config import ColumnsConfig
from polar_ray.corpus import jsonl
from polar_ray.corpus.inputs import Contents, InputFile, Slice, examine, list_inputs
from polar_ray.corpus.manifest import Manifest, ManifestFile
from polar_ray.corpus.storage import Location
from polar_ray.corpus.summary import UnitReport
from polar_ray.errors import InputError, JobError, OutputError, TripleError
from polar_ray.triples import Scored, Triple

RECEIPT_KEY = b"polar_ray.receipt"
RECEIPT_ID_KEY = b"polar_ray.receipt_id"
JOB_ID_KEY = b"polar_ray.job_id"
REPORT_KEY = b"polar_ray.report"
"""Schema metadata of every output file."""

READ_ROWS = 8192
"""Rows decoded at a time where a unit is a part of a large row group."""


def read_unit(manifest: Manifest, index: int) -> tuple[pa.Table, list[Triple | TripleError]]:
    """A unit's rows: the table to pass through, and a triple or an error for each row.

    Raises `InputError` if the file is gone or no longer what it was when the manifest was made.
    """
    unit = manifest.units[index]
    file, where = manifest.files[unit.file], manifest.describe(index)
    table, rows = read_unchanged(file, unit.slice, manifest.columns, where=where, reader="job")
    return table, parse_rows(rows, frozenset(manifest.message_json))


def read_unchanged(
    file: ManifestFile, part: Slice, columns: FieldColumns, *, where: str, reader: str
) -> tuple[pa.Table, list[jsonl.Row]]:
    """The rows of a slice, and the fields of each.

    Raises `InputError`, saying `where` and under which `reader` it happened, if the file is gone or no longer what it
    was when the manifest was made.
    """
    location = Location(file.url)
    with _reading(where):
        info = location.patiently(location.info)
        if info.is_file and (info.size, info.mtime_ns or 0) != (file.size, file.modified_ns):
            raise InputError(f"{where}: the file changed under the {reader}")
        table, rows = location.patiently(lambda: _read_slice(location, file.schema_of_rows, part, columns))
    if table.num_rows != part.rows:
        raise InputError(f"{where}: {table.num_rows} rows instead of {part.rows}; the file changed under the {reader}")
    return table, rows


def read_sample(files: Sequence[InputFile], contents: Sequence[Contents], columns: FieldColumns) -> pa.Table:
    """The first rows of the input, fields only."""
    file, found = next((file, found) for file, found in zip(files, contents, strict=True) if found.slices)
    names = list(columns.fields.values())
    location = Location(file.url)
    with _reading(file.url):
        if found.schema is not None:
            return _sample_jsonl(location, found, names)
        with location.filesystem.open_input_file(location.path) as stream:
            parquet = pq.ParquetFile(stream)
            return pa.Table.from_batches([next(parquet.iter_batches(DETECTION_ROWS, columns=names))])


def read_row(given: str, row: int, columns: ColumnsConfig) -> Triple | TripleError:
    """One row of one input file, as a job would read it. Raises `InputError` if there is no such row."""
    files = list_inputs([given])
    if len(files) != 1:
        raise InputError(f"{given}: stands for {len(files)} files; name the one that the row is in")
    file = files[0]
    (contents,) = examine([file], columns, READ_ROWS, will_write=False)
    part = next((part for part in contents.slices if part.start <= row < part.stop), None)
    if part is None:
        raise InputError(f"{given}: has rows 0 to {contents.slices[-1].stop - 1}; there is no row {row}")
    fields = detect_message_json(read_sample([file], [contents], columns), columns)
    with _reading(given):
        _, rows = _read_slice(Location(file.url), contents.schema, part, columns)
    return parse_rows(rows, fields)[row - part.start]


def write_unit(
    output: Location, manifest: Manifest, index: int, table: pa.Table, scored: list[Scored], report: UnitReport
) -> None:
    """Commit a unit: its input columns untouched, the reward columns, and the receipt, in one atomic step.

    Raises `OutputError` when the storage refuses; then there is no file.
    """
    for name, column in reward_columns(scored, manifest.columns):
        table = table.append_column(name, column)
    metadata = {
        **(table.schema.metadata or {}),
        RECEIPT_KEY: manifest.receipt.model_dump_json().encode(),
        RECEIPT_ID_KEY: manifest.receipt.receipt_id.encode(),
        JOB_ID_KEY: manifest.job_id.encode(),
        REPORT_KEY: report.model_dump_json().encode(),
    }
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata(metadata), sink, compression="zstd")
    output.join(*manifest.part(index).split("/")).commit(sink.getvalue())


def read_report(output: Location, manifest: Manifest, index: int) -> UnitReport | None:
    """The report in a unit's file; None while there is no such file.

    Raises `OutputError` for a file of that name that this job did not write.
    """
    place = output.join(*manifest.part(index).split("/"))

    def read_metadata() -> dict[bytes, bytes] | None:
        if not place.exists():
            return None
        with place.filesystem.open_input_file(place.path) as stream:
            return pq.read_schema(stream).metadata or {}

    try:
        metadata = place.patiently(read_metadata)
    except (OSError, pa.ArrowException) as error:
        raise OutputError(f"{place.url}: cannot be read ({error}); remove it and run the same command again") from None
    if metadata is None:
        return None
    if metadata.get(JOB_ID_KEY) != manifest.job_id.encode():
        raise OutputError(f"{place.url}: was not written by this job; remove it and run the same command again")
    return UnitReport.model_validate_json(metadata[REPORT_KEY])


def read_written_report(output: Location, manifest: Manifest, index: int) -> UnitReport:
    """As `read_report`, of a unit that is done. Raises `JobError` if its file is gone."""
    report = read_report(output, manifest, index)
    if report is None:
        raise JobError(f"{manifest.describe(index)}: its file vanished; run the same command again")
    return report


@contextmanager
def _reading(what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{what}: cannot be read ({error})") from None


def _sample_jsonl(location: Location, found: Contents, names: Sequence[str]) -> pa.Table:
    """Strings only: a value that is none, where others are, is no JSON text, and stands as an empty string."""
    rows: list[jsonl.Row] = []
    for part in found.slices:
        rows += jsonl.read_block(location, part.offset, part.end, found.schema)[1]
        if len(rows) >= DETECTION_ROWS:
            break
    objects = [{} if isinstance(row, TripleError) else row for row in rows[:DETECTION_ROWS]]
    return pa.table({name: pa.array([_text_or_empty(row.get(name)) for row in objects], pa.string()) for name in names})


def _text_or_empty(value: object) -> str | None:
    return jsonl.as_text(value) if value is None or isinstance(value, str) else ""


def _read_slice(
    location: Location, schema: pa.Schema | None, part: Slice, columns: FieldColumns
) -> tuple[pa.Table, list[jsonl.Row]]:
    """The rows of a slice, of a JSONL file if it has a `schema` and else of a Parquet file; and the fields of each."""
    if schema is None:
        table = _read_parquet(location, part)
        return table, [*read_fields(table, columns)]
    table, rows = jsonl.read_block(location, part.offset, part.end, schema)
    return table, [_fields_of(row, columns) for row in rows]


def _read_parquet(location: Location, part: Slice) -> pa.Table:
    with location.filesystem.open_input_file(location.path) as stream:
        parquet = pq.ParquetFile(stream)
        groups, first_row = _groups_of(parquet, part)
        if sum(parquet.metadata.row_group(group).num_rows for group in groups) <= 2 * part.rows:
            return parquet.read_row_groups(groups).slice(part.start - first_row, part.rows)
        batches, row = [], first_row
        for batch in parquet.iter_batches(READ_ROWS, row_groups=groups):
            start, stop = max(part.start - row, 0), min(part.stop - row, batch.num_rows)
            if stop > start:
                batches.append(batch.slice(start, stop - start))
            row += batch.num_rows
            if row >= part.stop:
                break
        return pa.Table.from_batches(batches, parquet.schema_arrow)


def _groups_of(parquet: pq.ParquetFile, part: Slice) -> tuple[list[int], int]:
    """The row groups that hold the slice's rows, and the first row of the first of them."""
    groups: list[int] = []
    first_row = row = 0
    for group in range(parquet.metadata.num_row_groups):
        stop = row + parquet.metadata.row_group(group).num_rows
        if stop > part.start and row < part.stop:
            first_row = first_row if groups else row
            groups.append(group)
        row = stop
    return groups, first_row


def _fields_of(row: jsonl.Row, columns: FieldColumns) -> jsonl.Row:
    """A JSONL object's fields and wrapper, under their own names."""
    if isinstance(row, TripleError):
        return row
    named = {**columns.fields, "wrapper": columns.wrapper}
    return {field: row.get(column) for field, column in named.items()}
