"""Numbers, times and codes, worded for people: on the terminal and in reports."""

from __future__ import annotations

import inspect
from datetime import UTC, datetime

from polar_ray.errors import PolarRayError

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


def plural(count: int, noun: str) -> str:
    """A count with its noun, which takes an s in the plural."""
    return f"{number(count)}{SPACE}{noun}{'' if count == 1 else 's'}"


def clock(unix_time: float) -> str:
    """A Unix time as a date and a time of day, UTC."""
    return datetime.fromtimestamp(unix_time, UTC).strftime("%Y-%m-%d %H:%M:%S")


def meanings() -> dict[str, str]:
    """Code of an error to the first sentence of its class's docstring."""
    found: dict[str, str] = {}
    kinds: list[type[PolarRayError]] = [PolarRayError]
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        text = " ".join((inspect.getdoc(kind) or kind.__name__).split())
        found.setdefault(kind.code, text.replace("`", "").split(". ")[0].rstrip(".") + ".")
    return found
