"""A real HTTP server on a loopback port that answers as a script says, and remembers what it was asked."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, dict[str, str], bytes]
"""Status, headers, body."""


def rewards_reply(rewards: list[float | None], receipt_id: str = "r1", **changes: Any) -> Answer:
    """A good reply with these rewards; None is a row that failed."""
    rows = [
        {"index": index, "reward": reward, "status": "ok" if reward is not None else "engine_failed", "detail": None}
        for index, reward in enumerate(rewards)
    ]
    reply = {
        "model": "m",
        "receipt_id": receipt_id,
        "rewards": rows,
        "usage": {"rows": len(rows), "tokens": 0, "computed_tokens": 0},
        "timings": {"encode_s": 0, "queue_s": 0, "engine_s": 0, "total_s": 0},
    }
    return 200, {}, json.dumps({**reply, **changes}).encode()


def error_answer(status: int, code: str, **headers: str) -> Answer:
    body = {"error": {"code": code, "message": "said the server", "retryable": False, "details": {}}}
    return status, {name.replace("_", "-"): value for name, value in headers.items()}, json.dumps(body).encode()


def n_rows(body: dict[str, Any]) -> int:
    """Rows of a request in whichever form."""
    return len(next(body[form] for form in ("triples", "outputs", "ids") if form in body))


def good(body: dict[str, Any]) -> Answer:
    """Rewards that tell their row's output, or the last id of a sequence."""
    if "ids" in body:
        return rewards_reply([float(ids[-1]) for ids in body["ids"]])
    outputs = body.get("outputs") or [row["output"] for row in body["triples"]]
    return rewards_reply([float(output) for output in outputs])


class Script:
    """Answers in turn, the last one for ever: a function of the body, a ready answer, or `cut`, `hang` or `drip`."""

    def __init__(self, *answers: Callable[[dict[str, Any]], Answer] | Answer | str) -> None:
        self._answers = list(answers)
        self._lock = threading.Lock()
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.under_way = self.most_under_way = 0
        self.connections: set[tuple[str, int]] = set()
        self.address = ""

    def next(self, body: dict[str, Any], headers: dict[str, str]) -> Callable[[dict[str, Any]], Answer] | Answer | str:
        with self._lock:
            self.bodies.append(body)
            self.headers.append(headers)
            self.times.append(time.monotonic())
            return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    """Of connections that come at the same moment; one that finds no place tries again a second later."""


@contextmanager
def scripted_server(*answers: Callable[[dict[str, Any]], Answer] | Answer | str):
    """The `Script` of a server that is up; `script.address` says where."""
    script = Script(*answers)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            with script._lock:
                script.under_way += 1
                script.most_under_way = max(script.most_under_way, script.under_way)
                script.connections.add(self.client_address)
                script.paths.append(self.path)
            try:
                length = int(self.headers.get("Content-Length", 0))
                raw = self.rfile.read(length)
                if len(raw) < length:  # the caller left in the middle
                    self.close_connection = True
                    return
                body = json.loads(raw or b"{}")
                self.answer(script.next(body, {name.lower(): value for name, value in self.headers.items()}), body)
            finally:
                with script._lock:
                    script.under_way -= 1

        do_GET = do_POST

        def answer(self, answer: Any, body: dict[str, Any]) -> None:
            if answer == "hang":
                time.sleep(2)
                answer = "cut"
            if answer == "drip":
                self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                with suppress(OSError):  # until the client has had enough
                    for _ in range(100):
                        self.wfile.write(b" ")
                        time.sleep(0.05)
                self.close_connection = True
                return
            if answer == "cut":
                self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{")
                self.close_connection = True
                return
            status, headers, content = answer(body) if callable(answer) else answer
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = _Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    script.address = f"127.0.0.1:{server.server_address[1]}"
    try:
        yield script
    finally:
        server.shutdown()
        server.server_close()
