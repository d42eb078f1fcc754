"""`polar-ray`: one file per verb; here they come together, and errors become sentences and exit codes."""

from __future__ import annotations

import sys
from typing import Annotated

import click
import typer
from rich.console import Console

from polar_ray.cli import bench
from polar_ray.cli.inspect import inspect
from polar_ray.cli.rank import rank
from polar_ray.cli.score import score
from polar_ray.errors import PolarRayError

INTERRUPTED = 130
"""The shell's exit code for Ctrl-C: 128 and SIGINT."""

WRONG_USAGE = 2

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Score text with POLAR reward models: how close an output is to what the author of a reference would write.",
)
app.command()(score)
app.command()(rank)
app.command()(inspect)
app.add_typer(bench.app, name="bench")


@app.callback()
def options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    context.obj = {"debug": debug}


def main() -> None:
    """Run the command line. Exit code 0: done, 1: a run failed, 2: something must be changed first, 130: Ctrl-C."""
    complaints = Console(stderr=True, highlight=False)
    try:
        code = app(standalone_mode=False)
    except PolarRayError as error:
        if "--debug" in sys.argv:
            raise
        complaints.print(f"[bold red]error[/] ({error.code}): ", end="")
        complaints.print(str(error), markup=False, soft_wrap=True)
        code = error.exit_code
    except click.ClickException as error:
        error.show()
        code = WRONG_USAGE
    except (KeyboardInterrupt, click.Abort):
        code = INTERRUPTED
    raise SystemExit(code)
