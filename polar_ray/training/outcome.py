"""What a run leaves beside the weights: what made them, and how it went."""

from __future__ import annotations

import json
import tempfile
import time
from importlib.metadata import version
from typing import Any

from pyarrow import fs
from pydantic import BaseModel

from polar_ray.config.training import TrainConfig
from polar_ray.corpus.storage import Location
from polar_ray.model.checkpoint import weights_digest
from polar_ray.training.manifest import TrainingManifest
from polar_ray.training.prepare import PreparedPairs
from polar_ray.training.tracker import StepReport
from polar_ray.triples import STATUS_OK

RECEIPT_FILE = "receipt.json"
METRICS_FILE = "metrics.json"

LAST_SHARE = 0.1
"""Of the steps, over which the summary's loss and accuracy are taken."""


class TrainReceipt(BaseModel):
    """What made a checkpoint: enough to make it again, and to know it again."""

    weights_digest: str
    """Of the weights that were written."""

    base_model: str
    base_weights_digest: str
    tokenizer_digest: str
    encoding_version: int
    config: TrainConfig
    inputs: list[dict[str, Any]]
    """Address, size and time of change of each file of pairs."""

    versions: dict[str, str]


class TrainSummary(BaseModel):
    """A finished run in numbers."""

    pairs: int
    """Usable ones, each counted once whatever the epochs."""

    skipped: dict[str, int]
    cut_pairs: int
    steps: int
    tokens: int
    computed_tokens: int
    loss: float
    """Mean over the pairs of the last tenth of the steps; so is `accuracy`. Each pair was measured before it was learnt
    from, so with one epoch these are pairs that the model had not seen."""

    accuracy: float
    seconds: float
    """Wall time of this start of the run."""

    starts: int
    """Times that workers were started: one, and one more for each failure."""

    output: str
    weights_digest: str


def finished(output: Location) -> TrainSummary | None:
    """The summary of a run that has nothing left to do."""
    place = output.join(METRICS_FILE)
    if not place.exists():
        return None
    return TrainSummary.model_validate(json.loads(place.read_bytes())["summary"])


def conclude(
    output: Location,
    manifest: TrainingManifest,
    pairs: PreparedPairs,
    reports: list[StepReport],
    starts: int,
    started: float,
) -> TrainSummary:
    """Write what the run was and how it went, beside the weights."""
    config = manifest.config
    digest = _digest_of(output)
    receipt = TrainReceipt(
        weights_digest=digest,
        base_model=config.model,
        base_weights_digest=manifest.base_weights,
        tokenizer_digest=manifest.tokenizer,
        encoding_version=manifest.encoding_version,
        config=config,
        inputs=[source.file.model_dump(include={"url", "size", "modified_ns"}) for source in manifest.sources],
        versions={name: version(name) for name in ("polar_ray", "torch", "transformers", "ray")},
    )
    summary = TrainSummary(
        pairs=pairs.usable,
        skipped={status: count for status, count in pairs.by_status.items() if status != STATUS_OK},
        cut_pairs=pairs.cut_pairs,
        steps=reports[-1].step if reports else 0,
        tokens=sum(report.tokens for report in reports),
        computed_tokens=sum(report.computed_tokens for report in reports),
        seconds=time.time() - started,
        starts=starts,
        output=output.url,
        weights_digest=digest,
        **_over_the_last(reports),
    )
    output.join(RECEIPT_FILE).write_atomically(receipt.model_dump_json(indent=2).encode())
    metrics = {
        "summary": summary.model_dump(mode="json"),
        "steps": [report.model_dump(mode="json") for report in reports],
    }
    output.join(METRICS_FILE).write_atomically(json.dumps(metrics, indent=1).encode())
    return summary


def _over_the_last(reports: list[StepReport]) -> dict[str, float]:
    last = reports[-max(1, round(LAST_SHARE * len(reports))) :]
    pairs = sum(report.pairs for report in last)
    return {
        name: sum(getattr(report, name) * report.pairs for report in last) / max(1, pairs)
        for name in ("loss", "accuracy")
    }


def _digest_of(output: Location) -> str:
    if output.is_local:
        return weights_digest(output.path)
    with tempfile.TemporaryDirectory() as scratch:
        for info in output.walk():
            if info.base_name.endswith((".safetensors", ".json")):
                fs.copy_files(
                    info.path,
                    f"{scratch}/{info.base_name}",
                    source_filesystem=output.filesystem,
                    destination_filesystem=fs.LocalFileSystem(),
                )
        return weights_digest(scratch)
