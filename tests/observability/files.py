"""The files of `cluster/observability`, and the metrics that they name."""

import json
import re
from pathlib import Path

import yaml

from polar_ray.metrics import SPECS

FOLDER = Path(__file__).parents[2] / "cluster" / "observability"

NAME = re.compile(r"polar_ray_\w+")

SERIES = {series: spec for spec in SPECS for series in spec.series}
"""Every name that a scrape may show."""

CONDITIONAL = {"polar_ray_flops_total", "polar_ray_peak_flops_total"}
"""Not on CPUs."""


def alerts() -> list[dict]:
    groups = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def panels() -> list[dict]:
    return [panel for panel in json.loads((FOLDER / "dashboard.json").read_text())["panels"] if panel["type"] != "row"]


def queries() -> list[str]:
    """Every expression of alerts and dashboard."""
    return [rule["expr"] for rule in alerts()] + [target["expr"] for panel in panels() for target in panel["targets"]]


def names_of(expressions: list[str]) -> set[str]:
    return {name for expression in expressions for name in NAME.findall(expression)}
