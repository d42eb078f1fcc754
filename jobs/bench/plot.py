"""How many times cheaper than POLAR's own examples each engine is, workload by workload, as a picture.

    python jobs/bench/plot.py jobs/bench/results/engines_small_cpu2.json

Draws what `polar-ray bench engines --output` wrote; the picture lies beside it unless told otherwise.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import typer

matplotlib.use("Agg")

from matplotlib import pyplot

COLOURS = {"torch": "#0b6e4f", "torch-int8": "#6fbf73", "vllm": "#d98324", "sglang": "#7b5ea7"}
OTHER = "#9aa5b1"


def label_of(row: dict[str, Any]) -> str:
    is_padded = row["method"] in ("readme", "sorted")
    return row["method"] if is_padded or row["share_prefixes"] else f"{row['method']}, unshared"


def draw(content: dict[str, Any], picture: Path) -> None:
    """A panel for each workload, a bar for each method: CPU time of `readme` over its own."""
    workloads = list(content["workloads"])
    columns = min(3, len(workloads))
    lines = -(-len(workloads) // columns)
    bars = max(sum(row["workload"] == name for row in content["results"]) for name in workloads)
    figure, panels = pyplot.subplots(
        lines, columns, figsize=(4.2 * columns, (0.9 + 0.27 * bars) * lines), squeeze=False, layout="constrained"
    )
    for panel, name in zip(panels.flat, workloads, strict=False):
        rows = [row for row in content["results"] if row["workload"] == name][::-1]
        speeds = [row["speedup_over_readme"] for row in rows]
        colours = [COLOURS.get(row["method"], OTHER) for row in rows]
        drawn = panel.barh([label_of(row) for row in rows], speeds, color=colours)
        for bar, row in zip(drawn, rows, strict=True):
            bar.set_alpha(1.0 if row["share_prefixes"] or row["method"] in ("readme", "sorted") else 0.45)
        panel.bar_label(drawn, fmt="%.2f", padding=3, fontsize=8)
        panel.set_xlim(0, 1.18 * max(speeds))
        panel.axvline(1, color="#444444", linewidth=0.8, linestyle=":")
        panel.set_title(f"{name}: {content['workloads'][name]['what']}", fontsize=8, loc="left", wrap=True)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in list(panels.flat)[len(workloads) :]:
        panel.set_visible(False)
    figure.suptitle("Times cheaper than padded batches of 8 through transformers, in CPU time", fontsize=10)
    figure.savefig(picture, dpi=110)


def main(
    results: Annotated[Path, typer.Argument(help="JSON of polar-ray bench engines, with readme among the engines.")],
    output: Annotated[Path | None, typer.Option(help="Picture; left out, beside the results.")] = None,
) -> None:
    """Draw a comparison of engines."""
    content = json.loads(results.read_text())
    if not all(row.get("speedup_over_readme") for row in content["results"]):
        raise typer.BadParameter(f"{results}: readme is not among the engines, and nothing to compare with")
    draw(content, output or results.with_suffix(".png"))


if __name__ == "__main__":
    typer.run(main)
