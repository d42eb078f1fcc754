"""Encoding a run's pairs on Ray Data, a file for each slice of the input. A file that is there is done."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data

from polar_ray.corpus.manifest import FOLDER
from polar_ray.corpus.storage import Location
from polar_ray.encoding.encode import Encoder
from polar_ray.encoding.tokenizer import PolarTokenizer
from polar_ray.errors import CheckpointError, OutputError, PolarRayError, TooManyFailures, unwrap
from polar_ray.model.locate import locate_model
from polar_ray.training.manifest import TrainingManifest
from polar_ray.training.pairs import count_statuses, encode_slice, open_pairs, write_pairs
from polar_ray.triples import STATUS_OK

SKIPPED_FILE = "skipped.jsonl"
"""Below the run's own folder: the pairs that are not trained on, each with its file, row and reason."""


@dataclass(frozen=True)
class PreparedPairs:
    """The input after encoding."""

    files: tuple[Location, ...]
    by_status: dict[str, int]
    cut_pairs: int
    """Pairs that lost tokens to the limits, and are used."""

    @property
    def usable(self) -> int:
        return self.by_status.get(STATUS_OK, 0)

    @property
    def skipped(self) -> int:
        return sum(self.by_status.values()) - self.usable


def prepare_pairs(output: Location, manifest: TrainingManifest, on_file: Callable[[], None]) -> PreparedPairs:
    """Encode what is not encoded yet, and take stock. Needs a connection to Ray.

    Raises `InputError` or `OutputError` for files, and `TooManyFailures` when more than `max_failed_fraction` of the
    pairs, or all of them, are of no use.
    """
    files = tuple(manifest.pair_file(output, index) for index in range(len(manifest.slices)))
    todo = [index for index, file in enumerate(files) if not file.exists()]
    for _ in range(len(files) - len(todo)):
        on_file()
    if todo:
        _encode(output, manifest, todo, on_file)
    return _take_stock(output, manifest, files)


class EncodeSlices:
    """Encodes slices by number, in a process with a tokenizer of its own."""

    def __init__(self, output: Location, manifest: TrainingManifest) -> None:
        self._output, self._manifest, self._slices = output, manifest, manifest.slices
        config = manifest.config
        tokenizer = PolarTokenizer(locate_model(config.model, config.revision))
        if tokenizer.digest != manifest.tokenizer:
            raise CheckpointError(f"{config.model}: this node has another tokenizer under that name")
        self._encoder = Encoder(tokenizer, config.limits, newline_before_empty=config.newline_before_empty)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        manifest = self._manifest
        for index in batch["slice"].tolist():
            part, message_json = self._slices[index], frozenset(manifest.message_json)
            table = encode_slice(part, self._encoder, manifest.config, message_json)
            write_pairs(manifest.pair_file(self._output, index), table)
        return batch


def _encode(output: Location, manifest: TrainingManifest, todo: list[int], on_file: Callable[[], None]) -> None:
    slices = ray.data.from_items([{"slice": index} for index in todo], override_num_blocks=len(todo))
    processes = max(1, min(len(todo), int(ray.cluster_resources().get("CPU", 1))))
    done = slices.map_batches(
        EncodeSlices, fn_constructor_args=(output, manifest), batch_size=1, num_cpus=1, concurrency=processes
    )
    done.context.enable_progress_bars = False
    done.context.print_on_execution_start = False
    try:
        for _ in done.iter_batches(batch_size=1, prefetch_batches=0):
            on_file()
    except Exception as error:
        known = unwrap(error)
        raise (
            known if isinstance(known, PolarRayError) else OutputError(f"encoding the pairs failed: {known}")
        ) from None


def _take_stock(output: Location, manifest: TrainingManifest, files: tuple[Location, ...]) -> PreparedPairs:
    counts: Counter[str] = Counter()
    cut = 0
    skipped: list[pa.Table] = []
    for file, part in zip(files, manifest.slices, strict=True):
        table = open_pairs(file.url).select(["row", "status", "detail", "cut_tokens"])
        counts.update(count_statuses(table))
        cut += int((table["cut_tokens"].to_numpy() > 0).sum())
        bad = table.filter(np.array(table["status"].to_pylist(), dtype=object) != STATUS_OK)
        if bad.num_rows:
            skipped.append(
                bad.drop_columns("cut_tokens").append_column("file", pa.array([part.file.url] * bad.num_rows))
            )
    found = PreparedPairs(files, dict(counts), cut)
    place = output.join(FOLDER, SKIPPED_FILE)
    place.commit(_json_lines(pa.concat_tables(skipped)) if skipped else b"")
    most = manifest.config.max_failed_fraction * sum(counts.values())
    if found.skipped > most or not found.usable:
        causes = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()) if status != STATUS_OK)
        raise TooManyFailures(
            f"{found.skipped} of {sum(counts.values())} pairs cannot be trained on ({causes}), more than "
            f"max_failed_fraction = {manifest.config.max_failed_fraction}; {place.url} says why, row by row"
        )
    return found


def _json_lines(table: pa.Table) -> bytes:
    rows = table.select(["file", "row", "status", "detail"]).to_pylist()
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
