"""Traces by OpenTelemetry, for those who ask for them. Texts, tokens and addresses of callers are in no span.

Off, and at no cost, unless OTEL_EXPORTER_OTLP_ENDPOINT is set in the environment of the process; then it needs
`polar_ray[otel]`. The SDK's other variables (OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER, ...) mean what they always mean.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, ParamSpec, Self, TypeVar

from polar_ray.errors import ConfigError, PolarRayError

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

P = ParamSpec("P")
T = TypeVar("T")

Value = str | int | float

ENDPOINT_VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")

EXPORT_PERIOD_MS = 1000
"""A process that is killed takes no more than a second of spans with it."""

FLUSH_SECONDS = 1.0
"""That a unit may wait for a collector which does not answer."""


class Tracing:
    """Makes spans; without a provider, nothing."""

    def __init__(self, provider: TracerProvider | None = None) -> None:
        self._provider = provider
        self._tracer = None if provider is None else provider.get_tracer("polar_ray")

    @classmethod
    def from_environment(cls) -> Self:
        """As the environment asks for. Raises `ConfigError` where it asks and the packages are missing."""
        if not any(os.environ.get(name) for name in ENDPOINT_VARIABLES):
            return cls()
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import SERVICE_NAME, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError:
            raise ConfigError(
                f"{ENDPOINT_VARIABLES[0]} is set and OpenTelemetry is not installed; pip install 'polar_ray[otel]', or "
                "take the variable away"
            ) from None
        name = os.environ.get("OTEL_SERVICE_NAME", "polar_ray")
        provider = TracerProvider(resource=Resource.create({SERVICE_NAME: name}))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(), schedule_delay_millis=EXPORT_PERIOD_MS))
        return cls(provider)

    @contextmanager
    def span(self, name: str, **attributes: Value) -> Iterator[None]:
        """A span over what happens meanwhile, below this thread's current one. An error's code is its status."""
        if self._tracer is None:
            yield
            return
        with self._tracer.start_as_current_span(
            name, attributes=attributes, record_exception=False, set_status_on_exception=False
        ) as span:
            try:
                yield
            except BaseException as error:
                _set_error(span, error)
                raise

    def traced(self, name: str, do: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        """What `do` gives, called in a span."""
        with self.span(name):
            return do(*arguments, **named)

    def flush(self) -> None:
        """Send what there is, from a process that may soon be gone. Waits `FLUSH_SECONDS` at most."""
        if self._provider is not None:
            sending = threading.Thread(target=self._provider.force_flush, daemon=True)
            sending.start()
            sending.join(FLUSH_SECONDS)

    @contextmanager
    def request(self, name: str, headers: Mapping[str, str], arrived: float) -> Iterator[RequestTrace]:
        """A span from `arrived` (by `time.monotonic`) to the end of the block, below the caller's of W3C
        `traceparent`."""
        if self._tracer is None:
            yield RequestTrace()
            return
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind, set_span_in_context

        parent = extract(headers)
        span = self._tracer.start_span(name, context=parent, kind=SpanKind.SERVER, start_time=_wall_ns(arrived))
        trace = RequestTrace(span, self, set_span_in_context(span))
        try:
            yield trace
        except BaseException as error:
            _set_error(span, error)
            raise
        finally:
            span.end()

    def record(self, name: str, context: Context, start: float, stop: float) -> None:
        """A span of the past below `context`; times are of `time.monotonic`."""
        if self._tracer is not None:
            self._tracer.start_span(name, context=context, start_time=_wall_ns(start)).end(_wall_ns(stop))


class RequestTrace:
    """One request's span, to be filled in when its outcome is known; nothing without one."""

    def __init__(
        self, span: Span | None = None, tracing: Tracing | None = None, context: Context | None = None
    ) -> None:
        self._span, self._tracing, self._context = span, tracing, context

    def set(self, **attributes: Value) -> None:
        if self._span is not None:
            self._span.set_attributes(attributes)

    def stages(self, start: float, seconds: Mapping[str, float]) -> None:
        """Stages that followed each other from `start` (by `time.monotonic`), by name."""
        for name, duration in seconds.items():
            if self._tracing is not None and self._context is not None:
                self._tracing.record(name, self._context, start, start + duration)
            start += duration


def _wall_ns(moment: float) -> int:
    return time.time_ns() - int((time.monotonic() - moment) * 1e9)


def _set_error(span: Span, error: BaseException) -> None:
    """The code alone: messages of other libraries may quote a text."""
    from opentelemetry.trace import Status, StatusCode

    code = error.code if isinstance(error, PolarRayError) else type(error).__name__
    span.set_status(Status(StatusCode.ERROR, code))
