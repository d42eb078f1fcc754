"""Reward health on a job's page: what was found, and in plain words what it may mean."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from polar_ray.corpus.summary import UnitReport
from polar_ray.corpus.trend import Part
from polar_ray.health import LONG_REFERENCE_CHARACTERS
from polar_ray.report.page import Figure, Share
from polar_ray.report.plots import (
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    box,
    hoverable,
    line,
    round_ticks,
    scale,
    svg,
    x_axis,
    y_axis,
)
from polar_ray.report.wording import decimal, number, percent

SMALL_DRIFT, LARGE_DRIFT = 0.1, 0.25
"""The common rule for the population stability index."""

WEAK_CORRELATION, STRONG_CORRELATION = 0.2, 0.5
"""Of reward and length: where it begins to show in a plot, and where length explains a quarter of the variance."""


def draw_drift(parts: Sequence[Part]) -> Figure:
    """The drift of each part of the corpus from its first."""
    title = "Drift along the corpus"
    if len(parts) < 2:
        return Figure(title, Markup(""), "Too few rows with a reward to hold one part against another.")
    top = max(LARGE_DRIFT * 1.2, *(part.drift for part in parts))
    x, y = scale(parts[0].start, parts[-1].stop, LEFT, RIGHT), scale(0, top, BOTTOM, TOP)
    ticks = [(x(value), label) for value, label in round_ticks(parts[0].start, parts[-1].stop, 5, finest=1)]
    drawn = [
        y_axis(top),
        *x_axis(ticks, "row of the corpus"),
        line(LEFT, y(LARGE_DRIFT), RIGHT, y(LARGE_DRIFT), "guide"),
    ]
    for part in parts:
        left, right = x(part.start) + 0.5, x(part.stop) - 0.5
        words = f"rows {part.start:,} to {part.stop:,}: drift {part.drift:.3f}, mean {decimal(part.mean)}"
        kind = "base" if part.drift > LARGE_DRIFT else "bar"
        drawn.append(
            hoverable(words, box(left, TOP, right, BOTTOM, "hit"), box(left, y(part.drift), right, BOTTOM, kind))
        )
    worst = max(parts, key=lambda part: part.drift)
    note = (
        f"Each part's rewards beside those of rows 0 to {parts[0].stop:,}, by the population stability index: "
        f"{_drift_words(worst.drift)}, at most {worst.drift:.2f} (from row {worst.start:,}, with a mean of "
        f"{decimal(worst.mean)} after {decimal(parts[0].mean)}). A corpus in the order of its sources drifts by itself."
    )
    return Figure(title, svg("Drift of rewards along the corpus", *drawn), note)


def shares_of_health(total: UnitReport) -> list[Share]:
    """What part of rows and groups shows a sign, and what the sign means."""
    health, groups = total.health, total.spread.groups
    signs = [
        (
            "rows cut",
            total.cut_rows,
            total.rows,
            "A reward of a shortened text is about what is left of it; raise the limits, or leave such rows out.",
        ),
        (
            "groups without spread",
            total.spread.zero_groups,
            groups,
            "All outputs have the same reward: the same answers, or a model that cannot tell them apart.",
        ),
        (
            "output is the reference",
            health.equal_echoes,
            health.rows,
            "The answer itself, or a policy that has seen it. The reward model likes nothing better.",
        ),
        (
            "output holds the reference",
            health.contained_echoes,
            health.rows,
            f"All of a reference of {LONG_REFERENCE_CHARACTERS} characters or more, and something else: quoted, or "
            "leaked.",
        ),
        (
            "rows with control tokens",
            total.control_token_rows,
            total.rows,
            f"{number(total.removed_control_tokens)} of the model's own tokens stood in texts and were taken out: an "
            "attempt to forge a reward, or a template that was left in.",
        ),
    ]
    return [
        Share(
            name, count / whole if whole else 0.0, f"{number(count)} ({percent(count / whole)})" if whole else "–", why
        )
        for name, count, whole, why in signs
    ]


def words_of_length(total: UnitReport) -> list[Share]:
    """Whether longer outputs have higher rewards."""
    found = (
        (
            "reward and length, all rows",
            total.health.length.correlation,
            "Questions that want long answers may have rewards of their own.",
        ),
        (
            "reward and length, within groups",
            total.health.length_in_groups.correlation,
            "Among answers to one question: what a policy that is trained on these rewards will follow.",
        ),
    )
    return [
        Share(name, 0.0, "–", "Not known: rewards or lengths do not vary, or an earlier version scored these rows.")
        if value is None
        else Share(name, abs(value), f"r = {decimal(value)}", f"{_correlation_words(value)} {why}")
        for name, value, why in found
    ]


def _drift_words(value: float) -> str:
    if value < SMALL_DRIFT:
        return "no change to speak of"
    return "some change" if value < LARGE_DRIFT else "a large change"


def _correlation_words(value: float) -> str:
    if abs(value) < WEAK_CORRELATION:
        return "Length hardly matters."
    strength = "clearly" if abs(value) >= STRONG_CORRELATION else "somewhat"
    return f"{'Longer' if value > 0 else 'Shorter'} outputs have {strength} higher rewards."
