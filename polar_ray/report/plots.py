"""The drawings of a report: numbers in, SVG text out.

Every drawing has the same frame, so that its text stays readable when a phone shows it at three quarters of its size.
Colours come from the page's style sheet, by class.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from markupsafe import Markup

from polar_ray.report.wording import SPACE, number

WIDTH, HEIGHT = 480.0, 236.0
LEFT, RIGHT, TOP, BOTTOM = 56.0, 466.0, 10.0, 186.0
"""Edges of the area inside the axes."""

MOST_BARS = 64
FEWEST_BARS = 12
"""A histogram leaves room for so many, lest one bar fill the whole width."""

TAIL_SHARE = 0.005
"""Of the rows, on either side, that may lie so far out that the end bars hold them."""


@dataclass(frozen=True)
class Bars:
    """A histogram as it is drawn: bar `i` holds bins `first + i * step` to the next, the end bars the tails as well."""

    first: int
    step: int
    counts: list[int]
    below: int = 0
    above: int = 0

    @property
    def last(self) -> int:
        """Where the last bar ends, in bins."""
        return self.first + self.step * len(self.counts)


def gather(bins: Mapping[int, int]) -> Bars:
    """Bins (at least one) as at most `MOST_BARS` bars: far tails put into the end bars, then neighbours together."""
    low, high = min(bins), max(bins)
    if high - low >= MOST_BARS:
        low, high = _without_tails(bins)
    step = 1
    while high // step - low // step >= MOST_BARS:
        step *= 2
    first, stop = low // step * step, (high // step + 1) * step
    counts = [0] * ((stop - first) // step)
    for place, count in bins.items():
        counts[(min(max(place, first), stop - 1) - first) // step] += count
    below = sum(count for place, count in bins.items() if place < first)
    above = sum(count for place, count in bins.items() if place >= stop)
    return Bars(first, step, counts, below, above)


def quantile(bins: Mapping[int, int], share: float) -> float:
    """Where `share` of the counts lie below, in bins, taking them as even within a bin."""
    wanted, seen = share * sum(bins.values()), 0
    for place in sorted(bins):
        if seen + bins[place] >= wanted:
            return place + (wanted - seen) / bins[place]
        seen += bins[place]
    return max(bins) + 1.0


def _without_tails(bins: Mapping[int, int]) -> tuple[int, int]:
    """The lowest and highest bin to draw: without those far beyond where all but a few rows lie, or all but one."""
    share = min(max(TAIL_SHARE, 1.5 / sum(bins.values())), 0.25)
    lower, upper = quantile(bins, share), quantile(bins, 1 - share)
    slack = max(MOST_BARS / 8, (upper - lower) / 4)
    inner = [place for place in bins if lower - slack <= place <= upper + slack]
    return min(inner), max(inner)


def draw_histogram(
    bars: Bars,
    *,
    title: str,
    axis: str,
    ticks: Callable[[float, float], list[tuple[float, str]]],
    describe: Callable[[int, int], str],
    counted: str,
    markers: Mapping[str, float] | None = None,
    base: int = 0,
    floor: int | None = None,
    threshold: int | None = None,
) -> Markup:
    """A histogram. Positions are in bins: `ticks` gives (position, label) between two, `describe` words a bar's range.

    `markers` are vertical lines by class. `base` counts of the first bar are drawn in another colour, beneath the
    others. Nothing below `floor` is on the axis. Bars that lie below `threshold` have that other colour as a whole.
    """
    spare = max(0, FEWEST_BARS - len(bars.counts)) * bars.step / 2
    low, high = bars.first - spare, bars.last + spare
    if floor is not None and low < floor:
        low, high = floor, high + floor - low
    x, top = scale(low, high, LEFT, RIGHT), max(bars.counts)
    y = scale(0, top, BOTTOM, TOP)
    parts = [y_axis(top, whole=True), *x_axis([(x(place), label) for place, label in ticks(low, high)], axis)]
    for index, count in enumerate(bars.counts):
        start = bars.first + index * bars.step
        left, right = x(start) + 0.5, x(start + bars.step) - 0.5
        is_tail = (index == 0 and bars.below > 0) or (index == len(bars.counts) - 1 and bars.above > 0)
        kind = "base" if threshold is not None and start < threshold else "bar"
        shapes = [box(left, y(count), right, BOTTOM, f"{kind} tail" if is_tail else kind)] if count else []
        if index == 0 and base:
            shapes.append(box(left, y(base), right, BOTTOM, "base"))
        words = f"{describe(start, start + bars.step)}{' and beyond' if is_tail else ''}: {count:,} {counted}"
        parts.append(hoverable(words, box(left, TOP, right, BOTTOM, "hit"), *shapes))
    for kind, place in (markers or {}).items():
        parts.append(line(x(place), TOP, x(place), BOTTOM, f"marker {kind}"))
    return svg(title, *parts)


class Point(NamedTuple):
    """A figure in a chart, with its interval if it has one, and the words of its tooltip."""

    x: float
    y: float
    interval: tuple[float, float] | None
    words: str


class Series(NamedTuple):
    """Points of one kind, in order of x; the style class says whether and how they are joined."""

    kind: str
    points: Sequence[Point]


def draw_chart(
    series: Sequence[Series],
    *,
    title: str,
    axis: str,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    x_ticks: Sequence[tuple[float, str]],
    guide: tuple[tuple[float, float], tuple[float, float]] | None = None,
) -> Markup:
    """Points with whiskers, shares on the y-axis, drawn from back to front. `guide` is a dashed line between two
    places."""
    x, y = scale(*x_range, LEFT, RIGHT), scale(*y_range, BOTTOM, TOP)
    parts = []
    for value, label in percent_ticks(*y_range, 6):
        parts.append(line(LEFT, y(value), RIGHT, y(value), "grid"))
        parts.append(element("text", label, x=LEFT - 8, y=y(value) + 4, class_="end"))
    parts += x_axis([(x(value), label) for value, label in x_ticks], axis)
    if guide is not None:
        (x1, y1), (x2, y2) = guide
        parts.append(line(x(x1), y(y1), x(x2), y(y2), "guide"))
    for kind, points in series:
        places = " L".join(f"{x(point.x):.1f} {y(point.y):.1f}" for point in points)
        parts.append(element("path", d=f"M{places}", class_=f"curve {kind}"))
        for point in points:
            parts.append(hoverable(point.words, *_dot(x(point.x), y(point.y), _scaled(point.interval, y), kind)))
    return svg(title, *parts)


class ForestRow(NamedTuple):
    """A figure with its interval on a line of its own; `marks` are further figures, by style class."""

    name: str
    note: str
    value: float
    interval: tuple[float, float] | None
    marks: Mapping[str, float]
    words: str


FOREST_LEFT = 8.0
FOREST_ROW = 44.0
"""Height of a row: a line of text, and the whiskers beneath."""

MOST_NAME_CHARACTERS = 34


def draw_forest(
    rows: Sequence[ForestRow], *, title: str, axis: str, x_range: tuple[float, float], guide: float | None = None
) -> Markup:
    """A row for each figure, names above their whiskers, so that long ones fit on a phone; shares on the x-axis."""
    x, bottom = scale(*x_range, FOREST_LEFT, RIGHT), TOP + FOREST_ROW * len(rows)
    parts = [line(x(value), TOP, x(value), bottom, "grid") for value, _ in percent_ticks(*x_range, 6)]
    if guide is not None:
        parts.append(line(x(guide), TOP, x(guide), bottom, "guide"))
    for place, row in enumerate(rows):
        top = TOP + FOREST_ROW * place
        middle = top + 29
        name = row.name if len(row.name) <= MOST_NAME_CHARACTERS else row.name[: MOST_NAME_CHARACTERS - 1] + "…"
        shapes = [box(FOREST_LEFT, top, RIGHT, top + FOREST_ROW, "hit")]
        if row.interval is not None:
            low, high = (x(value) for value in row.interval)
            shapes.append(line(low, middle, high, middle, "whisker"))
        shapes += [line(x(at), middle - 7, x(at), middle + 7, f"mark {kind}") for kind, at in row.marks.items()]
        shapes.append(element("circle", cx=x(row.value), cy=middle, r=4.5, class_="dot"))
        parts.append(element("text", name, x=FOREST_LEFT, y=top + 14, class_="row"))
        parts.append(element("text", row.note, x=RIGHT, y=top + 14, class_="end"))
        parts.append(hoverable(row.words, *shapes))
    ticks = [
        element("text", label, x=x(value), y=bottom + 19, class_="mid") for value, label in percent_ticks(*x_range, 6)
    ]
    parts += [line(FOREST_LEFT, bottom, RIGHT, bottom, "axis"), *ticks]
    parts.append(element("text", axis, x=(FOREST_LEFT + RIGHT) / 2, y=bottom + 41, class_="mid name"))
    return svg(title, *parts, height=bottom + HEIGHT - BOTTOM)


def _scaled(interval: tuple[float, float] | None, y: Callable[[float], float]) -> tuple[float, float] | None:
    return None if interval is None else (y(interval[0]), y(interval[1]))


def _dot(x: float, y: float, whisker: tuple[float, float] | None, kind: str) -> list[Markup]:
    shapes = [box(x - 9, TOP, x + 9, BOTTOM, "hit")]
    if whisker is not None:
        shapes.append(line(x, whisker[0], x, whisker[1], f"whisker {kind}"))
    return [*shapes, element("circle", cx=x, cy=y, r=4.5, class_=f"dot {kind}")]


def percent_ticks(low: float, high: float, most: int) -> list[tuple[float, str]]:
    """Round shares between two, and how they are written."""
    return [(value / 100, f"{label}{SPACE}%") for value, label in round_ticks(100 * low, 100 * high, most, finest=1.0)]


def value_ticks(low: float, high: float, unit: float) -> list[tuple[float, str]]:
    """Round values between two positions on an axis of bins that are `unit` wide."""
    return [(value / unit, label) for value, label in round_ticks(low * unit, high * unit, 6)]


def octave_ticks(low: float, high: float, bins: int) -> list[tuple[float, str]]:
    """Powers of two between two positions on an axis of `bins` bins an octave."""
    first, last = math.ceil(low / bins), math.floor(high / bins)
    return [(power * bins, number(2.0**power) if power > 16 else f"{2**power:,}") for power in _thinned(first, last, 6)]


def round_ticks(low: float, high: float, most: int, finest: float = 0.0) -> list[tuple[float, str]]:
    """At most about `most` round values from `low` to `high`, no less than `finest` apart, and how they are written."""
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= most)
    step = max(step, finest)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    values = [place * step for place in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    is_large = max(abs(low), abs(high)) >= 1000
    return [(value, number(value) if is_large else f"{value:.{digits}f}".replace("-", "−")) for value in values]


def _thinned(first: int, last: int, most: int) -> list[int]:
    stride = max(1, math.ceil((last - first + 1) / most))
    return list(range(first, last + 1, stride))


def scale(low: float, high: float, start: float, stop: float) -> Callable[[float], float]:
    """From values between `low` and `high` to places between `start` and `stop`."""
    return lambda value: start + (value - low) / (high - low) * (stop - start)


def y_axis(top: float, *, whole: bool = False) -> Markup:
    """Grid lines from 0 to `top` with their labels; `whole` for counts."""
    y = scale(0, top, BOTTOM, TOP)
    parts = []
    for value, label in round_ticks(0, top, 5, finest=1.0 if whole else 0.0):
        parts.append(line(LEFT, y(value), RIGHT, y(value), "grid"))
        parts.append(element("text", label, x=LEFT - 8, y=y(value) + 4, class_="end"))
    return Markup("").join(parts)


def x_axis(ticks: Sequence[tuple[float, str]], name: str) -> list[Markup]:
    """The axis with (place, label) ticks and its name."""
    labels = [element("text", label, x=x, y=BOTTOM + 19, class_="mid") for x, label in ticks]
    marks = [line(x, BOTTOM, x, BOTTOM + 5, "axis") for x, _ in ticks]
    return [
        *marks,
        line(LEFT, BOTTOM, RIGHT, BOTTOM, "axis"),
        *labels,
        element("text", name, x=(LEFT + RIGHT) / 2, y=BOTTOM + 41, class_="mid name"),
    ]


def svg(title: str, *parts: Markup, height: float = HEIGHT) -> Markup:
    """A drawing of the common width."""
    return element("svg", *parts, viewBox=f"0 0 {WIDTH:g} {height:g}", role="img", aria_label=title)


def hoverable(words: str, *shapes: Markup) -> Markup:
    """Shapes with a tooltip."""
    return element("g", element("title", words), *shapes)


def box(left: float, top: float, right: float, bottom: float, kind: str) -> Markup:
    """A rectangle of a style class, never too thin to be seen."""
    return element("rect", x=left, y=top, width=max(right - left, 0.3), height=max(bottom - top, 0.0), class_=kind)


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    """A line of a style class."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=kind)


def element(name: str, *inside: str, **attributes: str | float) -> Markup:
    """An XML element; text and attribute values are escaped, numbers shortened to what can be seen."""
    written = [
        Markup(' {}="{}"').format(
            key.rstrip("_").replace("_", "-"), value if isinstance(value, str) else f"{value:.1f}"
        )
        for key, value in attributes.items()
    ]
    return Markup("<{0}{1}>{2}</{0}>").format(name, Markup("").join(written), Markup("").join(inside))
