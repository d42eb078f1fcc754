"""A report's page: one HTML file that needs nothing else to be read, and the pieces it is made of."""

from __future__ import annotations

from importlib.resources import files
from typing import Any, NamedTuple

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup


class Tile(NamedTuple):
    """One of the large numbers at the head of the page."""

    name: str
    value: str
    note: str


class Figure(NamedTuple):
    """One drawing with its words; `drawing` is empty where there is nothing to draw, and `note` then says why."""

    title: str
    drawing: Markup
    note: str
    legend: tuple[tuple[str, str], ...] = ()
    """(style class, what it stands for) of what needs a key."""


class Share(NamedTuple):
    """A bar of which a part is filled."""

    name: str
    share: float
    value: str
    note: str = ""


class TableRow(NamedTuple):
    """A line of a table: its name, its cells, and its style classes."""

    name: str
    cells: list[str]
    kind: str = ""


class Table(NamedTuple):
    """Figures in columns; the first of `head` stands above the rows' names."""

    head: list[str]
    rows: list[TableRow]


def render_page(package: str, **content: Any) -> str:
    """`report.html` of `package`, which extends `base.html`, with `content`: HTML that is well-formed XML too."""
    own, common = files(package), files("polar_ray.report")
    sources = {
        "report.html": own.joinpath("report.html").read_text("utf-8"),
        **{name: common.joinpath(name).read_text("utf-8") for name in ("base.html", "macros.html")},
    }
    environment = Environment(
        loader=DictLoader(sources), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("report.html").render(**content)
    return page.encode(errors="replace").decode()  # a file's name may hold bytes that are no text
