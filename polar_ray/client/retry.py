"""When to ask again: retryable errors only, never sooner than the endpoint says, never beyond the deadline."""

from __future__ import annotations

import math
import random
import time

from tenacity import AsyncRetrying, RetryCallState

from polar_ray.errors import DeadlineExceeded, PolarRayError
from polar_ray.wire import CONNECTION_LOST

FIRST_WAIT_S, LONGEST_WAIT_S = 0.1, 10.0
"""Of the exponential back-off, where the endpoint does not say."""

MOST_LOST_CONNECTIONS = 3
"""A request whose connection broke may hold a row that kills its process; a fleet must not be taken down one by one."""


def retrying(deadline: float) -> AsyncRetrying:
    """Attempts until `deadline` (of `time.monotonic`); the last error is raised as it was."""
    return AsyncRetrying(retry=_is_worth_another, wait=_wait_s, stop=_Stop(deadline), reraise=True)


def _error_of(state: RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome is not None else None


def _is_worth_another(state: RetryCallState) -> bool:
    error = _error_of(state)
    # A deadline that passed is not mended by trying again: it is this call's own.
    return isinstance(error, PolarRayError) and error.retryable and not isinstance(error, DeadlineExceeded)


def _wait_s(state: RetryCallState) -> float:
    """Full jitter over a doubling bound; after what the endpoint asked for, never before."""
    error = _error_of(state)
    asked = _seconds(error.details.get("retry_after_s")) if isinstance(error, PolarRayError) else 0.0
    bound = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (state.attempt_number - 1))
    return asked + random.uniform(0.0, bound)


def _seconds(given: object) -> float:
    """A wait that an endpoint asked for; 0 for what is none."""
    return float(given) if isinstance(given, int | float) and math.isfinite(given) and given > 0 else 0.0


class _Stop:
    """Stops at the deadline, before a wait that would pass it, and after too many lost connections."""

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline
        self._lost = 0

    def __call__(self, state: RetryCallState) -> bool:
        error = _error_of(state)
        self._lost += isinstance(error, PolarRayError) and CONNECTION_LOST in error.details
        return self._lost >= MOST_LOST_CONNECTIONS or time.monotonic() + state.upcoming_sleep >= self._deadline
