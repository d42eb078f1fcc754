"""Numbers and durations, worded for people: on the terminal and in the report."""

from __future__ import annotations

SPACE = "\u202f"
"""Narrow and unbreakable, between a number and its unit."""

SIZES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def number(value: float) -> str:
    """A number in at most three digits: 950, 12.3 k, 4.1 M. Exact below a thousand if it is whole."""
    for size, suffix in SIZES:
        if size * 0.9995 <= abs(value) < 1e15:
            return f"{value / size:.3g}{SPACE}{suffix}".replace("-", "−")
    return f"{value:.3g}".replace("-", "−")


def percent(share: float) -> str:
    """A share in percent; what is not all, or not nothing, is never rounded to it."""
    if 0 < share < 0.001:
        return f"<{SPACE}0.1{SPACE}%"
    if 0.999 < share < 1:
        return f">{SPACE}99.9{SPACE}%"
    return f"{100 * share:.0f}{SPACE}%" if share in (0, 1) else f"{100 * share:.1f}{SPACE}%"


def decimal(value: float) -> str:
    """A reward with two decimals; a huge one as a number in three digits."""
    return number(value) if abs(value) >= 10_000 else f"{value:.2f}".replace("-", "−")


def duration(seconds: float) -> str:
    """A duration for people: 42 s, 3 min 20 s, 5 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
