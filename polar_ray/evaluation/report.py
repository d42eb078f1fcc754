"""The page about an evaluation: `report.html`, one file that needs nothing else to be read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath

from markupsafe import Markup

from polar_ray.evaluation.baselines import MODEL
from polar_ray.evaluation.result import Bin, Block, Evaluation, Interval, ValueAt
from polar_ray.evaluation.words import (
    FAKE,
    NONE,
    UNTRAINED,
    account,
    best_of_note,
    best_of_table,
    block_title,
    coefficient,
    coefficient_span,
    lead,
    rival,
    share,
    span,
    table_head,
    table_lines,
)
from polar_ray.report.page import Figure, Share, Table, TableRow, Tile, render_page
from polar_ray.report.plots import (
    ForestRow,
    Point,
    Series,
    draw_chart,
    draw_forest,
    draw_histogram,
    gather,
    percent_ticks,
    quantile,
    value_ticks,
)
from polar_ray.report.wording import decimal, duration, meanings, number, percent, plural

NAMED_INPUTS = 3
"""Inputs named at the head of the page; of the others it gives the number."""

COIN = 0.5


def write_report(found: Evaluation) -> str:
    """The page, as HTML that is well-formed XML too. Changes nothing and reads nothing but its template."""
    names = [PurePosixPath(url).name for url in found.inputs]
    return render_page(
        "polar_ray.evaluation",
        found=found,
        named_inputs=names[:NAMED_INPUTS],
        more_inputs=number(max(0, len(names) - NAMED_INPUTS)),
        notices=[
            text
            for text, is_so in ((FAKE, found.settings.engine.kind == "fake"), (UNTRAINED, found.untrained))
            if is_so
        ][:1],
        tiles=_tiles(found),
        account=account(found),
        methods=_methods(found, [found.total]),
        figures=[_reliability(found), _margins(found), _by_length_ratio(found), _by_length(found)],
        best_of=_best_of(found) if found.best_of else None,
        best_of_table=_best_of_table(found) if found.best_of else None,
        by=[
            (_forest(column, blocks), _methods(found, blocks))
            for column in found.settings.by
            if (blocks := [block for block in found.by if block.column == column])
        ],
        failures=_failures(found),
        counts=_counts(found),
    )


def _tiles(found: Evaluation) -> list[Tile]:
    total, model, strongest = found.total, found.total.methods[0], rival(found.total)
    interval = span(model.accuracy_interval)
    tiles = [
        Tile("accuracy", share(model.accuracy), f"95 % CI {interval}" if interval != NONE else "no interval"),
        Tile("strongest baseline", share(strongest.accuracy), strongest.title) if strongest else None,
        Tile("model's lead", _ahead(strongest.lead), f"points {lead(strongest).partition(' ')[2]}")
        if strongest
        else None,
        Tile(
            "pairs",
            number(total.pairs),
            f"{plural(total.groups, 'group')}, {number(total.unscored_pairs)} pairs not scored",
        ),
        Tile("AUC", coefficient(model.auc), f"95 % CI {coefficient_span(model.auc_interval)}") if model.auc else None,
        Tile("Spearman", coefficient(model.spearman), "mean over groups") if model.spearman is not None else None,
        Tile("receipt", found.receipt_id[:12], "same receipt, comparable rewards"),
    ]
    return [tile for tile in tiles if tile is not None]


def _ahead(points: float | None) -> str:
    return NONE if points is None else f"{100 * points:+.1f}".replace("-", "−")


def _methods(found: Evaluation, blocks: Sequence[Block]) -> Table:
    """The table of methods; with several blocks each has a line of its own above its methods."""
    head = table_head(found)
    rows = []
    for block in blocks:
        if block.column is not None:
            note = f", {block.unscored_pairs:,} not scored" if block.unscored_pairs else ""
            rows.append(TableRow(f"{block.value}{note}", [""] * (len(head) - 1), "gap first"))
        if block.column is not None and not block.rows:
            continue
        for place, (title, *cells) in enumerate(table_lines(found, block)):
            rows.append(TableRow(title, cells, "first" if place == 0 and block.column is None else ""))
    return Table(head, rows)


def _best_of_table(found: Evaluation) -> Table:
    head, lines = best_of_table(found)
    return Table(
        head, [TableRow(title, cells, "first" if place == 0 else "") for place, (title, *cells) in enumerate(lines)]
    )


def _reliability(found: Evaluation) -> Figure:
    title = "Reliability"
    if found.reliability is None:
        return Figure(title, Markup(""), "No pair could be scored.")
    points = [
        Point(
            some.mean_x,
            some.accuracy,
            _bounds(some.interval),
            f"predicted {percent(some.mean_x)}, right {percent(some.accuracy)} of {number(some.pairs)} pairs"
            + _with_interval(some.interval),
        )
        for some in found.reliability.bins
    ]
    low = min([COIN, *(point.y for point in points), *(point.interval[0] for point in points if point.interval)])
    bottom = max(0.0, math.floor(low * 10) / 10)
    drawing = draw_chart(
        [Series("model", points)],
        title="Reliability: predicted against observed accuracy",
        axis="predicted: sigmoid of the margin's size",
        x_range=(0.5, 1.0),
        y_range=(bottom, 1.0),
        x_ticks=percent_ticks(0.5, 1.0, 6),
        guide=((0.5, 0.5), (1.0, 1.0)),
    )
    note = (
        "How sure the model is of its choice, and how often the choice is right. On the dashed line the two agree; "
        f"below it the model is too sure. Expected calibration error {100 * found.reliability.ece:.1f} points."
    )
    return Figure(title, drawing, note)


def _margins(found: Evaluation) -> Figure:
    title = "Margins"
    if not found.margin_bins:
        return Figure(title, Markup(""), "No pair could be scored.")
    width, model = found.margin_bin, found.total.methods[0]
    bars = gather(found.margin_bins)
    middle = quantile(found.margin_bins, 0.5) * width
    drawing = draw_histogram(
        bars,
        title="Histogram of margins",
        axis=f"reward of the better output less that of the worse, in steps of {bars.step * width:g}",
        ticks=lambda low, high: value_ticks(low, high, width),
        describe=lambda start, stop: f"{decimal(start * width)} to {decimal(stop * width)}",
        counted="pairs",
        markers={"median": middle / width} if bars.first <= middle / width <= bars.last else {},
        threshold=0,
    )
    tails = f" The pale end bars also hold {number(bars.below + bars.above)} pairs further out." * bool(
        bars.below + bars.above
    )
    note = f"Below 0 the worse output has the higher reward. Mean {decimal(model.mean_margin or 0.0)}.{tails}"
    legend = (("wrong", "wrong"), ("right", "right"), ("median", f"median ≈ {decimal(middle)}"))
    return Figure(title, drawing, note, legend)


def _by_length_ratio(found: Evaluation) -> Figure:
    note = (
        "A model that only prefers length is near 0 on the left, where the better output is the shorter one, and near "
        "100 % on the right."
    )
    return _accuracy_by(
        "Accuracy by length ratio", found.by_length_ratio, "better output's length over the worse's", _ratio, note
    )


def _by_length(found: Evaluation) -> Figure:
    note = "By the characters of a pair's outputs, on average of the two."
    return _accuracy_by("Accuracy by length", found.by_length, "characters of an output, at least", _length, note)


def _accuracy_by(title: str, bins: Sequence[Bin], axis: str, label: Callable[[Bin], str], note: str) -> Figure:
    """Accuracy in bins that stand side by side, each as wide as the next."""
    if not bins:
        return Figure(title, Markup(""), "No pair could be scored.")
    points = [
        Point(
            place + 0.5,
            some.accuracy,
            _bounds(some.interval),
            f"{_range(some)}: {percent(some.accuracy)} of {number(some.pairs)} pairs{_with_interval(some.interval)}",
        )
        for place, some in enumerate(bins)
    ]
    stride = math.ceil(len(bins) / 8)
    ticks = [(place + 0.5, label(some)) for place, some in enumerate(bins) if place % stride == 0]
    drawing = draw_chart(
        [Series("model loose", points)],
        title=title,
        axis=axis,
        x_range=(0.0, float(len(bins))),
        y_range=(0.0, 1.0),
        x_ticks=ticks,
        guide=((0.0, COIN), (float(len(bins)), COIN)),
    )
    return Figure(title, drawing, f"{note} The dashed line is a coin's accuracy.")


def _ratio(some: Bin) -> str:
    if some.low is None:
        return f"<{some.high:g}"
    return f">{some.low:g}" if some.high is None else f"{some.low:g}–{some.high:g}"


def _length(some: Bin) -> str:
    return number(some.low or 0.0)


def _range(some: Bin) -> str:
    if some.low is None:
        return f"below {some.high:g}"
    return f"above {some.low:g}" if some.high is None else f"{number(some.low)} to {number(some.high)}"


def _best_of(found: Evaluation) -> Figure:
    strongest = rival(found.total)
    rows = found.best_of
    single = rows[0].random
    tops = [row.oracle for row in rows]

    def curve(kind: str, name: str, values: Sequence[ValueAt]) -> Series:
        start = Point(0.0, single, None, f"one at random: {decimal(single)}")
        points = [
            Point(math.log2(row.n), at.value, _bounds(at.interval), f"{name}, best of {row.n}: {decimal(at.value)}")
            for row, at in zip(rows, values, strict=True)
        ]
        return Series(kind, [start, *points])

    series = [curve("bound", "by label", [ValueAt(value=top, interval=None) for top in tops])]
    if strongest is not None:
        series.append(curve("rival", strongest.title, [row.methods[strongest.name] for row in rows]))
    series.append(curve("model", "model", [row.methods[MODEL.name] for row in rows]))
    lowest, highest = found.label_range or (0.0, 1.0)
    share_of = _rescaled(series, lowest, highest)
    drawing = draw_chart(
        share_of,
        title="Best of n",
        axis="n, outputs to pick from",
        x_range=(-0.1, math.log2(rows[-1].n) + 0.1),
        y_range=_padded([point.y for some in share_of for point in some.points]),
        x_ticks=[(0.0, "1"), *((math.log2(row.n), f"{row.n}") for row in rows)],
        guide=None,
    )
    legend = [("model", "model"), *([("rival", strongest.title)] if strongest else []), ("bound", "picked by label")]
    note = best_of_note(rows)
    if (lowest, highest) != (0.0, 1.0):
        note += f" 0 % is the lowest label, {decimal(lowest)}, 100 % the highest, {decimal(highest)}."
    return Figure("Best of n", drawing, note, tuple(legend))


def _rescaled(series: Sequence[Series], lowest: float, highest: float) -> list[Series]:
    """Labels as shares of the way from the lowest to the highest."""

    def at(value: float) -> float:
        return (value - lowest) / (highest - lowest)

    return [
        Series(
            kind,
            [
                point._replace(
                    y=at(point.y),
                    interval=None if point.interval is None else (at(point.interval[0]), at(point.interval[1])),
                )
                for point in points
            ],
        )
        for kind, points in series
    ]


def _padded(values: Sequence[float]) -> tuple[float, float]:
    """A range of shares with room around the values, between 0 and 1, and never empty."""
    low, high = max(0.0, min(values) - 0.05), min(1.0, max(values) + 0.05)
    return math.floor(20 * low) / 20, math.ceil(20 * high) / 20


def _forest(column: str, blocks: Sequence[Block]) -> Figure:
    title = f"Accuracy by {column}"
    rows = []
    for block in blocks:
        model, strongest = block.methods[0], rival(block)
        if model.accuracy is None or strongest is None or strongest.accuracy is None:
            continue
        words = f"{block_title(block)}: model {share(model.accuracy)}{_with_interval(model.accuracy_interval)}"
        rows.append(
            ForestRow(
                str(block.value),
                f"{share(model.accuracy)} of {number(block.pairs)}",
                model.accuracy,
                _bounds(model.accuracy_interval),
                {"rival": strongest.accuracy},
                f"{words}; {strongest.title} {share(strongest.accuracy)}",
            )
        )
    if not rows:
        return Figure(title, Markup(""), "No pair could be scored.")
    reached = [at for row in rows for at in (row.value, *row.marks.values(), *(row.interval or ()))]
    drawing = draw_forest(rows, title=title, axis="pair accuracy", x_range=_padded([COIN, *reached]), guide=COIN)
    legend = (("model", "model, 95 % CI"), ("rival", "strongest baseline"))
    return Figure(title, drawing, "The dashed line is a coin's accuracy.", legend)


def _bounds(interval: Interval | None) -> tuple[float, float] | None:
    return None if interval is None else (interval.low, interval.high)


def _with_interval(interval: Interval | None) -> str:
    return "" if interval is None else f" (95 % CI {span(interval)})"


def _failures(found: Evaluation) -> list[Share]:
    meaning_of, total = meanings(), sum(found.by_status.values())
    return [
        Share(code, count / total, f"{count:,} ({percent(count / total)})", meaning_of.get(code, ""))
        for code, count in found.failed.items()
    ]


def _counts(found: Evaluation) -> dict[str, str]:
    saved = 1 - found.computed_tokens / found.tokens if found.tokens else 0.0
    return {
        "layout": found.layout,
        "input rows": f"{found.input_rows:,}",
        **({"rows without a label, not scored": f"{found.unlabelled_rows:,}"} if found.layout == "triples" else {}),
        **{f"outputs, {code}": f"{count:,}" for code, count in sorted(found.by_status.items())},
        "pairs scored": f"{found.total.pairs:,}",
        "pairs not scored": f"{found.total.unscored_pairs:,}",
        "pairs of equal outputs": f"{found.equal_pairs:,}",
        "groups": f"{found.total.groups:,}",
        "tokens": f"{found.tokens:,}",
        "tokens computed": f"{found.computed_tokens:,} ({percent(max(0.0, saved))} saved by sharing)",
        "bootstrap": f"{found.settings.resamples:,} resamples, seed {found.settings.seed}",
        "time": duration(found.seconds),
    }
