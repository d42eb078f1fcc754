"""Spans are where they belong, say what they may, and are not made unless somebody asks."""

import asyncio
import sys
from itertools import pairwise

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from polar_ray.errors import ConfigError, TripleError
from polar_ray.serving.service import RewardService
from polar_ray.tracing import ENDPOINT_VARIABLES, Tracing
from tests.support.endpoint import api_client

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SECRET = "a text that nobody else may read"


@pytest.fixture
def exporter():
    return InMemorySpanExporter()


@pytest.fixture
def tracing(exporter):
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Tracing(provider)


def ask(tracing, monkeypatch, body, **headers):
    """The status of a request to an endpoint that traces."""
    monkeypatch.setattr(Tracing, "from_environment", classmethod(lambda cls: tracing))

    async def main():
        async with api_client() as (client, service):
            assert isinstance(service, RewardService)
            return (await client.post("/v1/rewards", json=body, headers=headers)).status_code

    return asyncio.run(main())


def test_a_request_is_a_span_below_its_caller_with_its_stages_below(tracing, exporter, monkeypatch):
    body = {"prompt": SECRET, "reference": SECRET, "outputs": [SECRET, ""]}
    assert ask(tracing, monkeypatch, body, traceparent=f"00-{TRACE}-{SPAN}-01") == 200
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert set(spans) == {"POST /v1/rewards", "encode", "queue", "engine"}
    request = spans["POST /v1/rewards"]
    assert f"{request.context.trace_id:032x}" == TRACE
    assert f"{request.parent.span_id:016x}" == SPAN
    assert (request.attributes["rows"], request.attributes["failed_rows"]) == (2, 1)
    stages = [spans[name] for name in ("encode", "queue", "engine")]
    assert {stage.parent.span_id for stage in stages} == {request.context.span_id}
    moments = [moment for stage in stages for moment in (stage.start_time, stage.end_time)]
    slack = 5_000_000  # the two clocks are read one after the other
    assert all(after >= before - slack for before, after in pairwise(moments))
    assert request.start_time - slack <= moments[0]
    assert moments[-1] <= request.end_time + slack
    assert not [span for span in spans.values() if SECRET in span.to_json()]


def test_a_refused_request_has_its_code_and_nothing_else(tracing, exporter, monkeypatch):
    body = {"prompt": SECRET, "reference": SECRET, "outputs": [SECRET], "expect_receipt": "0" * 64}
    assert ask(tracing, monkeypatch, body) == 409
    (span,) = exporter.get_finished_spans()
    assert span.status.description == "receipt_mismatch"
    assert span.parent is None
    assert not span.events
    assert SECRET not in span.to_json()


def test_spans_nest_and_tell_an_errors_code_without_its_message(tracing, exporter):
    def fail():
        assert tracing.traced("read", "".join, ["a", "b"]) == "ab"
        raise TripleError(SECRET)

    with pytest.raises(TripleError), tracing.span("unit", unit=3):
        fail()
    read, unit = exporter.get_finished_spans()
    assert read.parent.span_id == unit.context.span_id
    assert (unit.attributes["unit"], unit.status.description) == (3, "triple_invalid")
    assert SECRET not in unit.to_json()


def test_nothing_is_traced_unless_the_environment_asks(monkeypatch):
    for name in ENDPOINT_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    quiet = Tracing.from_environment()
    with quiet.span("unit", unit=3), quiet.request("POST /", {}, 0.0) as trace:
        trace.set(rows=3)
        trace.stages(0.0, {"queue": 1.0})
    assert quiet.traced("read", len, "abc") == 3


def test_an_environment_that_asks_in_vain_is_told_what_to_install(monkeypatch):
    monkeypatch.setenv(ENDPOINT_VARIABLES[0], "http://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"polar_ray\[otel\]"):
        Tracing.from_environment()
