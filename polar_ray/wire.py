"""What crosses HTTP between an endpoint and its clients: requests, replies, errors. Both sides import this.

A request holds its rows in one of three forms, and the reply has one row for each, in order:

    {"triples": [{"prompt", "reference", "output"}, ...]}             any triples
    {"prompt", "reference", "outputs": [...]}                         a group: outputs to one prompt
    {"ids": [[1, ...], ...]}                                          sequences that `polar_ray.encoding` made

A row that cannot be scored has a status and a sentence in the reply and leaves its neighbours alone; only a request
that is wrong as a whole is answered with an error.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from polar_ray.errors import (
    PolarRayError,
    RequestInvalid,
    ServingError,
    TripleError,
    Unavailable,
    error_kinds,
)
from polar_ray.triples import TEXT_FIELDS, Row, Scored, TokenIds, Triple

REWARDS_PATH = "/v1/rewards"
MODELS_PATH = "/v1/models"

JSON_MEDIA_TYPE = "application/json"
ARROW_MEDIA_TYPE = "application/vnd.apache.arrow.stream"
"""Registered name of the Arrow IPC stream format."""

ARROW_REPLY_KEY = b"polar_ray.reply"
"""Schema metadata of an Arrow reply: the `RewardsReply` as JSON, without its rows."""

CONNECTION_LOST = "connection_lost"
"""Detail of an `Unavailable`: the request was sent and no answer came; the endpoint may have died of it."""

RECEIPT_HEADER = "X-Polar-Receipt"
"""On every reply with rewards, for dialects that have no field for it."""

Priority = Literal["interactive", "bulk"]
"""`interactive` for a trainer that waits, `bulk` for a backfill that does not mind to."""


class Body(BaseModel):
    """The common ground: unknown fields refused, so that a misspelt one cannot go unseen."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class CallOptions(Body):
    """What a caller may say beside its rows; in the body, or in the query string of an Arrow request."""

    deadline_s: float | None = Field(None, gt=0, le=86400)
    """Seconds from the request's arrival after which its rewards are of no use. Refused at once if it cannot be met."""

    priority: Priority = "interactive"
    expect_receipt: str | None = None
    """Refuse, with `receipt_mismatch`, unless this is the endpoint's `receipt_id`."""


class RewardsRequest(CallOptions):
    """`POST /v1/rewards`. Exactly one of `triples`, `outputs` and `ids`."""

    triples: list[dict[str, Any]] | None = None
    """Any triples: `prompt`, `reference`, `output`, and optionally `wrapper` and `id`."""

    prompt: Any = None
    """Of a group: a string, or a list of messages."""

    reference: Any = None
    """Of a group."""

    wrapper: str | None = None
    """Of a group: `sft` (default) or `pretrain`."""

    outputs: list[Any] | None = None
    """Of a group: what to score, each a string or a list of messages."""

    ids: list[list[int]] | None = None
    """Encoded sequences, whole: bos, prompt and reference, separator, prompt and output, score token."""

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        forms = [name for name in ("triples", "outputs", "ids") if getattr(self, name) is not None]
        if len(forms) != 1:
            raise ValueError(f"expected exactly one of triples, outputs and ids, found {' and '.join(forms) or 'none'}")
        strays = [name for name in ("prompt", "reference", "wrapper") if getattr(self, name) is not None]
        if strays and forms != ["outputs"]:
            raise ValueError(f"{strays[0]} belongs to a group (prompt, reference, outputs), not beside {forms[0]}")
        return self

    @property
    def n_rows(self) -> int:
        """Rows of the request, before any is looked at."""
        return len(self.triples or self.outputs or self.ids or ())

    def rows(self) -> list[Row]:
        """The request's rows, or the error that says why one is none, in order."""
        if self.ids is not None:
            return [TokenIds(ids) for ids in self.ids]
        if self.triples is not None:
            return [_attempt_triple(row) for row in self.triples]
        shared = {"prompt": self.prompt, "reference": self.reference, "wrapper": self.wrapper}
        return [_attempt_triple({**shared, "output": output}) for output in self.outputs or ()]


class RewardRow(Body):
    """One row of a reply; the same words as a corpus job's columns."""

    index: int
    """Place of the row in the request."""

    id: str | None = None
    """The triple's own id, if it had one."""

    reward: float | None
    """The value head's raw scalar (float32), or null if the row failed."""

    status: str
    """`ok`, or the code of an error."""

    detail: str | None = None
    """What was wrong and what to do; null if nothing was."""

    tokens: int = 0
    """Length of the encoded triple."""

    cut_tokens: int = 0
    """Tokens that limits removed."""

    removed_control_tokens: int = 0
    """Control tokens that stood in the texts and were taken out."""

    def scored(self) -> Scored:
        """The row as `Scorer.score` would give it."""
        return Scored(
            self.reward, self.status, self.detail, self.tokens, self.cut_tokens, self.removed_control_tokens, self.id
        )


class UsageReply(Body):
    """What a request cost."""

    rows: int
    tokens: int
    """Tokens of all rows."""

    computed_tokens: int
    """Tokens that went through the model for them; what rows share is counted once, with the first of them."""


class TimingsReply(Body):
    """Where a request's time went, in seconds."""

    encode_s: float
    queue_s: float
    """Waiting for the engine."""

    engine_s: float
    """From the first engine call with a row of this request to the end of the last."""

    total_s: float


class RewardsReply(Body):
    """The answer of `POST /v1/rewards`: as many rows as were sent, in order."""

    object: Literal["rewards"] = "rewards"
    model: str
    receipt_id: str
    """What determines these rewards, as one id; rewards with different ids are not comparable."""

    rewards: list[RewardRow]
    usage: UsageReply
    timings: TimingsReply


class LimitsReply(Body):
    """What an endpoint takes."""

    max_tokens: int
    max_response_tokens: int
    cut_side: str
    on_too_long: str
    on_empty: str
    max_rows: int
    max_body_bytes: int
    max_text_characters: int
    max_queued_tokens: int
    default_deadline_s: float


class ModelReply(Body):
    """One model of `GET /v1/models`."""

    id: str
    object: Literal["model"] = "model"
    created: int
    """Unix time at which the replica that answers came up."""

    owned_by: Literal["polar_ray"] = "polar_ray"
    untrained: bool
    """Whether the checkpoint says of itself that its weights are random."""

    token_budget: int
    """Computed tokens of one engine call."""

    receipt_id: str
    receipt: dict[str, str | int]
    """Everything that `receipt_id` is the sha256 of."""

    limits: LimitsReply


class ModelsReply(Body):
    """The answer of `GET /v1/models`: one model, in the shape that OpenAI's clients list models in."""

    object: Literal["list"] = "list"
    data: list[ModelReply]


class ErrorBody(Body):
    """What went wrong with a request as a whole."""

    code: str
    """One of the codes in `polar_ray.errors`."""

    message: str
    retryable: bool
    details: dict[str, str | int | float | bool | None] = {}


class ErrorReply(Body):
    """The answer to a request that failed as a whole, whatever the route or dialect."""

    error: ErrorBody


def parse_request(body: bytes) -> RewardsRequest:
    """`body` as a request. Raises `RequestInvalid` naming the field, without quoting anybody's text."""
    try:
        return RewardsRequest.model_validate_json(body)
    except ValidationError as error:
        raise RequestInvalid(describe_faults(error)) from None


def parse_options(query: Mapping[str, str], others: Collection[str] = ()) -> CallOptions:
    """The options of a query string. Raises `RequestInvalid` for one that is neither known nor among `others`."""
    try:
        return CallOptions.model_validate({name: value for name, value in query.items() if name not in others})
    except ValidationError as error:
        raise RequestInvalid(describe_faults(error)) from None


def describe_faults(error: ValidationError) -> str:
    """Where and what, one clause per fault and three at most. Values are left out: they may be somebody's text."""
    faults = error.errors(include_url=False, include_input=False, include_context=False)
    clauses = []
    for fault in faults[:3]:
        where = ".".join(str(part) for part in fault["loc"])[:100]
        message = fault["msg"].removeprefix("Value error, ")
        clauses.append(f"{where}: {message}" if where else message)
    more = len(faults) - 3
    return "; ".join(clauses) + (f"; and {more} more" if more > 0 else "")


def error_reply(error: PolarRayError) -> ErrorReply:
    """`error` as it goes over the wire: no traceback, and details only where they are plain values.

    A lone surrogate, which a message may have from the name of a caller's field, goes as a question mark: UTF-8 has
    none.
    """
    plain = {name: value for name, value in error.details.items() if isinstance(value, str | int | float | bool)}
    details = {name: _encodable(value) if isinstance(value, str) else value for name, value in plain.items()}
    message = _encodable(str(error))
    return ErrorReply(error=ErrorBody(code=error.code, message=message, retryable=error.retryable, details=details))


def _encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def read_error(status: int, body: bytes, headers: Mapping[str, str]) -> PolarRayError:
    """The error that an endpoint answered with, as the class it was raised as.

    Whatever is not in our shape (a proxy's page, Ray Serve's own refusals) is classified by its HTTP status.
    """
    retry_after = _number(headers.get("retry-after"))
    try:
        found = ErrorReply.model_validate_json(body).error
    except ValidationError:
        return _by_status(status, retry_after)
    kind = error_kinds().get(found.code, ServingError)
    details = dict(found.details)
    if retry_after is not None:
        details.setdefault("retry_after_s", retry_after)
    return kind(found.message, **details)


def _by_status(status: int, retry_after: float | None) -> PolarRayError:
    """A proxy's 500 or 502 can mean that a replica died of the request, as a lost connection can."""
    kinds = {kind.http_status: kind for kind in error_kinds().values() if ServingError in kind.__bases__}
    kind = kinds.get(status, Unavailable if status >= 500 else RequestInvalid)
    details: dict[str, float | bool] = {} if retry_after is None else {"retry_after_s": retry_after}
    if status in (500, 502):
        details[CONNECTION_LOST] = True
    return kind(f"HTTP {status}, from something that is not polar_ray, or is not up", **details)


def _number(text: str | None) -> float | None:
    """Seconds of a Retry-After header; None for a date, or for what no wait can be."""
    try:
        seconds = float(text or "")
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None


def _attempt_triple(row: Mapping[str, Any]) -> Triple | TripleError:
    try:
        return Triple.from_dict(row)
    except TripleError as error:
        return error


def triple_to_json(triple: Triple) -> dict[str, Any]:
    """A triple as a row of `triples`. Messages keep their role and content only, an id of another type goes as text."""
    row: dict[str, Any] = {name: text_to_json(getattr(triple, name)) for name in TEXT_FIELDS}
    if triple.wrapper != "sft":
        row["wrapper"] = triple.wrapper
    if triple.id is not None:
        row["id"] = str(triple.id)
    return row


def text_to_json(text: Any) -> Any:
    """A field of a triple: a string as it is, messages as plain dicts of role and content."""
    if isinstance(text, str):
        return text
    return [{"role": str(message.get("role", "user")), "content": message["content"]} for message in text]
