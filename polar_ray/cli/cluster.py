"""`polar-ray cluster`: what a cluster is told to run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from polar_ray.cli.options import Assignments, ConfigFile
from polar_ray.config import load_config
from polar_ray.errors import ConfigError

app = typer.Typer(no_args_is_help=True, help="Manifests for clusters.")


@app.callback()
def options() -> None:
    """Manifests for clusters."""


@app.command()
def render(
    kind: Annotated[str, typer.Argument(help="serve, score or train.")],
    config: ConfigFile = None,
    assignments: Assignments = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write; left out, print it.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; fail if --output is not what would be written.")
    ] = False,
) -> None:
    """Print the Kubernetes manifests of an endpoint or a job, for KubeRay.

    They are complete but for the secrets, which they name. Settings that
    polar_ray would refuse on the cluster, and engines that fit no node, are
    refused here.

    [dim]polar-ray cluster render serve --set image=registry.example/me/polar-ray:1 | kubectl apply -f -[/]
    [dim]polar-ray cluster render score --set 'inputs=\\["s3://a"]' --set output=s3://b -o score.yaml[/]
    [dim]polar-ray cluster render train --set workers.gpus=4 --set settings.epochs=2[/]
    """
    from polar_ray.deployment.render import SETTINGS
    from polar_ray.deployment.render import render as render_manifests

    settings = next((settings for name, settings in SETTINGS.items() if name == kind), None)
    if settings is None:
        raise ConfigError(f"kind = {kind!r}: expected one of {', '.join(SETTINGS)}")
    text = render_manifests(load_config(settings, config, assignments or ()))
    if check:
        if output is None:
            raise ConfigError("--check: compares with a file; name it with --output")
        if not output.is_file() or output.read_text() != text:
            raise ConfigError(f"{output}: is not what would be rendered now; render it again without --check")
    elif output is None:
        typer.echo(text, nl=False)
    else:
        output.write_text(text)
