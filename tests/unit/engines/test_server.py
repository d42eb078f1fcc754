"""Servers beside an actor: they come up, say why they do not, and end with whoever started them, however that ends."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

from polar_ray.engines.server import EngineHttp, OwnServer, free_address
from polar_ray.errors import EngineError, EngineProtocolError, EngineStartError, EngineUnavailable, ProcessCrashed

SERVER = textwrap.dedent(
    """
    import http.server, json, subprocess, sys
    host, port = sys.argv[1].split(":")
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "grandchild-of-" + port])

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self, status, body):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            self.answer(200, b"{}")

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            paths = {"/echo": (200, body), "/page": (200, b"<html>"), "/bad": (400, b"token id 9 is no such\\nmore")}
            self.answer(*paths.get(self.path, (404, b"")))

        def log_message(self, *_):
            pass

    http.server.HTTPServer((host, int(port)), Handler).serve_forever()
    """
)


def started(address):
    http = EngineHttp(address, name="demo")
    own = OwnServer.start(
        [sys.executable, "-c", SERVER, address], name="demo", is_ready=lambda: http.answers("/health"), timeout_s=30
    )
    http.close()
    return own


def processes_of(address):
    return [process.pid for process in psutil.process_iter(["cmdline"]) if mentions(process, address)]


def mentions(process, address):
    words = process.info["cmdline"] or []
    return address in words or f"grandchild-of-{address.split(':')[1]}" in words


def gone_within(address, seconds):
    deadline = time.monotonic() + seconds
    while processes_of(address) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not processes_of(address)


@pytest.fixture
def address():
    return free_address()


def test_close_leaves_no_process(address):
    own = started(address)
    assert len(processes_of(address)) == 3  # the guard, the server and what the server has started
    own.close()
    assert not processes_of(address)
    assert not own.is_running()
    own.close()


def test_a_server_that_does_not_come_up_says_why(address):
    with pytest.raises(EngineStartError, match=r"demo's server ended with status 3: .*\nno such device"):
        OwnServer.start(
            [sys.executable, "-c", "print('no such device'); raise SystemExit(3)"],
            name="demo",
            is_ready=lambda: False,
            timeout_s=30,
        )


def test_a_server_that_takes_too_long_is_ended(address):
    with pytest.raises(EngineStartError, match=r"not ready after 0\.5 s; raise engine\.start_timeout_s"):
        OwnServer.start(
            [sys.executable, "-c", "import time; time.sleep(600)", address],
            name="demo",
            is_ready=lambda: False,
            timeout_s=0.5,
        )
    assert not processes_of(address)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_it_ends_with_the_process_that_started_it(address, end):
    code = f"from tests.unit.engines.test_server import started; started({address!r}); print('up', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout.readline() == "up\n"
        os.kill(parent.pid, end)
    assert gone_within(address, 15)


def test_a_server_whose_guard_is_killed_ends_too(address):
    own = started(address)
    guard = next(
        pid for pid in processes_of(address) if any("guard.py" in word for word in psutil.Process(pid).cmdline())
    )
    os.kill(guard, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while EngineHttp(address, name="demo").answers("/") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not EngineHttp(address, name="demo").answers("/")
    for pid in processes_of(address):  # what the server itself has started is beyond reach then
        os.kill(pid, signal.SIGKILL)
    own.close()


def test_replies_are_json_or_typed_errors(address):
    own = started(address)
    http = EngineHttp(address, name="demo", own=own)
    assert http.is_running()
    assert http.post("/echo", {"input": [[1, 2]]}) == {"input": [[1, 2]]}
    with pytest.raises(EngineProtocolError, match="answered /page with no JSON"):
        http.post("/page", {})
    with pytest.raises(EngineProtocolError, match="has no /nothing"):
        http.post("/nothing", {})
    with pytest.raises(EngineError, match=r"demo answered 400: token id 9 is no such$"):
        http.post("/bad", {})
    own.close()
    with pytest.raises(ProcessCrashed, match="demo's server has ended; a new process starts it again"):
        http.post("/echo", {})
    assert not http.is_running()
    http.close()
    http.close()
    with pytest.raises(EngineError, match="the engine is closed"):
        http.post("/echo", {})


def test_a_running_server_that_is_away_is_waited_for(address, monkeypatch):
    monkeypatch.setattr("polar_ray.engines.server.RUNNING_DEADLINE_S", 0.5)
    with pytest.raises(EngineUnavailable, match=f"demo at http://{address} does not answer"):
        EngineHttp(address, name="demo").post("/echo", {})
