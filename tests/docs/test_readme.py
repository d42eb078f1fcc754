"""The README's commands run, and print what it shows."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
README = (PROJECT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
COMMANDS = [body for language, body in BLOCKS if language == "sh"]
PROGRAMS = [body for language, body in BLOCKS if language == "python"]

pytestmark = [pytest.mark.docs, pytest.mark.ray]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A place with the project's jobs in it, where the commands may write."""
    place = tmp_path_factory.mktemp("readme")
    shutil.copytree(PROJECT / "jobs", place / "jobs", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(PROJECT / "Makefile", place)
    return place


def run(command: str, place: Path) -> str:
    """The command's output, with this Python's polar-ray and a terminal as wide as the README's examples."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "COLUMNS": "110", "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        ["bash", "-euc", command], cwd=place, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def without_numbers(text: str) -> str:
    """Words only: numbers and the lengths of bars are the machine's."""
    return re.sub(r"[\s\d.\u2588-\u258f-]+", " ", text).strip()


@pytest.mark.parametrize("command", [body for body in COMMANDS if not body.startswith(("make", "polar-ray serve"))])
def test_a_command_runs(command, copy):
    assert run(command, copy)


@pytest.fixture
def endpoint(copy):
    """Where `polar-ray serve`, as the README has it, answers; on a port that is free."""
    (command,) = [body.strip() for body in COMMANDS if body.startswith("polar-ray serve")]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    binary = Path(sys.executable).parent / "polar-ray"
    said = copy / "said"
    with said.open("wb") as notes:
        server = subprocess.Popen([binary, *command.split()[1:], "--port", str(port)], cwd=copy, stderr=notes)
    deadline = time.monotonic() + 120
    while "Ctrl-C stops it." not in said.read_text():
        assert server.poll() is None, said.read_text()[-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    yield f"127.0.0.1:{port}"
    server.send_signal(signal.SIGINT)
    assert server.wait(60) == 0, said.read_text()[-2000:]


def test_the_clients_program_runs_against_the_endpoint_that_the_readme_starts(endpoint, copy):
    (program,) = [program for program in PROGRAMS if "RewardClient" in program]
    program = program.replace("127.0.0.1:8000", endpoint)
    printed = run(f"{sys.executable} - <<'END'\n{program}\nEND", copy).splitlines()
    assert float(printed[0].strip("[]")) == pytest.approx(1.8949, abs=1e-3)
    assert [" ok " in line for line in printed[1:]] == [True, True]


@pytest.mark.parametrize("program", [program for program in PROGRAMS if "RewardClient" not in program])
def test_a_program_runs(program, copy):
    printed = run(f"{sys.executable} - <<'END'\n{program}\nEND", copy).splitlines()
    assert " ok " in printed[0]
    assert printed[-1].startswith("43 ")


def test_the_demo_is_what_make_says_and_prints_what_is_shown(copy):
    recipe = run("make --dry-run --assume-old=.venv/.installed demo", copy).splitlines()
    commands = [line.removeprefix(".venv/bin/") for line in recipe if line.startswith(".venv/bin/polar-ray")]
    assert [command.split()[1] for command in commands] == ["score", "rank"]
    printed = without_numbers(run("\n".join(commands), copy))
    shown = next(body for language, body in BLOCKS if language == "text" and "capital of China" in body)
    for line in shown.splitlines():
        assert without_numbers(line) in printed


def test_every_make_target_that_is_named_exists():
    targets = set(re.findall(r"^(\w+):", (PROJECT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`make (\w+)`|^make (\w+)$", README, re.MULTILINE))
    assert {first or second for first, second in named} <= targets
    assert {"setup", "demo", "test", "help"} <= targets


def test_every_link_to_a_file_leads_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (PROJECT / target).exists(), target
