"""The drawings of a job's report: numbers in, SVG text out.

Every drawing has the same frame, so that its text stays readable when a phone shows it at three quarters of its size.
Colours come from the page's style sheet, by class.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

from polar_ray.corpus.history import Floats, Trace
from polar_ray.corpus.wording import SPACE, duration, number

WIDTH, HEIGHT = 480.0, 236.0
LEFT, RIGHT, TOP, BOTTOM = 56.0, 466.0, 10.0, 186.0
"""Edges of the area inside the axes."""

MOST_BARS = 64
FEWEST_BARS = 12
"""A histogram leaves room for so many, lest one bar fill the whole width."""

TAIL_SHARE = 0.005
"""Of the rows, on either side, that may lie so far out that the end bars hold them."""

PAUSE_WIDTH = 12.0

TIME_STEPS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400)
TIME_UNITS_S = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


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
) -> Markup:
    """A histogram. Positions are in bins: `ticks` gives (position, label) between two, `describe` words a bar's range.

    `markers` are vertical lines by class. `base` counts of the first bar are drawn in another colour, beneath the
    others. Nothing below `floor` is on the axis.
    """
    spare = max(0, FEWEST_BARS - len(bars.counts)) * bars.step / 2
    low, high = bars.first - spare, bars.last + spare
    if floor is not None and low < floor:
        low, high = floor, high + floor - low
    x, top = _scale(low, high, LEFT, RIGHT), max(bars.counts)
    y = _scale(0, top, BOTTOM, TOP)
    parts = [_y_axis(top, whole=True), *_x_axis([(x(place), label) for place, label in ticks(low, high)], axis)]
    for index, count in enumerate(bars.counts):
        start = bars.first + index * bars.step
        left, right = x(start) + 0.5, x(start + bars.step) - 0.5
        is_tail = (index == 0 and bars.below > 0) or (index == len(bars.counts) - 1 and bars.above > 0)
        shapes = [_box(left, y(count), right, BOTTOM, "tail" if is_tail else "bar")] if count else []
        if index == 0 and base:
            shapes.append(_box(left, y(base), right, BOTTOM, "base"))
        words = f"{describe(start, start + bars.step)}{' and beyond' if is_tail else ''}: {count:,} {counted}"
        parts.append(_hoverable(words, _box(left, TOP, right, BOTTOM, "hit"), *shapes))
    for kind, place in (markers or {}).items():
        parts.append(_line(x(place), TOP, x(place), BOTTOM, f"marker {kind}"))
    return _svg(title, *parts)


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


class Area(NamedTuple):
    """A rate for each bucket of a history: its style class, its unit and its values."""

    kind: str
    unit: str
    rates: Floats


def draw_rates(history: Trace, areas: Sequence[Area], *, title: str) -> Markup:
    """Areas over the time that was worked, from back to front."""
    top = max(float(area.rates.max()) for area in areas) or 1.0
    pauses = history.pauses > 0
    widths = history.ends - history.starts
    scale = (RIGHT - LEFT - PAUSE_WIDTH * pauses.sum()) / widths.sum()
    worked = np.append(0.0, np.cumsum(widths))
    shifts = PAUSE_WIDTH * np.append(0.0, np.cumsum(pauses)[:-1])
    lefts, rights = LEFT + scale * worked[:-1] + shifts, LEFT + scale * worked[1:] + shifts
    ticks = [
        (float(LEFT + scale * moment + shifts[np.searchsorted(worked[1:-1], moment)]), label)
        for moment, label in time_ticks(float(worked[-1]))
    ]
    y = _scale(0, top, BOTTOM, TOP)
    parts = [_y_axis(top), *_x_axis(ticks, "time at work")]
    for area in areas:
        heights = [y(rate) for rate in area.rates.tolist()]
        parts.append(_element("path", d=_skyline(lefts.tolist(), rights.tolist(), heights), class_=area.kind))
    for index, (left, right) in enumerate(zip(lefts, rights, strict=True)):
        rates_here = ", ".join(f"{number(float(area.rates[index]))} {area.unit}" for area in areas)
        parts.append(_hoverable(f"{clock(history.starts[index])}: {rates_here}", _box(left, TOP, right, BOTTOM, "hit")))
        if pauses[index]:
            words = f"no work for {duration(history.pauses[index])}"
            parts.append(_hoverable(words, _box(right, TOP, right + PAUSE_WIDTH, BOTTOM, "pause")))
    return _svg(title, *parts)


def _skyline(lefts: Sequence[float], rights: Sequence[float], heights: Sequence[float]) -> str:
    """The outline of columns, those that touch as one shape: shapes side by side would show a seam."""
    outline, reached = "", -math.inf
    for left, right, height in zip(lefts, rights, heights, strict=True):
        if left > reached + 0.01:
            outline += (f"V{BOTTOM}" if outline else "") + f"M{left:.1f} {BOTTOM}"
        outline += f"V{height:.1f}H{right:.1f}"
        reached = right
    return f"{outline}V{BOTTOM}"


def time_ticks(seconds: float) -> list[tuple[float, str]]:
    """Round moments from 0 to `seconds`, and how they are written, in one unit."""
    if seconds < 5:
        return [(value, f"{label}{SPACE}s") for value, label in round_ticks(0, seconds, 5)]
    days = (86400 * factor * 10**power for power in range(9) for factor in (1, 2, 5))
    step = next(step for step in (*TIME_STEPS_S, *days) if seconds / step <= 6)
    size, unit = next((size, unit) for size, unit in TIME_UNITS_S if step >= size)
    return [(moment, f"{moment / size:g}{SPACE}{unit}") for moment in range(0, math.floor(seconds) + 1, step)]


def clock(unix_time: float) -> str:
    """A Unix time as a date and a time of day, UTC."""
    return datetime.fromtimestamp(unix_time, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _scale(low: float, high: float, start: float, stop: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (stop - start)


def _y_axis(top: float, *, whole: bool = False) -> Markup:
    y = _scale(0, top, BOTTOM, TOP)
    parts = []
    for value, label in round_ticks(0, top, 5, finest=1.0 if whole else 0.0):
        parts.append(_line(LEFT, y(value), RIGHT, y(value), "grid"))
        parts.append(_element("text", label, x=LEFT - 8, y=y(value) + 4, class_="end"))
    return Markup("").join(parts)


def _x_axis(ticks: Sequence[tuple[float, str]], name: str) -> list[Markup]:
    labels = [_element("text", label, x=x, y=BOTTOM + 19, class_="mid") for x, label in ticks]
    marks = [_line(x, BOTTOM, x, BOTTOM + 5, "axis") for x, _ in ticks]
    return [
        *marks,
        _line(LEFT, BOTTOM, RIGHT, BOTTOM, "axis"),
        *labels,
        _element("text", name, x=(LEFT + RIGHT) / 2, y=BOTTOM + 41, class_="mid name"),
    ]


def _svg(title: str, *parts: Markup) -> Markup:
    return _element("svg", *parts, viewBox=f"0 0 {WIDTH:g} {HEIGHT:g}", role="img", aria_label=title)


def _hoverable(words: str, *shapes: Markup) -> Markup:
    return _element("g", _element("title", words), *shapes)


def _box(left: float, top: float, right: float, bottom: float, kind: str) -> Markup:
    return _element("rect", x=left, y=top, width=max(right - left, 0.3), height=max(bottom - top, 0.0), class_=kind)


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return _element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=kind)


def _element(name: str, *inside: str, **attributes: str | float) -> Markup:
    """An XML element; text and attribute values are escaped, numbers shortened to what can be seen."""
    written = [
        Markup(' {}="{}"').format(
            key.rstrip("_").replace("_", "-"), value if isinstance(value, str) else f"{value:.1f}"
        )
        for key, value in attributes.items()
    ]
    return Markup("<{0}{1}>{2}</{0}>").format(name, Markup("").join(written), Markup("").join(inside))
