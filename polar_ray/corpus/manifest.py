"""What a job is: its units, and the receipt that every one of them carries. Written before any engine starts.

An output folder belongs to one manifest. A unit is done when its file exists; nothing else is recorded, so nothing
can disagree with the files.
"""

from __future__ import annotations

import base64
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import pyarrow as pa
from pyarrow import fs
from pydantic import ConfigDict, ValidationError

from polar_ray.config import ColumnsConfig, Settings
from polar_ray.corpus.inputs import Contents, Format, InputFile, Slice
from polar_ray.corpus.storage import Location
from polar_ray.errors import ManifestConflict, OutputError
from polar_ray.receipts import Receipt

FOLDER = "_polar_ray"
"""Below the output folder; readers of Parquet folders pass over names that begin with an underscore."""

LEFTOVER = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")
"""What `Location.write_atomically` calls a file until it is whole."""


class ManifestFile(Settings):
    """An input file as it was when the manifest was made."""

    url: str
    format: Format
    size: int
    modified_ns: int
    partition: str
    arrow_schema: str | None = None
    """JSONL only: the schema of its rows, as Arrow serialises it, in base64."""

    @property
    def schema_of_rows(self) -> pa.Schema | None:
        return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(self.arrow_schema))) if self.arrow_schema else None


def describe_files(files: Sequence[InputFile], contents: Sequence[Contents]) -> tuple[ManifestFile, ...]:
    """The input files as a manifest has them."""
    return tuple(
        ManifestFile(
            url=file.url,
            format=file.format,
            size=file.size,
            modified_ns=file.modified_ns,
            partition=file.partition,
            arrow_schema=None
            if found.schema is None
            else base64.b64encode(found.schema.serialize().to_pybytes()).decode(),
        )
        for file, found in zip(files, contents, strict=True)
    )


@dataclass(frozen=True, slots=True)
class Unit:
    """Rows `start` to `stop` of one input file; `offset`, `end` and `size` are their slice's.

    No pydantic model: there may be a million, in the memory of every actor, and each would take ten times as much.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    index: int
    file: int
    start: int
    stop: int
    offset: int = 0
    end: int = 0
    size: int = 0

    @property
    def slice(self) -> Slice:
        return Slice(self.start, self.stop, self.offset, self.end, self.size)

    @property
    def rows(self) -> int:
        return self.stop - self.start


class Manifest(Settings):
    """The list of units of a job. A unit's place in `units` is its index."""

    version: Literal[1] = 1
    job_id: str
    """Random; in every file that this job writes, so that no other job's file is taken for one of them."""

    receipt: Receipt
    columns: ColumnsConfig
    message_json: tuple[str, ...]
    """Fields whose strings are JSON text of message lists."""

    files: tuple[ManifestFile, ...]
    units: tuple[Unit, ...]

    @property
    def rows(self) -> int:
        return sum(unit.rows for unit in self.units)

    def part(self, index: int) -> str:
        """Path of a unit's file below the output folder. Sorted by name, files of a folder are in input order."""
        partition = self.files[self.units[index].file].partition
        digits = max(6, len(str(len(self.units) - 1)))
        name = f"part-{index:0{digits}d}.parquet"
        return f"{partition}/{name}" if partition else name

    def describe(self, index: int) -> str:
        """A unit in words, for people."""
        unit = self.units[index]
        return f"unit {index} ({self.files[unit.file].url} rows {unit.start}-{unit.stop - 1})"


def units_of(contents: Sequence[Contents]) -> tuple[Unit, ...]:
    """The units of a job over files with these contents, in order."""
    slices = ((place, part) for place, found in enumerate(contents) for part in found.slices)
    return tuple(
        Unit(
            index=index,
            file=place,
            start=part.start,
            stop=part.stop,
            offset=part.offset,
            end=part.end,
            size=part.size,
        )
        for index, (place, part) in enumerate(slices)
    )


def make_manifest(
    files: Sequence[InputFile],
    contents: Sequence[Contents],
    receipt: Receipt,
    columns: ColumnsConfig,
    message_json: frozenset[str],
) -> Manifest:
    """The manifest of a new job."""
    return Manifest(
        job_id=uuid.uuid4().hex,
        receipt=receipt,
        columns=columns,
        message_json=tuple(sorted(message_json)),
        files=describe_files(files, contents),
        units=units_of(contents),
    )


def load_manifest(output: Location) -> Manifest | None:
    """The manifest of the job that owns `output`; None for a folder that is new or empty.

    Raises `OutputError` for a folder with files of somebody else's, or a manifest that cannot be read.
    """
    place = manifest_location(output)
    try:
        content = place.patiently(lambda: place.read_bytes() if place.exists() else None)
        if content is not None:
            return Manifest.model_validate_json(content)
        strangers = _strangers(output)
    except ValidationError as error:
        raise OutputError(
            f"{place.url}: not a manifest of this version ({error.error_count()} faults); name another folder"
        ) from None
    except (OSError, pa.ArrowException) as error:
        raise OutputError(f"{output.url}: cannot be read ({error})") from None
    if strangers:
        raise OutputError(
            f"{output.url}: holds {strangers[0]!r}, which no job of polar_ray wrote; name an empty folder"
        )
    return None


def save_manifest(output: Location, manifest: Manifest) -> None:
    """Write the manifest and make the folders its units go to. Raises `OutputError` if that is not allowed."""
    try:
        for folder in sorted({file.partition for file in manifest.files}):
            (output.join(*folder.split("/")) if folder else output).make_folder()
        output.join(FOLDER).make_folder()
        manifest_location(output).write_atomically(manifest.model_dump_json().encode(), exclusively=True)
    except FileExistsError:
        raise OutputError(f"{output.url}: another run began a job here just now; wait for it, then run again") from None
    except (OSError, pa.ArrowException) as error:
        raise OutputError(f"{output.url}: cannot be written ({error})") from None


def check_writable(output: Location) -> None:
    """Raise `OutputError` unless files can be made below `output`, by making one and removing it."""
    probe = output.join(FOLDER, "probe")
    try:
        output.join(FOLDER).make_folder()
        probe.write_atomically(b"")
        probe.delete()
    except (OSError, pa.ArrowException) as error:
        raise OutputError(f"{output.url}: cannot be written ({error})") from None


def manifest_location(output: Location) -> Location:
    return output.join(FOLDER, "manifest.json")


def check_same_job(
    manifest: Manifest, files: Sequence[InputFile], receipt: Receipt, columns: ColumnsConfig, output: Location
) -> None:
    """Raise `ManifestConflict`, with every difference named, unless `output` belongs to this very job."""
    differences = [
        f"{name}: was {was!r}, is {now!r}" for name, (was, now) in manifest.receipt.differences(receipt).items()
    ]
    differences += _changed_settings(manifest.columns, columns)
    differences += _changed_files(manifest.files, files)
    if differences:
        shown = "\n  ".join(differences[:10] + ([f"and {len(differences) - 10} more"] if len(differences) > 10 else []))
        raise ManifestConflict(
            f"{output.url} belongs to another job:\n  {shown}\nName another --output, or give --fresh to discard it",
            differences=differences,
        )


def finished_parts(output: Location) -> set[str]:
    """Paths, below `output`, of the units that are done."""
    root = output.path.rstrip("/")
    return {info.path.removeprefix(f"{root}/") for info in output.walk() if info.path.endswith(".parquet")}


def unfinished_units(output: Location, manifest: Manifest) -> list[int]:
    """The units that are left to do, the largest first, so that in the end nobody waits for one that began late."""
    done = finished_parts(output)
    left = (unit for unit in manifest.units if manifest.part(unit.index) not in done)
    return [unit.index for unit in sorted(left, key=lambda unit: -unit.size)]


def discard_job(output: Location) -> None:
    """Remove what a job wrote to `output`: the files its manifest names, and its own folder.

    Raises `OutputError` where there is something and no manifest says whose it is.
    """
    manifest = load_manifest(output)
    if manifest is None:
        return
    for part in sorted({manifest.part(unit.index) for unit in manifest.units} & finished_parts(output)):
        output.join(*part.split("/")).delete()
    discard_leftovers(output)
    output.join(FOLDER).delete()


def discard_leftovers(output: Location) -> None:
    """Remove what processes that were killed in the middle of a write left aside."""
    if not output.is_local:
        return
    selector = fs.FileSelector(output.path, recursive=True, allow_not_found=True)
    for info in output.filesystem.get_file_info(selector):
        if info.is_file and LEFTOVER.fullmatch(info.base_name):
            output.filesystem.delete_file(info.path)


def _strangers(output: Location) -> list[str]:
    info = output.info()
    if info.type == fs.FileType.File:
        raise OutputError(f"{output.url}: is a file; name a folder")
    return [file.base_name for file in output.walk()]


def _changed_settings(was: ColumnsConfig, now: ColumnsConfig) -> list[str]:
    before, after = was.model_dump(), now.model_dump()
    return [
        f"columns.{name}: was {before[name]!r}, is {after[name]!r}" for name in before if before[name] != after[name]
    ]


def _changed_files(was: Sequence[ManifestFile], now: Sequence[InputFile]) -> list[str]:
    before, after = {file.url: file for file in was}, {file.url: file for file in now}
    changes = [f"{url}: is new among the inputs" for url in after if url not in before]
    changes += [f"{url}: is no longer among the inputs" for url in before if url not in after]
    for url in before.keys() & after.keys():
        if before[url].size != after[url].size:
            changes.append(f"{url}: had {before[url].size} bytes, has {after[url].size}")
        elif before[url].modified_ns != after[url].modified_ns:
            times = [_time(file.modified_ns) for file in (before[url], after[url])]
            changes.append(f"{url}: was modified {times[0]}, then again {times[1]}")
    if not changes and [file.url for file in was] != [file.url for file in now]:
        changes.append("the inputs are named in another order")
    return sorted(changes)


def _time(modified_ns: int) -> Any:
    return datetime.fromtimestamp(modified_ns / 1e9, UTC).isoformat(timespec="milliseconds")
