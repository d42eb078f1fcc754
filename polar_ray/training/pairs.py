"""Pairs as a run keeps them: encoded once, in files that its workers read at random.

A file holds the pairs of one slice of the input, in order, usable or not. It is Arrow IPC, uncompressed, so that on a
local disk it is mapped into memory and a pair costs no more than its own pages.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from polar_ray.columns import parse_pairs
from polar_ray.config.training import TrainConfig
from polar_ray.corpus.inputs import Slice
from polar_ray.corpus.manifest import ManifestFile
from polar_ray.corpus.storage import Location
from polar_ray.corpus.units import read_unchanged
from polar_ray.encoding.encode import EncodedTriple, Encoder
from polar_ray.errors import OutputError, TripleError, TripleTooLong
from polar_ray.planning import MIN_SHARED_TOKENS, Ids
from polar_ray.training.packing import PairSizes
from polar_ray.triples import STATUS_OK, PreferencePair

SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("detail", pa.string()),
        pa.field("chosen", pa.list_(pa.int32()), nullable=False),
        pa.field("rejected", pa.list_(pa.int32()), nullable=False),
        pa.field("shared_tokens", pa.int32(), nullable=False),
        pa.field("cut_tokens", pa.int32(), nullable=False),
        pa.field("group", pa.int64(), nullable=False),
        pa.field("chosen_key", pa.int64(), nullable=False),
        pa.field("rejected_key", pa.int64(), nullable=False),
    ]
)
"""`row` counts in the input file. Of a pair that cannot be used the ids are empty and `detail` says why."""

NO_IDS: Ids = np.empty(0, dtype=np.int32)

OPEN_FILES = 4096


@dataclass(frozen=True)
class PairSlice:
    """A part of the input that becomes one file of encoded pairs."""

    file: ManifestFile
    slice: Slice


def encode_slice(part: PairSlice, encoder: Encoder, config: TrainConfig, message_json: frozenset[str]) -> pa.Table:
    """The encoded pairs of `part`, one for each of its rows. Raises `InputError` if it is gone or has changed."""
    where = f"{part.file.url}, rows from {part.slice.start}"
    _, rows = read_unchanged(part.file, part.slice, config.columns, where=where, reader="run")
    pairs = parse_pairs(rows, message_json)
    encoded = iter(encoder.encode_pairs([pair for pair in pairs if isinstance(pair, PreferencePair)]))
    outcomes = [next(encoded) if isinstance(pair, PreferencePair) else pair for pair in pairs]
    records = [_record(part.slice.start + place, outcome, config) for place, outcome in enumerate(outcomes)]
    columns = {name: [record[name] for record in records] for name in SCHEMA.names}
    return pa.table(
        [
            _lists(columns[field.name]) if pa.types.is_list(field.type) else pa.array(columns[field.name], field.type)
            for field in SCHEMA
        ],
        schema=SCHEMA,
    )


def write_pairs(place: Location, table: pa.Table) -> None:
    """Put a file of encoded pairs at `place`, whole or not at all. Raises `OutputError`."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_table(table.combine_chunks(), max_chunksize=max(1, table.num_rows))
    place.commit(sink.getvalue())


class PairStore:
    """The usable pairs of a run, numbered through all its files in order."""

    def __init__(self, files: Sequence[Location]) -> None:
        """Reads the small columns of every file. Raises `OutputError` where a file is gone or broken."""
        self._files = list(files)
        usable = [_usable_rows(open_pairs(file.url)) for file in self._files]
        self._file: Any = np.repeat(np.arange(len(usable), dtype=np.int32), [len(rows) for rows in usable])
        self._row: Any = np.concatenate([np.empty(0, dtype=np.int64), *usable])

    def __len__(self) -> int:
        return len(self._row)

    def sizes(self) -> PairSizes:
        """What packing needs to know, of all usable pairs."""
        columns: dict[str, list[Any]] = {name: [] for name in ("shared", "chosen", "rejected", "group", "ckey", "rkey")}
        for number, file in enumerate(self._files):
            table, rows = open_pairs(file.url), self._row[self._file == number]
            columns["shared"].append(table["shared_tokens"].to_numpy()[rows])
            columns["chosen"].append(_lengths(table["chosen"])[rows])
            columns["rejected"].append(_lengths(table["rejected"])[rows])
            for name, column in (("group", "group"), ("ckey", "chosen_key"), ("rkey", "rejected_key")):
                columns[name].append(table[column].to_numpy()[rows])
        whole = {name: np.concatenate([np.empty(0, dtype=np.int64), *parts]) for name, parts in columns.items()}
        return PairSizes(
            shared_tokens=whole["shared"],
            chosen_tokens=whole["chosen"],
            rejected_tokens=whole["rejected"],
            group=whole["group"],
            chosen=whole["ckey"],
            rejected=whole["rkey"],
        )

    def read(self, places: Iterable[int]) -> tuple[list[Ids], list[Ids]]:
        """Ids of the chosen and of the rejected sequences of the pairs at `places`."""
        chosen, rejected = [], []
        for place in places:
            table, row = open_pairs(self._files[self._file[place]].url), int(self._row[place])
            chosen.append(_ids(table["chosen"], row))
            rejected.append(_ids(table["rejected"], row))
        return chosen, rejected


def count_statuses(table: pa.Table) -> dict[str, int]:
    """Status to number of pairs."""
    counts = table["status"].value_counts().to_pylist()
    return {str(count["values"]): int(count["counts"]) for count in counts}


def _record(
    row: int, outcome: tuple[EncodedTriple, EncodedTriple] | TripleError, config: TrainConfig
) -> dict[str, Any]:
    if not isinstance(outcome, TripleError):
        chosen, rejected = outcome
        problem = _problem(chosen, rejected, config)
        if problem is None:
            shared = _shared(chosen, rejected)
            return {
                "row": row,
                "status": STATUS_OK,
                "detail": None,
                "chosen": chosen.ids,
                "rejected": rejected.ids,
                "shared_tokens": shared,
                "cut_tokens": chosen.cut_tokens + rejected.output_cut_tokens,
                "group": _key(chosen.ids[:shared]),
                "chosen_key": _key(chosen.ids),
                "rejected_key": _key(rejected.ids),
            }
        outcome = problem
    nothing = dict.fromkeys(("shared_tokens", "cut_tokens", "group", "chosen_key", "rejected_key"), 0)
    ids = {"chosen": NO_IDS, "rejected": NO_IDS}
    return {"row": row, "status": outcome.code, "detail": str(outcome), **ids, **nothing}


def _lists(sequences: Sequence[Ids]) -> pa.Array:
    """A list column made of whole arrays; a conversion number by number would take longer than the encoding."""
    ends = np.cumsum([0, *map(len, sequences)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(np.concatenate([NO_IDS, *sequences])))


def _problem(chosen: EncodedTriple, rejected: EncodedTriple, config: TrainConfig) -> TripleError | None:
    """Why a pair that could be encoded is of no use."""
    if np.array_equal(chosen.ids, rejected.ids):
        return TripleError("chosen and rejected are the same to the model; nothing can be learnt from the pair")
    tokens = len(chosen.ids) + len(rejected.ids) - (_shared(chosen, rejected) if config.share_prefixes else 0)
    if tokens > config.max_packed_tokens:
        return TripleTooLong(
            f"the pair takes {tokens} tokens and max_packed_tokens = {config.max_packed_tokens}; raise that, or lower "
            "limits.max_tokens"
        )
    return None


def _shared(chosen: EncodedTriple, rejected: EncodedTriple) -> int:
    """Tokens that the planner will share, whatever the two outputs are."""
    shared = min(chosen.shareable, rejected.shareable)
    return shared if shared >= MIN_SHARED_TOKENS else 0


def _key(ids: Ids) -> int:
    digest = hashlib.blake2b(ids.astype("<i4").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


@lru_cache(OPEN_FILES)
def open_pairs(url: str) -> pa.Table:
    """A file of encoded pairs: mapped from a local disk, read whole from elsewhere."""
    place = Location(url)
    try:
        source = pa.memory_map(place.path) if place.is_local else place.filesystem.open_input_file(place.path)
        return pa.ipc.open_file(source).read_all()
    except (OSError, pa.ArrowException) as error:
        raise OutputError(f"{url}: cannot be read ({error}); remove it and run the same command again") from None


def _usable_rows(table: pa.Table) -> Any:
    return np.flatnonzero(np.array(table["status"].to_pylist(), dtype=object) == STATUS_OK)


def _lengths(column: pa.ChunkedArray) -> Any:
    return np.concatenate(
        [np.empty(0, dtype=np.int64), *(np.diff(chunk.offsets.to_numpy()).astype(np.int64) for chunk in column.chunks)]
    )


def _ids(column: pa.ChunkedArray, row: int) -> Ids:
    ids: Ids = column[row].values.to_numpy()
    return ids
