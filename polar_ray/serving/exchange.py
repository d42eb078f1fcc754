"""The HTTP manners that all routes share: bodies within bounds, typed errors, and no work for a caller who has gone."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from polar_ray.errors import NotFound, Overloaded, PolarRayError, RequestInvalid, RequestTooLarge, Unauthorized
from polar_ray.wire import JSON_MEDIA_TYPE, error_reply

T = TypeVar("T")

BODY_TIMEOUT_S = 60.0
"""For a request's body to arrive; a caller that dribbles holds memory."""

CALLER_GONE_STATUS = 499
"""What nginx logs for a caller that hung up. Nobody reads the reply."""

logger = logging.getLogger("polar_ray.serving")


class CallerGone(Exception):
    """The caller hung up before the answer."""


class TypedRoute(APIRoute):
    """A route whose every failure is answered with an `ErrorReply`; one that nobody foresaw says nothing but its type.

    `app.state.count_request` is told route, code and seconds of each request.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_typed(request: Request) -> Response:
            began = time.perf_counter()
            code = "ok"
            try:
                return await handle(request)
            except (CallerGone, ClientDisconnect):
                code = "caller_gone"
                return Response(status_code=CALLER_GONE_STATUS)
            except asyncio.CancelledError:
                code = "caller_gone"
                raise
            except RequestValidationError:
                code = RequestInvalid.code
                return error_response(RequestInvalid("a parameter is malformed; the OpenAPI page says what it must be"))
            except PolarRayError as error:
                code = error.code
                return error_response(error)
            except Exception as error:  # its text could be somebody's, so only the type goes out, and into the log
                code = PolarRayError.code
                logger.error("%s failed with %s", self.path, type(error).__name__)
                return error_response(PolarRayError(f"the endpoint failed with {type(error).__name__}; that is a bug"))
            finally:
                request.app.state.count_request(self.path, code, time.perf_counter() - began)

        return handle_typed


def error_response(error: PolarRayError, status: int | None = None) -> Response:
    """`error` as a reply, with the headers that go with its kind."""
    headers = {}
    if isinstance(error, Overloaded):
        headers["Retry-After"] = str(math.ceil(error.details.get("retry_after_s", 1)))
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    body = error_reply(error).model_dump_json()
    return Response(body, status or error.http_status, headers, media_type=JSON_MEDIA_TYPE)


async def answer_http_exception(request: Request, error: Exception) -> Response:
    """What the framework refuses by itself (no such route, no such method), in our shape."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    if status == NotFound.http_status:
        return error_response(NotFound("no such route here; GET /docs lists them"))
    return error_response(RequestInvalid(f"HTTP {status}: this route does not take such a request"), status)


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body. Raises `RequestTooLarge` as soon as that is known, `RequestInvalid` for one that stalls."""
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        raise RequestInvalid("the body is compressed; send it as it is")
    too_large = RequestTooLarge(f"the body has more than requests.max_body_bytes = {max_bytes}", max_bytes=max_bytes)
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for part in request.stream():
                body += part
                if len(body) > max_bytes:
                    raise too_large
    except TimeoutError:
        raise RequestInvalid(f"the body did not arrive within {BODY_TIMEOUT_S:g} s") from None
    return bytes(body)


def parse_object(body: bytes) -> dict[str, Any]:
    """A JSON object. Raises `RequestInvalid` for anything else."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        where = f" at byte {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise RequestInvalid(f"the body is not JSON{where}") from None
    if not isinstance(value, dict):
        raise RequestInvalid(f"expected a JSON object, found {type(value).__name__}")
    return value


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` comes to; it is cancelled as soon as the caller hangs up, and `CallerGone` raised.

    Needs the body to have been read: the next message of the connection is then its end.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_hang_up(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise CallerGone
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _hang_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
