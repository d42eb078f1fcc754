"""An S3 server that can be told to fail: moto's, behind a gate. `python -m tests.support.flaky_s3 PORT SEED`."""

import random
import subprocess
import sys
import time
from contextlib import contextmanager
from urllib.parse import parse_qs
from urllib.request import Request, urlopen

from pyarrow import fs

CONTROL = "/-/faults"
SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>for a test</Message></Error>"


class Gate:
    """WSGI: passes requests on, or refuses a share of them, or does what they ask and loses the reply."""

    def __init__(self, application, seed):
        self._application = application
        self._chance = random.Random(seed)
        self._refused = self._lost = 0.0
        self.failures = 0

    def __call__(self, environ, start_response):
        if environ["PATH_INFO"] == CONTROL:
            return self._control(environ, start_response)
        drawn = self._chance.random()
        if drawn < self._refused:
            return self._fail(start_response)
        if drawn < self._refused + self._lost and environ["REQUEST_METHOD"] in ("PUT", "POST"):
            for _ in self._application(environ, lambda *_: None):
                pass
            return self._fail(start_response)
        return self._application(environ, start_response)

    def _control(self, environ, start_response):
        asked = parse_qs(environ["QUERY_STRING"])
        if asked:
            self._refused, self._lost = (float(asked[name][0]) for name in ("refused", "lost"))
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [str(self.failures).encode()]

    def _fail(self, start_response):
        self.failures += 1
        start_response("503 Slow Down", [("Content-Type", "application/xml"), ("Content-Length", str(len(SLOW_DOWN)))])
        return [SLOW_DOWN]


class FlakyS3:
    """A handle on such a server, which runs in a process of its own."""

    def __init__(self, address):
        self.address = address

    def url(self, path):
        """How a job is told of a place in it."""
        return f"s3://{path}?scheme=http&endpoint_override={self.address.replace(':', '%3A')}"

    def filesystem(self):
        return fs.S3FileSystem(scheme="http", endpoint_override=self.address, allow_bucket_creation=True)

    def fail(self, *, refused=0.0, lost=0.0):
        """From now on refuse a share of all requests, and lose the replies to another of those that write."""
        urlopen(Request(f"http://{self.address}{CONTROL}?refused={refused}&lost={lost}")).close()

    def failures(self):
        """Requests that it has failed so far."""
        with urlopen(f"http://{self.address}{CONTROL}") as reply:
            return int(reply.read())


@contextmanager
def flaky_s3(port, seed=0):
    """Such a server on a port of the loopback, for as long as the block lasts."""
    command = [sys.executable, "-m", "tests.support.flaky_s3", str(port), str(seed)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    server = FlakyS3(f"127.0.0.1:{port}")
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                server.failures()
                break
            except OSError:
                assert time.monotonic() < deadline
                assert process.poll() is None
                time.sleep(0.1)
        yield server
    finally:
        process.kill()
        process.wait()


def main():
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    port, seed = map(int, sys.argv[1:])
    application = DomainDispatcherApplication(create_backend_app)
    server = make_server("127.0.0.1", port, Gate(application, seed), threaded=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
