"""The endpoint's routes: rewards, the model, health, metrics, dialects, the playground. Knows nothing of Ray."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from starlette.exceptions import HTTPException

import polar_ray
from polar_ray.errors import EngineError, RequestInvalid, Unavailable, error_kinds
from polar_ray.metrics import RECEIPT_ID_DIGITS
from polar_ray.serving import openapi
from polar_ray.serving.arrow import read_rows, write_reply
from polar_ray.serving.auth import Gate
from polar_ray.serving.dialects import DIALECTS
from polar_ray.serving.dialects.base import Answer, Dialect
from polar_ray.serving.exchange import (
    CallerGone,
    TypedRoute,
    answer_http_exception,
    parse_object,
    read_body,
    unless_gone,
)
from polar_ray.serving.service import Result, RewardService
from polar_ray.tracing import RequestTrace
from polar_ray.triples import Row
from polar_ray.wire import (
    ARROW_MEDIA_TYPE,
    JSON_MEDIA_TYPE,
    MODELS_PATH,
    RECEIPT_HEADER,
    REWARDS_PATH,
    CallOptions,
    ModelsReply,
    RewardsReply,
    parse_options,
    parse_request,
)

PLAYGROUND = Path(__file__).parent / "playground" / "index.html"

PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}

T = TypeVar("T")

LARGE_BODY_BYTES = 256 << 10
"""Beyond, a body is read and its reply written beside the event loop, where a small call is quicker."""

CollectFleet = Callable[[], Awaitable[Sequence[Metric]]]
"""The metric families of all replicas."""


def build_api(service: RewardService, collect_fleet: CollectFleet | None = None) -> FastAPI:
    """The ASGI application over `service`. Without `collect_fleet`, `/metrics` tells of this replica alone.

    Raises `ConfigError` when tokens are required and there are none.
    """
    app = FastAPIOffline(
        redoc_url=None,
        title="polar_ray",
        version=polar_ray.__version__,
        summary="POLAR rewards: the right number, or a typed error.",
        description=openapi.DESCRIPTION,
    )
    app.state.count_request = service.metrics.count_request
    app.add_exception_handler(HTTPException, answer_http_exception)
    gate = Gate(service.config.auth)

    async def authorise(request: Request) -> None:
        gate.check(request.headers.get("authorization"))

    asked = [Depends(authorise)] if gate.is_open else [Depends(authorise), Depends(HTTPBearer(auto_error=False))]
    app.include_router(_native_routes(service), dependencies=asked)
    app.include_router(_dialect_routes(service), dependencies=asked)
    app.include_router(_metrics_route(service, collect_fleet), dependencies=asked)
    app.include_router(_open_routes(service))
    return app


def _open_routes(service: RewardService) -> APIRouter:
    """What needs no token: the page, and what a load balancer asks."""
    router = APIRouter(route_class=TypedRoute)
    page = PLAYGROUND.read_text()

    @router.get("/", include_in_schema=False)
    async def playground() -> HTMLResponse:
        return HTMLResponse(page, headers=PAGE_HEADERS)

    @router.get("/healthz", tags=["operation"], summary="Is it well?", responses=openapi.UNAVAILABLE)
    @router.get("/readyz", tags=["operation"], summary="May it be asked?", responses=openapi.UNAVAILABLE)
    async def health() -> dict[str, str]:
        """200 while the engine that answers is able to give rewards."""
        try:
            service.check_health()
        except EngineError as error:
            raise Unavailable(str(error)) from None
        return {"status": "ok"}

    return router


def _native_routes(service: RewardService) -> APIRouter:
    router = APIRouter(route_class=TypedRoute, tags=["rewards"])

    @router.post(
        REWARDS_PATH,
        summary="Score triples, or a group",
        response_model=RewardsReply,
        openapi_extra=openapi.REWARDS,
        responses=openapi.ERRORS,
    )
    async def rewards(request: Request) -> Response:
        """Score a list of triples, or the outputs of one group.

        The reply has one row for each that was sent, in order. A row that cannot be scored says why in `status` and
        `detail`, has no reward, and leaves its neighbours alone.
        """
        arrived = time.monotonic()
        body = await read_body(request, service.config.requests.max_body_bytes)
        is_large = len(body) > LARGE_BODY_BYTES
        rows, options = await _do(service, partial(_parse, service, request, body), aside=is_large)
        result = await _score(service, request, rows, options, arrived)
        return await _do(service, partial(_respond, service, request, result), aside=is_large)

    @router.get(MODELS_PATH, summary="The model and its receipt", responses=openapi.REFUSALS)
    async def models() -> ModelsReply:
        """The model, the receipt that says how its rewards are made, and the limits."""
        return ModelsReply(data=[service.describe()])

    return router


def _metrics_route(service: RewardService, collect_fleet: CollectFleet | None) -> APIRouter:
    router = APIRouter(route_class=TypedRoute, tags=["operation"])

    @router.get("/metrics", summary="Prometheus metrics", response_class=Response, responses=openapi.METRICS)
    async def metrics() -> Response:
        """All replicas' metrics in Prometheus' text format."""
        families = service.metrics.collect() if collect_fleet is None else await collect_fleet()
        return Response(_exposition(families), media_type=CONTENT_TYPE_LATEST)

    return router


def _dialect_routes(service: RewardService) -> APIRouter:
    router = APIRouter(route_class=TypedRoute)
    for dialect in DIALECTS:
        for path in dialect.paths:
            router.add_api_route(
                path,
                _dialect_handler(service, dialect),
                methods=["POST"],
                tags=[f"dialect: {dialect.name}"],
                summary=dialect.summary,
                openapi_extra=openapi.dialect(dialect),
                responses=openapi.ERRORS,
                response_class=JSONResponse,
                name=f"{dialect.name}{path}",
            )
    return router


def _dialect_handler(service: RewardService, dialect: Dialect) -> Callable[[Request], Awaitable[Response]]:
    async def handle(request: Request) -> Response:
        arrived = time.monotonic()
        content = await read_body(request, service.config.requests.max_body_bytes)

        def read() -> tuple[dict[str, Any], Sequence[Row]]:
            body = parse_object(content)
            return body, dialect.read(body, request.query_params)

        body, rows = await _do(service, read, aside=len(content) > LARGE_BODY_BYTES)
        options = parse_options(request.query_params, others=dialect.parameters)
        result = await _score(service, request, rows, options, arrived)
        _refuse_failed_rows(result)
        answer = Answer(
            result.scored,
            service.model.name,
            service.receipt_id,
            tokens=result.tokens,
            computed_tokens=result.computed_tokens,
            seconds=result.total_s,
        )
        return JSONResponse(dialect.write(body, answer), headers={RECEIPT_HEADER: service.receipt_id})

    return handle


async def _score(
    service: RewardService, request: Request, rows: Sequence[Row], options: CallOptions, arrived: float
) -> Result:
    name = f"{request.method} {request.scope['route'].path}"
    try:
        with service.tracing.request(name, request.headers, arrived) as trace:
            result = await unless_gone(request, service.score(rows, options, arrived=arrived))
            _describe(trace, service, result, options, arrived)
            return result
    except (CallerGone, asyncio.CancelledError):  # the second is how Ray's proxy may say it
        service.metrics.count_dropped()
        raise


def _describe(
    trace: RequestTrace, service: RewardService, result: Result, options: CallOptions, arrived: float
) -> None:
    failed = sum(not row.is_ok for row in result.scored)
    trace.set(
        rows=len(result.scored),
        failed_rows=failed,
        tokens=result.tokens,
        computed_tokens=result.computed_tokens,
        priority=options.priority,
        receipt_id=service.receipt_id[:RECEIPT_ID_DIGITS],
    )
    trace.stages(arrived, {"encode": result.encode_s, "queue": result.queue_s, "engine": result.engine_s})


def _refuse_failed_rows(result: Result) -> None:
    """A dialect has no place for a row's own error: its first failed row fails the call."""
    for index, row in enumerate(result.scored):
        if not row.is_ok:
            kind = error_kinds()[row.status]
            failed = sum(not other.is_ok for other in result.scored)
            raise kind(f"row {index} of {len(result.scored)}: {row.detail}", row=index, failed_rows=failed)


async def _do(service: RewardService, work: Callable[[], T], *, aside: bool) -> T:
    return await service.aside(work) if aside else work()


def _parse(service: RewardService, request: Request, body: bytes) -> tuple[Sequence[Row], CallOptions]:
    if _media_type(request) == ARROW_MEDIA_TYPE:
        limits = service.config.requests
        return read_rows(body, limits), parse_options(request.query_params)
    if request.query_params:
        raise RequestInvalid("the options of a JSON request stand in its body; take them out of the query string")
    parsed = parse_request(body)
    service.check_size(parsed.n_rows)
    return parsed.rows(), parsed


def _respond(service: RewardService, request: Request, result: Result) -> Response:
    reply, headers = service.reply(result), {RECEIPT_HEADER: service.receipt_id}
    if _wants_arrow(request):
        return Response(write_reply(reply), headers=headers, media_type=ARROW_MEDIA_TYPE)
    return Response(reply.model_dump_json(), headers=headers, media_type=JSON_MEDIA_TYPE)


def _wants_arrow(request: Request) -> bool:
    """Whether the reply is to be Arrow: as `Accept` says, else as the request came."""
    accept = request.headers.get("accept", "*/*")
    if ARROW_MEDIA_TYPE in accept:
        return True
    return _media_type(request) == ARROW_MEDIA_TYPE and JSON_MEDIA_TYPE not in accept


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _exposition(families: Sequence[Metric]) -> bytes:
    class Given(Collector):
        def collect(self) -> Sequence[Metric]:
            return families

    registry = CollectorRegistry()
    registry.register(Given())
    return generate_latest(registry)
