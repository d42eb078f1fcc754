"""Which files a job reads, checked before anything expensive starts."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from polar_ray.columns import FieldColumns, check_room, check_schema
from polar_ray.config import ColumnsConfig
from polar_ray.corpus import jsonl
from polar_ray.corpus.storage import Location
from polar_ray.errors import InputError, OutputError

Format = Literal["parquet", "jsonl"]

FORMATS: dict[str, Format] = {".parquet": "parquet", ".pq": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl"}

HIVE_PART = re.compile(r"[^=/._][^=/]*=[^/]*")

LISTING_THREADS = 16
"""Footers are small reads: on an object store the wait, not the work, is what takes time."""


@dataclass(frozen=True)
class InputFile:
    """One file of the input: where it is, what tells it from a changed one, and its hive folders, if any."""

    url: str
    format: Format
    size: int
    modified_ns: int
    partition: str = ""
    """`key=value/...`, mirrored in the output so that its readers find the same partition columns."""


@dataclass(frozen=True)
class Slice:
    """A run of consecutive rows of one input file: what a unit reads.

    `offset` and `end` are byte positions in a JSONL file; a Parquet file is addressed by rows alone.
    """

    start: int
    stop: int
    offset: int = 0
    end: int = 0
    size: int = 0
    """Bytes of the rows' fields before compression, of JSONL all of their lines: what there is to go by in comparing
    slices that nobody has read. A dictionary in Parquet holds equal texts once, as sharing computes them once."""

    @property
    def rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Contents:
    """What is in a file: its slices, and for JSONL the schema that the rows of all JSONL files fit."""

    slices: tuple[Slice, ...]
    schema: pa.Schema | None = None


def input_names(inputs: str | Path | Sequence[str | Path]) -> list[str]:
    """Inputs as people give them to Python, one or several, as text."""
    return [str(given) for given in ([inputs] if isinstance(inputs, (str, Path)) else inputs)]


def list_inputs(inputs: Sequence[str], *, besides: Location | None = None) -> list[InputFile]:
    """The files that `inputs` (files, folders, globs, URLs) stand for, in order and each once.

    Files below `besides`, the output, are none of them: an output folder may lie within an input folder. Raises
    `InputError` for an input that matches nothing, a file of unknown format, or one that is named twice, and
    `OutputError` for an input that lies in the output.
    """
    if not inputs or not all(inputs):
        raise InputError("no input given; name a Parquet or JSONL file, a folder, a glob or a URL")
    files = [file for given in inputs for file in _outside(_list_one(given), given, besides)]
    seen: set[str] = set()
    for file in files:
        if file.url in seen:
            raise InputError(f"{file.url}: named twice among the inputs; every row is scored once, so name it once")
        seen.add(file.url)
    return files


def examine(
    files: Sequence[InputFile],
    columns: FieldColumns,
    unit_rows: int,
    on_file: Callable[[], None] = lambda: None,
    *,
    will_write: bool = True,
) -> list[Contents]:
    """Read every file's footer (JSONL: all of it, once), check its columns and cut it into slices.

    `on_file` is called as each file is done. `will_write` also refuses files that already have the columns a job
    adds. Raises `InputError` for a file that cannot be read or when there are no rows at all, `SchemaError` for one
    whose columns do not fit.
    """

    scans: dict[str, jsonl.Scan] = {}

    def examine_one(file: InputFile) -> tuple[Slice, ...]:
        if file.format == "parquet":
            schema, slices = _examine_parquet(file, columns, unit_rows)
        else:
            scan = scans[file.url] = _scan_jsonl(file, unit_rows)
            schema, slices = (
                scan.schema,
                [Slice(b.start, b.stop, b.offset, b.end, b.end - b.offset) for b in scan.blocks],
            )
        if slices:
            check_schema(schema, columns, file.url, any_type=file.format == "jsonl")
            if will_write and isinstance(columns, ColumnsConfig):
                check_room(schema, columns, file.url)
        on_file()
        return tuple(slices)

    with ThreadPoolExecutor(LISTING_THREADS) as pool:
        slices_of = list(pool.map(examine_one, files))
    common = jsonl.schema_of(scans[file.url] for file in files if file.url in scans)
    found = [
        Contents(slices, common if file.url in scans else None) for file, slices in zip(files, slices_of, strict=True)
    ]
    if not any(contents.slices for contents in found):
        named = files[0].url + (f" and {len(files) - 1} more" if len(files) > 1 else "")
        raise InputError(f"{named}: no rows; there is nothing to score")
    return found


def cut_rows(row_groups: Iterable[int], unit_rows: int) -> list[Slice]:
    """Slices of about `unit_rows` rows: whole row groups where they are small, parts of one where they are large."""
    slices: list[Slice] = []
    start = stop = 0
    for rows in row_groups:
        if stop > start and stop - start + rows > unit_rows:
            slices.append(Slice(start, stop))
            start = stop
        stop += rows
        while stop - start > unit_rows:
            slices.append(Slice(start, start + unit_rows))
            start += unit_rows
    if stop > start:
        slices.append(Slice(start, stop))
    return slices


def _outside(files: list[InputFile], given: str, output: Location | None) -> list[InputFile]:
    if output is None:
        return files
    folder = PurePosixPath(output.path)
    kept = [file for file in files if folder not in PurePosixPath(Location(file.url).path).parents]
    if not kept:
        raise OutputError(f"{output.url}: the input {given} lies in it; name an output folder of its own")
    return kept


def _list_one(given: str) -> list[InputFile]:
    if _is_glob(given) and not os.path.exists(given):
        return _list_glob(given)
    try:
        location = Location(given).absolute()
        info = location.info()
        if info.type == fs.FileType.NotFound:
            raise InputError(f"{given}: no such file or folder")
        if info.type == fs.FileType.File:
            return [_input_file(location, info, given, _partition_of(location.path))]
        found = location.walk()
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{given}: cannot be listed ({error})") from None
    known = [info for info in found if _format_of(info.path)]
    if not known:
        raise InputError(f"{given}: no {' or '.join(sorted(FORMATS))} file in this folder")
    return [_below(location, info) for info in known]


def _list_glob(given: str) -> list[InputFile]:
    url, question, query = given.partition("?") if "://" in given else (given, "", "")
    scheme, separator, path = url.rpartition("://")
    parts = path.split("/")
    fixed = next(place for place, part in enumerate(parts) if _is_glob(part))
    folder = "/".join(parts[:fixed]) or ("/" if path.startswith("/") else ".")
    try:
        base = Location(scheme + separator + folder + question + query).absolute()
        matches = [info for info in base.walk() if _matches(_parts_below(base, info), parts[fixed:])]
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{given}: cannot be listed ({error})") from None
    if not matches:
        raise InputError(f"{given}: matches no file; quote the pattern so that the shell does not expand it")
    return [_below(base, info) for info in matches]


def _below(base: Location, info: fs.FileInfo) -> InputFile:
    parts = _parts_below(base, info)
    location = base.join(*parts)
    return _input_file(location, info, location.url, _partition_of("/".join(parts)))


def _parts_below(base: Location, info: fs.FileInfo) -> tuple[str, ...]:
    return PurePosixPath(os.path.relpath(info.path, base.path)).parts


def _input_file(location: Location, info: fs.FileInfo, given: str, partition: str) -> InputFile:
    kind = _format_of(info.path)
    if kind is None:
        raise InputError(f"{given}: unknown format; the name must end in {', '.join(sorted(FORMATS))}")
    return InputFile(location.url, kind, info.size, info.mtime_ns or 0, partition)


def _format_of(path: str) -> Format | None:
    return FORMATS.get(PurePosixPath(path).suffix.lower())


def _partition_of(path: str) -> str:
    """The trailing run of `key=value` folders of a file's path; a hidden one would hide the output as well."""
    folders = PurePosixPath(path).parts[:-1]
    run: list[str] = []
    for folder in reversed(folders):
        if not HIVE_PART.fullmatch(folder):
            break
        run.insert(0, folder)
    return "/".join(run)


def _is_glob(text: str) -> bool:
    """Whether there are wildcards in it; `?` counts only in paths, where URLs have their query."""
    return any(mark in text for mark in ("*[" if "://" in text else "*?["))


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a path fits a pattern, both in parts: `*` stays within a name, `**` stands for any number of folders,
    and at the end for everything below."""
    if not pattern or not parts:
        return not pattern and not parts
    if pattern[0] != "**":
        return fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])
    return len(pattern) == 1 or any(_matches(parts[skip:], pattern[1:]) for skip in range(len(parts)))


def _examine_parquet(file: InputFile, columns: FieldColumns, unit_rows: int) -> tuple[pa.Schema, list[Slice]]:
    location, names = Location(file.url), set(columns.fields.values())
    try:
        with location.filesystem.open_input_file(location.path) as stream:
            parquet = pq.ParquetFile(stream)
            groups = [parquet.metadata.row_group(place) for place in range(parquet.metadata.num_row_groups)]
            rows = [group.num_rows for group in groups]
            sizes = [_size_of(group, names) for group in groups]
            return parquet.schema_arrow, _with_sizes(cut_rows(rows, unit_rows), rows, sizes)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{file.url}: not a readable Parquet file ({error})") from None


def _size_of(group: pq.RowGroupMetaData, names: set[str]) -> int:
    """Bytes of these columns in a row group, with those inside of them."""
    columns = (group.column(place) for place in range(group.num_columns))
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema.split(".")[0] in names)


def _with_sizes(slices: Sequence[Slice], rows: Sequence[int], sizes: Sequence[int]) -> list[Slice]:
    """Slices with their sizes, of which each row has as much as the others of its row group."""
    edges = [[part.start, part.stop] for part in slices]
    up_to = np.interp(edges, [0, *accumulate(rows)], [0, *accumulate(sizes)]) if edges else ()
    return [replace(part, size=round(end - start)) for part, (start, end) in zip(slices, up_to, strict=True)]


def _scan_jsonl(file: InputFile, unit_rows: int) -> jsonl.Scan:
    try:
        return jsonl.scan(Location(file.url), unit_rows)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{file.url}: cannot be read ({error})") from None
