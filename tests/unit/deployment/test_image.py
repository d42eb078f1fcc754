"""The image: pinned, without root, and made by commands that use the pins."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from polar_ray.deployment.settings import IMAGE_JOBS

PROJECT = Path(__file__).parents[3]
FOLDER = PROJECT / "cluster" / "image"
DOCKERFILE = FOLDER / "Dockerfile"
BIN = Path(sys.executable).parent


def instructions():
    """(instruction, argument) in order, continuation lines joined and comments left out."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [(word, argument.strip()) for word, _, argument in (line.partition(" ") for line in joined.split("\n"))]


def arguments_of(instruction):
    return [argument for word, argument in instructions() if word == instruction]


def pip_commands():
    commands = [part for argument in arguments_of("RUN") for part in argument.split("&&") if "pip" in part]
    return [shlex.split(command) for command in commands]


def pins():
    lines = (PROJECT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_hadolint_has_no_complaint():
    done = subprocess.run([BIN / "hadolint", DOCKERFILE], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_hadolint_would_complain(tmp_path):
    (tmp_path / "Dockerfile").write_text("FROM python:latest\nRUN pip install ray\n")
    assert subprocess.run([BIN / "hadolint", tmp_path / "Dockerfile"], capture_output=True).returncode == 1


def test_the_base_is_pinned_to_a_patch_release():
    (base,) = arguments_of("FROM")
    assert re.fullmatch(r"python:3\.11\.\d+-slim-[a-z]+", base)


def test_everything_is_installed_at_its_pin():
    commands = pip_commands()
    assert len(commands) == 2
    for command in commands:
        assert command[:6] == ["python", "-m", "pip", "install", "--no-cache-dir", "--constraint"]
        assert command[6] == "constraints.txt"
    named = [word for command in commands for word in command[7:] if re.fullmatch(r"[\w-]+", word.lstrip("-"))]
    packages = {word for word in named if not word.startswith("-")}
    assert packages == {"setuptools", "torch"}
    assert packages <= pins().keys()
    assert "--no-build-isolation" in commands[1]  # or a setuptools that no file pins would build the package


def test_the_packages_dependencies_are_pinned():
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    (extras,) = re.findall(r'"\.\[([a-z,]+)\]"', DOCKERFILE.read_text())
    wanted = project["dependencies"] + [
        requirement for extra in extras.split(",") for requirement in project["optional-dependencies"][extra]
    ]
    normal = {re.sub(r"[-_.]+", "-", name).lower() for name in pins()}
    for requirement in wanted:
        name = re.match(r"[\w.-]+", requirement).group()
        assert re.sub(r"[-_.]+", "-", name).lower() in normal, requirement


@pytest.mark.parametrize("variant", ["cpu", "cuda", "tpu"])
def test_a_torch_that_is_not_the_variants_fails_the_build(variant):
    (check,) = [
        part for argument in arguments_of("RUN") for part in argument.split("&&") if "import sys, torch" in part
    ]
    done = subprocess.run(
        [sys.executable, *shlex.split(check.replace("${VARIANT}", variant))[1:]], capture_output=True, text=True
    )
    has = "cuda" if torch.version.cuda else "cpu"
    assert (done.returncode == 0) == (variant == has)
    assert done.stderr == ("" if variant == has else f"VARIANT={variant}, and torch is built for {has}\n")


def test_it_does_not_run_as_root():
    assert arguments_of("USER")[-1] == "1000"
    assert any("--uid 1000" in argument for argument in arguments_of("RUN"))


def test_jobs_are_where_the_manifests_look_for_them():
    folder, _ = arguments_of("WORKDIR")
    assert f"{folder}/jobs" == IMAGE_JOBS
    assert "jobs jobs" in arguments_of("COPY")


@pytest.mark.parametrize("source", ["constraints.txt", "pyproject.toml", "README.md", "LICENSE", "polar_ray", "jobs"])
def test_what_is_copied_is_there_and_reaches_the_builder(source):
    assert source in " ".join(arguments_of("COPY")).split()
    assert (PROJECT / source).exists()
    rules = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in rules
    assert f"!{source}" in rules
