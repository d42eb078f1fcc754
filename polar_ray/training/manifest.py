"""What a training run is: everything that decides its trajectory. Written before anything is encoded.

An output folder belongs to one run. Started again, the run goes on; started with something else, it is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import pyarrow as pa
from pydantic import ValidationError

from polar_ray.config import Settings
from polar_ray.config.training import TrainConfig
from polar_ray.corpus.inputs import Contents, InputFile, Slice
from polar_ray.corpus.manifest import FOLDER, ManifestFile, describe_files
from polar_ray.corpus.storage import Location
from polar_ray.encoding.encode import ENCODING_VERSION
from polar_ray.errors import ManifestConflict, OutputError
from polar_ray.training.pairs import PairSlice

FILE = "training.json"

FREE_SETTINGS = frozenset(
    {
        "model",
        "revision",
        "workers",
        "threads",
        "device",
        "checkpoint_every_steps",
        "max_failures",
        "max_failed_fraction",
    }
)
"""What may differ when a run goes on: none of it moves the trajectory by more than rounding. Which model it is, its
digests say."""


class Source(Settings):
    """An input file, and the slices that it is encoded in."""

    file: ManifestFile
    slices: tuple[tuple[int, int, int, int], ...]
    """(start, stop) rows, and (offset, end) bytes in a JSONL file."""


class TrainingManifest(Settings):
    """A run, before its first step."""

    version: Literal[1] = 1
    config: TrainConfig
    base_weights: str
    """Digest of the weights that the run starts from."""

    tokenizer: str
    encoding_version: int
    message_json: tuple[str, ...]
    sources: tuple[Source, ...]

    @property
    def slices(self) -> list[PairSlice]:
        """The parts of the input, each of which becomes one file of encoded pairs."""
        return [PairSlice(source.file, Slice(*part)) for source in self.sources for part in source.slices]

    def pair_file(self, output: Location, index: int) -> Location:
        """Where the encoded pairs of a slice lie."""
        return output.join(FOLDER, "pairs", f"part-{index:06d}.arrow")


def make_manifest(
    config: TrainConfig,
    files: Sequence[InputFile],
    contents: Sequence[Contents],
    message_json: frozenset[str],
    base_weights: str,
    tokenizer: str,
) -> TrainingManifest:
    """The manifest of a new run."""
    return TrainingManifest(
        config=config,
        base_weights=base_weights,
        tokenizer=tokenizer,
        encoding_version=ENCODING_VERSION,
        message_json=tuple(sorted(message_json)),
        sources=tuple(
            Source(file=file, slices=tuple((part.start, part.stop, part.offset, part.end) for part in found.slices))
            for file, found in zip(describe_files(files, contents), contents, strict=True)
        ),
    )


def load_manifest(output: Location) -> TrainingManifest:
    """The manifest of the run that `output` belongs to. Raises `OutputError` if it cannot be read."""
    place = output.join(FOLDER, FILE)
    try:
        return TrainingManifest.model_validate_json(place.read_bytes())
    except (OSError, ValidationError) as error:
        raise OutputError(f"{place.url}: not a manifest of this version ({error}); --fresh starts over") from None


def save_manifest(output: Location, manifest: TrainingManifest) -> None:
    """Write the manifest. Raises `OutputError` when the storage refuses."""
    folder = output.join(FOLDER, "pairs")
    try:
        folder.make_folder()
    except (OSError, pa.ArrowException) as error:
        raise OutputError(f"{folder.url}: cannot be made ({error})") from None
    output.join(FOLDER, FILE).commit(manifest.model_dump_json(indent=2).encode())


def check_same_run(before: TrainingManifest, now: TrainingManifest, output: Location) -> None:
    """Raise `ManifestConflict` that names every difference between the run of `output` and the one asked for."""
    differences = [
        f"{name}: was {old}, is {new}"
        for name, old, new in _differences(_comparable(before), _comparable(now))
        if name.removeprefix("config.") not in FREE_SETTINGS
    ]
    if differences:
        raise ManifestConflict(
            f"{output.url} belongs to another training run:\n  "
            + "\n  ".join(differences)
            + "\nChoose another output, go back to the old settings, or discard that run with --fresh"
        )


def _comparable(manifest: TrainingManifest) -> dict[str, Any]:
    values = manifest.model_dump(mode="json", exclude={"sources"})
    if manifest.config.parallel == "fsdp":  # whose checkpoints hold each worker's part
        values["workers_of_fsdp"] = manifest.config.workers
    return values | {
        "inputs": [[file.url, file.size, file.modified_ns] for file in (source.file for source in manifest.sources)]
    }


def _differences(before: Any, now: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            found
            for key in sorted({*before, *now})
            for found in _differences(before.get(key), now.get(key), f"{name}.{key}".lstrip("."))
        ]
    return [] if before == now else [(name, before, now)]
