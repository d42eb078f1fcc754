"""Servers of other engines: one of the actor's own, started and ended with it, and the HTTP that speaks to any."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from polar_ray.client.address import base_url, credentials, shown
from polar_ray.config import engine_token
from polar_ray.engines import guard
from polar_ray.errors import EngineError, EngineProtocolError, EngineStartError, EngineUnavailable, ProcessCrashed

RUNNING_DEADLINE_S = 900.0
"""A server that runs already may be away this long, as one that is redeployed; the same as of our own endpoints."""

REPLY_S = 900.0
"""For one batch: a CPU takes minutes for a long one."""

POLL_S = 0.25
TAIL_LINES = 12
"""Of a server's log, in the error that says why it did not come up."""

BUSY = (429, 502, 503, 504)
"""What a server, or a proxy before it, answers when it is not the request's fault."""


class OwnServer:
    """A server process beside this one. It ends with this one, however that ends, with all that it has started."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, name: str) -> None:
        self._process: subprocess.Popen[bytes] | None = process
        self._log = log
        self._name = name

    @classmethod
    def start(
        cls,
        command: Sequence[str],
        *,
        name: str,
        is_ready: Callable[[], bool],
        timeout_s: float,
        environment: Mapping[str, str] | None = None,
    ) -> OwnServer:
        """Run `command` with `environment` added to this process's, and wait until `is_ready`.

        Raises `EngineStartError`, with the end of the server's log, if it ends before or is not ready in `timeout_s`.
        """
        descriptor, path = tempfile.mkstemp(prefix=f"polar_ray-{name}-", suffix=".log")
        with os.fdopen(descriptor, "wb") as log:
            process = subprocess.Popen(
                [sys.executable, guard.__file__, *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
            )
        server = cls(process, Path(path), name)
        deadline = time.monotonic() + timeout_s
        try:
            while not is_ready():
                if not server.is_running():
                    raise EngineStartError(f"{name}'s server ended with status {process.returncode}: {server._tail()}")
                if time.monotonic() > deadline:
                    raise EngineStartError(
                        f"{name}'s server is not ready after {timeout_s:g} s; raise engine.start_timeout_s if it still "
                        f"loads: {server._tail()}"
                    )
                time.sleep(POLL_S)
        except BaseException:
            server.close()
            raise
        return server

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def close(self) -> None:
        """End it and everything that it has started, and return when they are gone. May be called twice."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
        self._log.unlink(missing_ok=True)

    def _tail(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()
        return "\n".join(["its log ends:", *lines[-TAIL_LINES:]]) if lines else "it has logged nothing"


class EngineHttp:
    """JSON to and from an engine's server.

    One that runs already and is away is waited for; one of our own that has ended is not, for only a new process brings
    it back.
    """

    def __init__(self, address: str, *, name: str, own: OwnServer | None = None) -> None:
        """`address` as people write it, host:port or a URL; a token comes from POLAR_RAY_ENGINE_TOKEN. With `own`, the
        server there is ended by `close`. Raises `ConfigError`."""
        url = base_url(address)
        self._address = shown(url)
        self._name = name
        self._own = own
        self._has_ended = False
        headers = credentials(url, engine_token() if own is None else None)
        self._client = httpx.Client(base_url=url, headers=headers, timeout=REPLY_S, trust_env=False)

    def answers(self, path: str) -> bool:
        """Whether a GET of `path` is answered with success, just now."""
        try:
            return self._client.get(path, timeout=5.0).is_success
        except httpx.HTTPError:
            return False

    def get(self, path: str) -> Any:
        """The JSON at `path`. Raises as `post`."""
        return self._ask("GET", path, None)

    def post(self, path: str, body: Any) -> Any:
        """The reply's JSON.

        Raises `EngineUnavailable` where a server that runs already does not answer within `RUNNING_DEADLINE_S`,
        `ProcessCrashed` where our own has ended, `EngineError` where the request failed, `EngineProtocolError` for a
        reply that is no JSON and for a path that is not there.
        """
        return self._ask("POST", path, body)

    def is_running(self) -> bool:
        """Whether our own server is there; one that runs already may come back, so it is. Safe in any thread."""
        return self._own is None or (not self._has_ended and self._own.is_running())

    def close(self) -> None:
        """May be called twice."""
        self._client.close()
        if self._own is not None:
            self._own.close()

    def _ask(self, method: str, path: str, body: Any) -> Any:
        retry = Retrying(
            retry=retry_if_exception_type(EngineUnavailable),
            stop=stop_after_delay(RUNNING_DEADLINE_S),
            wait=wait_random_exponential(multiplier=0.5, max=15),
            reraise=True,
        )
        return retry(self._ask_once, method, path, body)

    def _ask_once(self, method: str, path: str, body: Any) -> Any:
        if self._client.is_closed:
            raise EngineError("the engine is closed; load it again")
        try:
            reply = self._client.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise self._away(type(error).__name__) from None
        if reply.status_code in BUSY:
            raise self._away(f"status {reply.status_code}")
        if reply.status_code in (401, 403):
            raise EngineProtocolError(f"{self._name} at {self._address} wants a token; set POLAR_RAY_ENGINE_TOKEN")
        if reply.status_code == 404:
            raise EngineProtocolError(
                f"{self._name} at {self._address} has no {path}: another kind of server, or another version or model"
            )
        if not reply.is_success:
            raise EngineError(f"{self._name} answered {reply.status_code}: {_first_line(reply.text)}")
        try:
            return reply.json()
        except ValueError:
            raise EngineProtocolError(f"{self._name} at {self._address} answered {path} with no JSON") from None

    def _away(self, why: str) -> EngineError:
        if self._own is None:
            return EngineUnavailable(f"{self._name} at {self._address} does not answer ({why})")
        if self._own.is_running() and self._is_listening():
            return EngineError(f"{self._name}'s server failed on a batch ({why})")
        self._has_ended = True
        return ProcessCrashed(f"{self._name}'s server has ended; a new process starts it again")

    def _is_listening(self) -> bool:
        """At once, where the guard of a server that was killed still waits for what the server has started."""
        url = self._client.base_url
        try:
            socket.create_connection((url.host, url.port or 80), timeout=5.0).close()
        except OSError:
            return False
        return True


def free_address() -> str:
    """A port of the loopback that nobody listens at just now, as host:port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"127.0.0.1:{free.getsockname()[1]}"


def _first_line(text: str) -> str:
    return (text.strip() or "nothing").splitlines()[0][:300]
