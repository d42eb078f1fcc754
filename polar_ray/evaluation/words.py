"""An evaluation's figures in words: the same on the terminal and on the page."""

from __future__ import annotations

from collections.abc import Sequence

from polar_ray.evaluation.result import BestOf, Block, Evaluation, Interval, MethodResult
from polar_ray.report.wording import SPACE, decimal, percent

NONE = "–"
"""In place of a figure that there is none of."""

FAKE = "The fake engine looks at no weights: its rewards are hashes of the token ids, and so are these figures."
UNTRAINED = (
    "The weights of this checkpoint are untrained: its rewards are random numbers, and its accuracy is a coin's. Name "
    "a trained model with --model."
)


def share(value: float | None) -> str:
    """A share in percent."""
    return NONE if value is None else percent(value)


def span(interval: Interval | None) -> str:
    """An interval of shares, in percent."""
    return NONE if interval is None else f"{100 * interval.low:.1f}–{100 * interval.high:.1f}"


def coefficient(value: float | None) -> str:
    """An AUC or a correlation, in three decimals."""
    return NONE if value is None else f"{value:.3f}".replace("-", "−")


def coefficient_span(interval: Interval | None) -> str:
    """An interval of coefficients."""
    return NONE if interval is None else f"{interval.low:.3f}–{interval.high:.3f}".replace("-", "−")


def lead(method: MethodResult) -> str:
    """How far the model is ahead of a baseline, in percentage points."""
    if method.lead is None:
        return ""
    ahead = _signed(100 * method.lead)
    if method.lead_interval is None:
        return ahead
    return f"{ahead} [{_signed(100 * method.lead_interval.low)}, {_signed(100 * method.lead_interval.high)}]"


def _signed(points: float) -> str:
    return f"{points:+.1f}".replace("-", "−")


def margin(method: MethodResult) -> str:
    """The mean margin; a cosine needs more decimals than a reward, characters none."""
    value = method.mean_margin
    if value is None:
        return NONE
    if method.unit == "cosine":
        return f"{value:.3f}".replace("-", "−")
    return f"{value:.0f}".replace("-", "−") if method.unit == "characters" and abs(value) >= 10 else decimal(value)


def rival(block: Block) -> MethodResult | None:
    """The baseline with the highest accuracy; None without pairs."""
    known = [method for method in block.methods[1:] if method.accuracy is not None]
    return max(known, key=lambda method: method.accuracy or 0.0) if known else None


def table_head(found: Evaluation) -> list[str]:
    """The columns of the table of methods; those without a figure are left out."""
    head = ["", "pairs", "accuracy", "95 % CI", "ties", "mean margin", "model's lead"]
    head += ["beats all"] if _has_several(found) else []
    return head + {"two": ["AUC", "95 % CI"], "graded": ["Spearman", "95 % CI"], None: []}[found.labels]


def table_lines(found: Evaluation, block: Block) -> list[list[str]]:
    """A line of cells for each method of a block, its title first."""
    return [_cells(found, block, method) for method in block.methods]


def _cells(found: Evaluation, block: Block, method: MethodResult) -> list[str]:
    cells = [
        method.title,
        f"{block.pairs:,}",
        share(method.accuracy),
        span(method.accuracy_interval),
        f"{method.ties:,}",
        margin(method),
        lead(method),
    ]
    cells += [share(method.beats_all)] if _has_several(found) else []
    if found.labels == "two":
        cells += [coefficient(method.auc), coefficient_span(method.auc_interval)]
    if found.labels == "graded":
        cells += [coefficient(method.spearman), coefficient_span(method.spearman_interval)]
    return cells


def _has_several(found: Evaluation) -> bool:
    return any(method.beats_all is not None for method in found.total.methods)


def best_of_table(found: Evaluation) -> tuple[list[str], list[list[str]]]:
    """(head, lines of cells) of best-of-n: chance, the model, the baselines, and the labels themselves."""
    head = ["best of", *(f"{row.n}" for row in found.best_of)]
    titles = {method.name: method.title for method in found.total.methods}
    lines = [
        [title, *(_label(found, row.methods[name].value) for row in found.best_of)] for name, title in titles.items()
    ]
    lines.append(["picked at random", *(_label(found, row.random) for row in found.best_of)])
    lines.append(["picked by label", *(_label(found, row.oracle) for row in found.best_of)])
    return head, lines


def best_of_note(rows: Sequence[BestOf]) -> str:
    """What best-of-n's figures are, and over how many groups."""
    counts = sorted({row.groups for row in rows})
    over = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    return (
        "The expected label of the output with the highest value among n of a group's, drawn without replacement; "
        f"over {over} groups."
    )


def _label(found: Evaluation, value: float) -> str:
    """A mean label: a share where labels are 0 and 1."""
    return share(value) if found.label_range == (0, 1) else decimal(value)


def block_title(block: Block) -> str:
    """What a block is of."""
    return "all" if block.column is None else f"{block.column} = {block.value}"


def account(found: Evaluation) -> list[str]:
    """What was compared and what was left out, a sentence each."""
    total = found.total
    of = found.input_rows - found.unlabelled_rows
    said = [
        f"{total.pairs:,} pairs from {of:,} {'rows' if found.layout == 'pairs' else 'labelled outputs'}, "
        f"{total.groups:,} groups; intervals are of a bootstrap that draws whole groups."
    ]
    if total.unscored_pairs:
        causes = ", ".join(f"{count:,} {status}" for status, count in found.failed.items())
        said.append(f"{total.unscored_pairs:,} pairs could not be scored and are in no figure; outputs: {causes}.")
    if found.unlabelled_rows:
        said.append(f"{found.unlabelled_rows:,} rows have no label and were not scored.")
    if found.equal_pairs:
        said.append(f"{found.equal_pairs:,} pairs have equal outputs: ties for everything.")
    if found.reliability is not None:
        error = f"{100 * found.reliability.ece:.1f}{SPACE}points"
        said.append(f"Calibration error {error}: sigmoid(margin) against what was observed.")
    return said
