"""`evaluate`: score what a file compares, and say how often the model orders it rightly, beside baselines."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from polar_ray.config import EvaluateConfig
from polar_ray.corpus.inputs import input_names
from polar_ray.corpus.progress import JobProgress, SilentProgress
from polar_ray.corpus.storage import Location
from polar_ray.corpus.tracker import Snapshot
from polar_ray.encoding.tokenizer import PolarTokenizer
from polar_ray.engines.build import refuse_unsupported, resolve_engine
from polar_ray.errors import OutputError, TooManyFailures
from polar_ray.evaluation.baselines import MODEL, Texts, baseline_values, plain_texts
from polar_ray.evaluation.blocks import Measured, measure_best_of, measure_block, measure_lengths, measure_reliability
from polar_ray.evaluation.inputs import Sample, chunks, read_sample
from polar_ray.evaluation.report import write_report
from polar_ray.evaluation.result import Evaluation
from polar_ray.evaluation.rewards import rewards_table, to_parquet
from polar_ray.model.locate import is_untrained, locate_model
from polar_ray.receipts import Receipt, build_receipt
from polar_ray.scoring import Scorer, Usage, has_gpu
from polar_ray.triples import Scored

Floats = NDArray[np.float64]

CHUNK_ROWS = 4096
"""Outputs that are planned together, whole groups of them: enough for full batches, few enough to show progress."""

MARGIN_BINS = 48
"""About so many in the histogram of margins, in steps of a power of two."""

EVALUATION_FILE, REPORT_FILE, REWARDS_FILE = "evaluation.json", "report.html", "rewards.parquet"


def evaluate(
    inputs: str | Path | Sequence[str | Path],
    config: EvaluateConfig | None = None,
    *,
    output: str | Path | None = None,
    progress: JobProgress | None = None,
) -> Evaluation:
    """Score the outputs that `inputs` compare and measure how well the rewards order them, beside baselines.

    Inputs are Parquet or JSONL files, folders, globs or URLs of pairs, or of triples with labels. One engine on this
    machine scores them, or the endpoint that `config.engine` names. With `output`, a folder or URL, three files are
    written there, in place of those of an earlier evaluation: `evaluation.json`, `report.html`, and `rewards.parquet`
    with the rewards that every figure can be found again from.

    Rows that cannot be scored are counted by status, and all figures are over the others. Raises `InputError`,
    `SchemaError`, `OutputError`, `ConfigError` or `CheckpointError` before anything is scored, `EngineError` from a
    running engine, and `TooManyFailures` when no pair at all could be scored.
    """
    started = time.monotonic()
    config, progress = config or EvaluateConfig(), progress or SilentProgress()
    refuse_unsupported(config.engine)
    with progress.stage("reading the input"):
        sample = read_sample(input_names(inputs), config)
    place = None if output is None else _prepare(str(output))
    with progress.stage("loading the model"):
        folder = locate_model(config.model, config.revision)
        on_gpu = config.engine.device == "auto" and has_gpu()
        engine = resolve_engine(config.engine, folder, has_gpu=on_gpu, max_tokens=config.limits.max_tokens)
        config = config.model_copy(update={"engine": engine, "layout": sample.layout})
        receipt = build_receipt(folder, PolarTokenizer(folder), engine, config.limits)
        scorer = Scorer.open(config.model, revision=config.revision, engine=engine, limits=config.limits)
    with scorer:
        scored = _score(scorer, sample, progress)
        usage = scorer.usage.copy()
    with progress.stage("measuring"):
        texts = plain_texts(sample.rows)
        measured = Measured(sample, _values(scored, texts), texts.lengths, config.resamples, config.seed)
        _refuse_no_figures(measured, scored)
        found = _evaluation(measured, scored, texts, config, is_untrained(folder), receipt, usage, started)
    if place is not None:
        table = rewards_table(measured, scored, receipt)
        _write(place, found, table)
    return found


def _prepare(output: str) -> Location:
    """The output folder, made. Raises `OutputError` before a model is loaded for nothing."""
    place = Location(output).absolute()
    try:
        place.make_folder()
    except (OSError, pa.ArrowException) as error:
        raise OutputError(f"{place.url}: cannot be made a folder ({error}); name another with --output") from None
    return place


def _score(scorer: Scorer, sample: Sample, progress: JobProgress) -> list[Scored]:
    """An outcome for every output, in order."""
    scored: list[Scored | None] = [None] * len(sample.rows)
    done = 0
    with progress.scoring(len(sample.rows), 0, 1) as show:
        for places in chunks(sample, CHUNK_ROWS):
            before = scorer.usage.rows

            def on_batch(done: int = done, before: int = before) -> None:
                show(_snapshot(done + scorer.usage.rows - before, scorer.usage))

            rows = [sample.rows[place] for place in places.tolist()]
            for place, outcome in zip(places.tolist(), scorer.score(rows, on_batch), strict=True):
                scored[place] = outcome
            done += len(places)
            show(_snapshot(done, scorer.usage))
    return [row for row in scored if row is not None]


def _snapshot(rows: int, usage: Usage) -> Snapshot:
    return Snapshot(
        actors=1,
        rows=rows,
        tokens=usage.tokens,
        computed_tokens=usage.computed_tokens,
        quarantined=0,
        deaths=0,
        finished=0,
        seconds_since_progress=0.0,
        in_flight=(),
        stage="",
        error=None,
    )


def _values(scored: Sequence[Scored], texts: Texts) -> dict[str, Floats]:
    """The model's value of each output, and every baseline's."""
    rewards = np.array([math.nan if row.reward is None else row.reward for row in scored], np.float64)
    return {MODEL.name: rewards, **baseline_values(texts)}


def _refuse_no_figures(measured: Measured, scored: Sequence[Scored]) -> None:
    sample = measured.sample
    labels = sample.labels[measured.has_reward] if sample.layout == "triples" else np.zeros(0)
    if measured.scored_pairs.any() or (sample.has_two_labels and len(np.unique(labels)) == 2):
        return
    failed = [row for row in scored if not row.is_ok]
    if not failed:
        return
    causes = ", ".join(f"{count} {status}" for status, count in sorted(Counter(row.status for row in failed).items()))
    raise TooManyFailures(
        f"not one of {len(sample.better):,} pairs could be scored ({causes}). The first: {failed[0].detail}"
    )


def _evaluation(
    measured: Measured,
    scored: Sequence[Scored],
    texts: Texts,
    config: EvaluateConfig,
    untrained: bool,
    receipt: Receipt,
    usage: Usage,
    started: float,
) -> Evaluation:
    sample = measured.sample
    by_length, by_length_ratio = measure_lengths(measured)
    width, bins = _margin_bins(measured.margins(MODEL.name, measured.scored_pairs))
    labels = None if sample.layout == "pairs" else "two" if sample.has_two_labels else "graded"
    return Evaluation.model_validate(
        {
            "model": config.model,
            "untrained": untrained,
            "layout": sample.layout,
            "labels": labels,
            "label_range": None if labels is None else (sample.known_labels[0], sample.known_labels[-1]),
            "inputs": list(sample.inputs),
            "input_rows": sample.input_rows,
            "unlabelled_rows": sample.unlabelled_rows,
            "by_status": dict(Counter(row.status for row in scored)),
            "equal_pairs": _equal_pairs(sample, texts),
            "total": measure_block(measured),
            "by": [
                measure_block(measured, column, value)
                for column, values in sample.values.items()
                for value, _ in sorted(Counter(values).items(), key=lambda found: (-found[1], found[0]))
            ],
            "best_of": measure_best_of(measured, config.best_of),
            "reliability": measure_reliability(measured),
            "by_length": by_length,
            "by_length_ratio": by_length_ratio,
            "margin_bin": width,
            "margin_bins": bins,
            "tokens": sum(row.tokens for row in scored),
            "computed_tokens": usage.computed_tokens,
            "seconds": time.monotonic() - started,
            "settings": config,
            "receipt": receipt.model_dump(),
            "receipt_id": receipt.receipt_id,
        }
    )


def _equal_pairs(sample: Sample, texts: Texts) -> int:
    """Pairs whose outputs are the same text."""
    place_of = {text: place for place, text in enumerate(dict.fromkeys(texts.outputs)) if text is not None}
    same = np.array([place_of.get(text, -1) if text is not None else -1 for text in texts.outputs], np.int64)
    better, worse = same[sample.better], same[sample.worse]
    return int(((better == worse) & (better >= 0)).sum())


def _margin_bins(margins: Floats) -> tuple[float, dict[int, int]]:
    """(width, bin to count); the width a power of two, so that margins of one size are drawn alike."""
    typical = float(np.percentile(np.abs(margins), 95)) if len(margins) else 0.0
    width = 2.0 ** math.ceil(math.log2(2 * typical / MARGIN_BINS)) if typical > 0 else 0.25
    return width, dict(sorted(Counter(np.floor(margins / width).astype(np.int64).tolist()).items()))


def _write(place: Location, found: Evaluation, table: pa.Table) -> None:
    contents = {
        REWARDS_FILE: to_parquet(table),
        REPORT_FILE: write_report(found).encode(),
        EVALUATION_FILE: found.model_dump_json(indent=2).encode(),
    }
    for name, content in contents.items():
        place.join(name).commit(content)
