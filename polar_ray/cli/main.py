"""`polar-ray`: one file per verb; here they come together, and errors become sentences and exit codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from polar_ray.cli import bench, cluster
from polar_ray.cli.evaluate import evaluate
from polar_ray.cli.inspect import inspect
from polar_ray.cli.plan import plan
from polar_ray.cli.rank import rank
from polar_ray.cli.score import score
from polar_ray.cli.serve import serve
from polar_ray.cli.train import train
from polar_ray.cli.verify import verify
from polar_ray.errors import PolarRayError


class Verbs(TyperGroup):
    """Runs a verb; an error that polar_ray raised on purpose is one sentence on stderr, not a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except PolarRayError as error:
            if ctx.params["debug"]:
                raise
            complaints = Console(stderr=True, highlight=False, soft_wrap=True)
            complaints.print(f"[bold red]error[/] ({error.code}): ", end="")
            complaints.print(str(error), markup=False)
            raise SystemExit(error.exit_code) from None


app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command()(plan)
app.command()(score)
app.command()(serve)
app.command()(train)
app.command()(rank)
app.command()(evaluate)
app.command()(inspect)
app.command()(verify)
app.add_typer(bench.app, name="bench")
app.add_typer(cluster.app, name="cluster")


@app.callback()
def options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    """Score text with POLAR reward models.

    A reward says how close an output is to what the author of a reference
    would write. Higher is better; only rewards of one model are comparable.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Exit code 0: done, 1: a run failed, 2: something must be changed first, 130: Ctrl-C."""
    app(None if arguments is None else list(arguments), prog_name="polar-ray")
