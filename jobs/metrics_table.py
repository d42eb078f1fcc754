"""Write the table of metrics into cluster/observability/README.md: python jobs/metrics_table.py

A test says when the table is not what this makes of the code's.
"""

from __future__ import annotations

from pathlib import Path

from polar_ray.metrics import SPECS, MetricSpec

FILE = Path(__file__).parents[1] / "cluster" / "observability" / "README.md"

START, END = "<!-- metrics: made by jobs/metrics_table.py -->\n", "<!-- end of metrics -->"

ENDINGS = {"counter": "_total", "gauge": "", "histogram": "_bucket"}


def table() -> str:
    """Markdown, a line for each metric."""
    head = ["| metric | kind | labels | of | what |", "|---|---|---|---|---|"]
    return "\n".join([*head, *map(_line, SPECS)]) + "\n"


def with_table(document: str) -> str:
    """`document` with the table in its place."""
    before, rest = document.split(START)
    _, after = rest.split(END)
    return before + START + table() + END + after


def _line(spec: MetricSpec) -> str:
    labels = ", ".join(f"`{label}`" for label in spec.labels)
    name = f"`{spec.full_name}{ENDINGS[spec.kind]}`"
    return f"| {name} | {spec.kind} | {labels} | {', '.join(spec.places)} | {spec.text} |"


if __name__ == "__main__":
    FILE.write_text(with_table(FILE.read_text()))
