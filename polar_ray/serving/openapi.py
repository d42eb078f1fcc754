"""What the OpenAPI page shows beside the routes themselves: request bodies with real examples, and the errors."""

from __future__ import annotations

from typing import Any

from polar_ray.errors import error_kinds
from polar_ray.serving.dialects.base import Dialect
from polar_ray.wire import ARROW_MEDIA_TYPE, JSON_MEDIA_TYPE, CallOptions, ErrorReply, RewardsRequest

DESCRIPTION = """
POLAR reads a triple: how close is `output` to what the author of `reference` would answer to `prompt`? A reward is the
raw scalar of the value head: float32, unbounded, higher is better, no activation. Only rewards with one `receipt_id`
are comparable.

Errors have one shape on every route, `{"error": {"code", "message", "retryable", "details"}}`; 429 comes with
`Retry-After`. Try it without writing code: [the playground](./).
"""

CAPITAL = {"prompt": "What is the capital of China?", "reference": "Beijing."}

EXAMPLES = {
    "group": {
        "summary": "a group: outputs to one prompt and reference",
        "value": {**CAPITAL, "outputs": ["Beijing.", "Shanghai.", "I don't know."]},
    },
    "triples": {
        "summary": "any triples, conversations too",
        "value": {
            "triples": [
                {**CAPITAL, "output": "Beijing.", "id": "a"},
                {
                    "prompt": [{"role": "user", "content": "2 + 2 = ?"}],
                    "reference": [{"role": "assistant", "content": "4"}],
                    "output": [{"role": "assistant", "content": "5"}],
                    "id": "b",
                },
            ],
            "deadline_s": 30,
            "priority": "bulk",
        },
    },
    "pretrain": {
        "summary": "continuations of a text, joined without a newline",
        "value": {
            "prompt": "The sky is",
            "reference": " blue today.",
            "outputs": [" blue.", " a fruit."],
            "wrapper": "pretrain",
        },
    },
}

_OPTIONS = CallOptions.model_json_schema()["properties"]

REWARDS: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            JSON_MEDIA_TYPE: {"schema": RewardsRequest.model_json_schema(), "examples": EXAMPLES},
            ARROW_MEDIA_TYPE: {
                "schema": {
                    "type": "string",
                    "format": "binary",
                    "description": "An Arrow IPC stream with the columns prompt, reference, output and optionally "
                    "wrapper and id, or with ids alone. The options of a JSON body go into the query string.",
                }
            },
        },
    },
    "parameters": [
        {"name": name, "in": "query", "required": False, "schema": schema, "description": "Of an Arrow request."}
        for name, schema in _OPTIONS.items()
    ],
}


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    codes = {
        status: [code for code, kind in error_kinds().items() if kind.http_status == status] for status in statuses
    }
    return {
        status: {"model": ErrorReply, "description": ", ".join(f"`{code}`" for code in sorted(codes[status]))}
        for status in statuses
    }


REFUSALS = _errors(401)
UNAVAILABLE = _errors(503)
ERRORS = _errors(400, 401, 409, 413, 422, 429, 500, 502, 503, 504)
METRICS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/plain": {"schema": {"type": "string"}}}},
    **REFUSALS,
}


def dialect(of: Dialect) -> dict[str, Any]:
    """The request body of a dialect: its contract is somebody else's, so an example and no schema beyond an object.

    Its query parameters are a call's options, and its own.
    """
    return {
        "requestBody": {
            "required": True,
            "content": {JSON_MEDIA_TYPE: {"schema": {"type": "object"}, "example": of.example}},
        },
        "parameters": [
            {"name": name, "in": "query", "required": False, "schema": schema}
            for name, schema in {**_OPTIONS, **of.parameters}.items()
        ],
    }
