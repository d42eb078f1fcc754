"""Every exception of polar_ray, with its stable code.

    PolarRayError                       code                   retry  HTTP  exit
    ├── ConfigError (ValueError)        config_invalid         no     400   2
    ├── CheckpointError                 checkpoint_invalid     no     500   2
    ├── TripleError (ValueError)        triple_invalid         no     422   2
    │   ├── RowUnreadable               row_unreadable         no     422   2
    │   ├── EmptyText                   triple_empty           no     422   2
    │   └── TripleTooLong               triple_too_long        no     422   2
    ├── EngineError                     engine_failed          no     502   1
    │   ├── EngineStartError            engine_start_failed    no     503   1
    │   ├── EngineProtocolError         engine_protocol        no     502   1
    │   ├── EngineUnavailable           engine_unavailable     yes    503   1
    │   ├── NonFiniteReward             reward_not_finite      no     502   1
    │   └── ProcessCrashed              process_crashed        no     502   1
    ├── ServingError                    serving_failed         no     500   1
    │   ├── RequestInvalid (ValueError) request_invalid        no     400   2
    │   ├── RequestTooLarge             request_too_large      no     413   2
    │   ├── Unauthorized                unauthorized           no     401   2
    │   ├── NotFound                    not_found              no     404   2
    │   ├── ReceiptMismatch             receipt_mismatch       no     409   1
    │   ├── Overloaded                  overloaded             yes    429   1
    │   ├── Unavailable                 unavailable            yes    503   1
    │   └── DeadlineExceeded (TimeoutError) deadline_exceeded  yes    504   1
    └── JobError                        job_failed             no     -     1
        ├── InputError                  input_invalid          no     -     2
        │   └── SchemaError             schema_invalid         no     -     2
        ├── OutputError                 output_invalid         no     -     2
        │   └── ManifestConflict        manifest_conflict      no     -     2
        ├── TooManyFailures             too_many_failures      no     -     1
        ├── JobStalled                  job_stalled            yes    -     1
        └── TrainingError               training_failed        no     -     1

A `code` is the same string in Python, in Parquet (`reward_status`), on the wire and in metrics. *Exit* is the exit
code of the command line: 2 when the person at the keyboard must change something before anything can run, 1 when a
run failed.
"""

from __future__ import annotations

from typing import Any, ClassVar


class PolarRayError(Exception):
    """Anything polar_ray raises on purpose.

    One constructor for the whole tree, so that every class survives pickling between processes. `details` are plain
    values for machines; the message says what was expected, what was found and what to do.
    """

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False
    http_status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str = "", **details: Any) -> None:
        super().__init__(message)
        self.details = details

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), str(self), self.details)


def _rebuild(kind: type[PolarRayError], message: str, details: dict[str, Any]) -> PolarRayError:
    return kind(message, **details)


class ConfigError(PolarRayError, ValueError):
    """A setting is unknown, malformed or contradicts another."""

    code, http_status, exit_code = "config_invalid", 400, 2


class CheckpointError(PolarRayError):
    """A model folder is incomplete, of another architecture, or holds tensors that do not fit its config."""

    code, exit_code = "checkpoint_invalid", 2


class TripleError(PolarRayError, ValueError):
    """A triple cannot be scored as it stands: a field is missing, null or of the wrong type."""

    code, http_status, exit_code = "triple_invalid", 422, 2


class RowUnreadable(TripleError):
    """The row's bytes are not text: invalid UTF-8, a lone surrogate, a line that is not JSON."""

    code = "row_unreadable"


class EmptyText(TripleError):
    """A field has no text, before or after control tokens were removed."""

    code = "triple_empty"


class TripleTooLong(TripleError):
    """The triple needs cutting and `limits.on_too_long` is `error`, or no cut can make it fit."""

    code = "triple_too_long"


class EngineError(PolarRayError):
    """The engine could not turn a batch into rewards."""

    code, http_status = "engine_failed", 502


class EngineStartError(EngineError):
    """The engine did not come up: out of memory at load, no such device, a failed self-check."""

    code, http_status = "engine_start_failed", 503


class EngineProtocolError(EngineError):
    """The engine answered with something that is not one reward per sequence."""

    code = "engine_protocol"


class EngineUnavailable(EngineError):
    """The engine, or the endpoint that stands for it, does not answer; no row is to blame."""

    code, retryable, http_status = "engine_unavailable", True, 503


class NonFiniteReward(EngineError):
    """The engine computed NaN or infinity for this row, alone and unshared as well."""

    code = "reward_not_finite"


class ProcessCrashed(EngineError):
    """Scoring killed the process, or one of the engine's own. As a row's status: again when the row was tried alone,
    so that it is quarantined."""

    code = "process_crashed"


class ServingError(PolarRayError):
    """A request to an endpoint was not answered with rewards."""

    code = "serving_failed"


class RequestInvalid(ServingError, ValueError):
    """The request is malformed as a whole: not JSON, an unknown field, a contract that lacks what POLAR needs."""

    code, http_status, exit_code = "request_invalid", 400, 2


class RequestTooLarge(ServingError):
    """The body has more bytes or rows than the endpoint takes at once."""

    code, http_status, exit_code = "request_too_large", 413, 2


class Unauthorized(ServingError):
    """The endpoint wants a token and got none, or another."""

    code, http_status, exit_code = "unauthorized", 401, 2


class NotFound(ServingError):
    """The endpoint has no such route."""

    code, http_status, exit_code = "not_found", 404, 2


class ReceiptMismatch(ServingError):
    """The endpoint's rewards are made otherwise than the caller expects: another model, other limits, another dtype."""

    code, http_status = "receipt_mismatch", 409


class Overloaded(ServingError):
    """Too many tokens are queued; `details["retry_after_s"]` says when there will be room."""

    code, retryable, http_status = "overloaded", True, 429


class Unavailable(ServingError):
    """Nobody answers: no replica is up, the connection broke, the endpoint is shutting down."""

    code, retryable, http_status = "unavailable", True, 503


class DeadlineExceeded(ServingError, TimeoutError):
    """The caller's deadline passed before its rewards were there; what was not computed by then never is."""

    code, retryable, http_status = "deadline_exceeded", True, 504


class JobError(PolarRayError):
    """A corpus job cannot start or go on."""

    code = "job_failed"


class InputError(JobError):
    """No such input, nothing to score in it, or a file that cannot be read."""

    code, exit_code = "input_invalid", 2


class SchemaError(InputError):
    """The input lacks a column that is needed, or already has one that the job would write."""

    code = "schema_invalid"


class OutputError(JobError):
    """The output folder cannot be written, or holds something that is not ours."""

    code, exit_code = "output_invalid", 2


class ManifestConflict(OutputError):
    """The output folder belongs to a job with another receipt, other inputs or other columns."""

    code = "manifest_conflict"


class TooManyFailures(JobError):
    """More than `max_failed_fraction` of the rows failed."""

    code = "too_many_failures"


class JobStalled(JobError):
    """No unit made progress for `no_progress_timeout_s`."""

    code, retryable = "job_stalled", True


class TrainingError(JobError):
    """A training run cannot go on: a gradient is not finite, a checkpoint is another run's, workers are lost."""

    code = "training_failed"


def error_kinds() -> dict[str, type[PolarRayError]]:
    """Every class by its code, for whoever reads codes back from a wire."""
    found: dict[str, type[PolarRayError]] = {}
    pending: list[type[PolarRayError]] = [PolarRayError]
    while pending:
        kind = pending.pop()
        found[kind.code] = kind
        pending += [sub for sub in kind.__subclasses__() if sub.__module__ == __name__]
    return found


def unwrap(error: BaseException) -> BaseException:
    """The error as it was raised, before Ray wrapped it on its way between processes.

    Ray delivers a worker's exception as `RayTaskError`, whose text is a remote traceback with node addresses in it;
    the original hangs at `.cause`, or below what an executor chained on top with `raise ... from`. The first error of
    this module in that chain is returned; without one, `error` less Ray's own wrapping.
    """
    chain = [error]
    while True:
        cause = getattr(chain[-1], "cause", None)
        inner = cause if isinstance(cause, BaseException) else chain[-1].__cause__
        if inner is None or inner in chain:
            break
        chain.append(inner)
    ours = (link for link in chain if type(link).__module__ == __name__)
    unwrapped = getattr(error, "cause", None)
    return next(ours, unwrapped if isinstance(unwrapped, BaseException) else error)


def first_line(error: BaseException) -> str:
    """What `error` says, short enough for another error's message; its type's name if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
