"""What `polar-ray serve` refuses before Ray starts, and how it looks for its own proxy."""

import socket
import sys

import pytest
from rich.console import Console

from polar_ray.cli import serve
from polar_ray.cli.main import main
from polar_ray.errors import ConfigError
from tests.support.endpoint import running_endpoint, serve_config

TOKEN = "a-token-of-some-length"


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


ipv6 = pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")


@pytest.fixture(autouse=True)
def no_tokens_and_no_ray(monkeypatch):
    monkeypatch.delenv("POLAR_RAY_TOKENS", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)


@pytest.fixture
def port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        number = server.getsockname()[1]
    return number


def begin(**changes):
    with serve.running(serve_config(**changes), Console(stderr=True)):
        pass


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "somewhere"])
def test_an_open_address_without_tokens_is_refused(host, port):
    with pytest.raises(ConfigError, match="open to the network and there are no tokens"):
        begin(http={"host": host, "port": port})


@pytest.mark.parametrize("content", ["", "# tokens, one a line\n\n"], ids=["empty", "comments"])
def test_a_tokens_file_without_a_token_is_refused(capsys, tmp_path, content):
    tokens = tmp_path / "tokens"
    tokens.write_text(content)
    with pytest.raises(SystemExit) as done:
        main(["serve", "--engine", "fake", "--host", "0.0.0.0", "--tokens-file", str(tokens)])
    assert done.value.code == 2
    assert "error (config_invalid): a token is required" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes",
    [
        {"http": {"host": "0.0.0.0"}, "auth": {"mode": "none"}},
        pytest.param({"http": {"host": "::1"}}, marks=ipv6),
        pytest.param({"http": {"host": "::"}}, marks=ipv6),
    ],
    ids=["said so", "loopback", "tokens"],
)
def test_what_may_be_served_gets_as_far_as_ray(monkeypatch, port, changes):
    changes["http"]["port"] = port
    if changes["http"]["host"] == "::":
        monkeypatch.setenv("POLAR_RAY_TOKENS", TOKEN)
    with pytest.raises(ModuleNotFoundError, match="ray"):
        begin(**changes)


@pytest.mark.parametrize(
    ("taken", "host"),
    [
        ("127.0.0.1", "127.0.0.1"),
        pytest.param("::1", "::1", marks=ipv6),
        pytest.param("0.0.0.0", "::", marks=ipv6),
    ],
    ids=["IPv4", "IPv6", "both"],
)
def test_a_port_that_is_taken_is_refused(monkeypatch, taken, host):
    monkeypatch.setenv("POLAR_RAY_TOKENS", TOKEN)
    family = socket.AF_INET6 if ":" in taken else socket.AF_INET
    with socket.create_server((taken, 0), family=family) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"http.port = {port}: cannot listen there \(Address already in use"):
            begin(http={"host": host, "port": port})


def test_the_own_proxy_is_asked_directly(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(serve, "PROXY_SECONDS", 2.0)
    with running_endpoint() as address:
        host, port = address.split(":")
        serve._wait_for_proxy(serve_config(http={"host": host, "port": int(port)}))
