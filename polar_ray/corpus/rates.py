"""Speeds over time, drawn for a job's report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

from polar_ray.corpus.history import Floats, Trace
from polar_ray.report.plots import (
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    box,
    element,
    hoverable,
    round_ticks,
    scale,
    svg,
    x_axis,
    y_axis,
)
from polar_ray.report.wording import SPACE, clock, duration, number

PAUSE_WIDTH = 12.0

TIME_STEPS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400)
TIME_UNITS_S = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


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
    width_per_s = (RIGHT - LEFT - PAUSE_WIDTH * pauses.sum()) / widths.sum()
    worked = np.append(0.0, np.cumsum(widths))
    shifts = PAUSE_WIDTH * np.append(0.0, np.cumsum(pauses)[:-1])
    lefts, rights = LEFT + width_per_s * worked[:-1] + shifts, LEFT + width_per_s * worked[1:] + shifts
    ticks = [
        (float(LEFT + width_per_s * moment + shifts[np.searchsorted(worked[1:-1], moment)]), label)
        for moment, label in time_ticks(float(worked[-1]))
    ]
    y = scale(0, top, BOTTOM, TOP)
    parts = [y_axis(top), *x_axis(ticks, "time at work")]
    for area in areas:
        heights = [y(rate) for rate in area.rates.tolist()]
        parts.append(element("path", d=_skyline(lefts.tolist(), rights.tolist(), heights), class_=area.kind))
    for index, (left, right) in enumerate(zip(lefts, rights, strict=True)):
        rates_here = ", ".join(f"{number(float(area.rates[index]))} {area.unit}" for area in areas)
        parts.append(hoverable(f"{clock(history.starts[index])}: {rates_here}", box(left, TOP, right, BOTTOM, "hit")))
        if pauses[index]:
            words = f"no work for {duration(history.pauses[index])}"
            parts.append(hoverable(words, box(right, TOP, right + PAUSE_WIDTH, BOTTOM, "pause")))
    return svg(title, *parts)


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
