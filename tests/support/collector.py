"""A collector of traces on a free loopback port, which keeps what an OTLP exporter sends."""

import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

GIVE_UP_S = 20


class Collector:
    """What has arrived. `address` is what OTEL_EXPORTER_OTLP_ENDPOINT is to be."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.spans: list = []

    def wait_for(self, names: set[str]) -> None:
        end = time.monotonic() + GIVE_UP_S
        while not names <= {span.name for span in self.spans}:
            assert time.monotonic() < end, f"arrived: {sorted({span.name for span in self.spans})}"
            time.sleep(0.1)


@contextmanager
def running_collector():
    found = Collector("")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            request = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
            for resource in request.resource_spans:
                for scope in resource.scope_spans:
                    found.spans.extend(scope.spans)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
