"""Whether a call may join the queue, and if not, when it is worth coming back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from polar_ray.errors import Overloaded
from polar_ray.serving.batcher import Batcher
from polar_ray.wire import Priority

GUESS_FACTOR = 4
"""By what a call can be larger than was guessed before its texts were encoded: a Chinese character is a token, of
English ones it takes four."""

BULK_FRACTION = 0.5
"""Of the queue: `bulk` calls are refused beyond it."""

MOST_RETRY_AFTER_S = 600.0
"""A guess further ahead is worth nothing."""

GUESSED_RETRY_AFTER_S = 1.0
"""While the engine's speed is not known."""


class Admission:
    """Keeps the queue of one replica short enough to be worth standing in.

    An interactive call is refused for what would be computed before it, not for all that waits: who is due first is
    first, so neither a call of ten thousand rows nor a backfill shuts out one of a single row. The bound is soft by one
    call of each priority: who comes while there is room is let in whole, however large. Deadlines are times of
    `time.monotonic`.
    """

    def __init__(self, batcher: Batcher, max_queued_tokens: int) -> None:
        self._batcher = batcher
        self._reserved: dict[Priority, list[int]] = {"interactive": [], "bulk": []}
        self.max_queued_tokens = max_queued_tokens

    @contextmanager
    def reserve(self, tokens: int, priority: Priority, deadline: float) -> Iterator[None]:
        """Room for a call that is being encoded, whose size is so far a guess. Raises `Overloaded` if there is none."""
        self._refuse_when_full(tokens, priority, deadline)
        self._reserved[priority].append(tokens)
        try:
            yield
        finally:
            self._reserved[priority].remove(tokens)

    def check_deadline(self, tokens: int, priority: Priority, deadline: float) -> None:
        """Raise `Overloaded` if a call of so many tokens cannot be done by its deadline.

        With an idle engine it is tried: coming back would gain nothing, and a speed that was measured in bad times is
        measured again.
        """
        if not self._batcher.pending_tokens():
            return
        needed_s = self._batcher.seconds_ahead(tokens, priority, deadline)
        remaining_s = deadline - time.monotonic()
        if needed_s is not None and needed_s > remaining_s:
            raise Overloaded(
                f"this would take about {needed_s:.1f} s and {remaining_s:.1f} s are left of the deadline; come back, "
                "ask for fewer rows, or give it longer",
                retry_after_s=_bounded(needed_s - remaining_s),
            )

    def pending_tokens(self, priority: Priority | None = None) -> int:
        """Tokens that wait, are being encoded or computed."""
        reserved = self._reserved.values() if priority is None else [self._reserved[priority]]
        return self._batcher.pending_tokens(priority) + sum(map(sum, reserved))

    def _refuse_when_full(self, tokens: int, priority: Priority, deadline: float) -> None:
        surplus = self._tokens_ahead(tokens, priority, deadline) - self.max_queued_tokens
        if priority == "bulk":
            surplus = max(surplus, self.pending_tokens("bulk") - int(self.max_queued_tokens * BULK_FRACTION))
        if surplus < 0:
            return
        rate = self._batcher.tokens_per_s
        leaving = surplus + self._batcher.token_budget  # tokens leave the queue an engine call at a time
        wait_s = GUESSED_RETRY_AFTER_S if rate is None else leaving / rate
        raise Overloaded(
            f"{self.pending_tokens()} tokens are queued and queue.max_queued_tokens = {self.max_queued_tokens}; come "
            "back later, or add replicas",
            retry_after_s=_bounded(wait_s),
        )

    def _tokens_ahead(self, tokens: int, priority: Priority, deadline: float) -> int:
        """Of all calls that may be due first, however much larger than guessed this one turns out."""
        if priority == "bulk":
            return self.pending_tokens()
        most = GUESS_FACTOR * tokens
        encoding = sum(reserved for reserved in self._reserved["interactive"] if reserved <= most)
        return self._batcher.tokens_ahead(most, priority, deadline) + encoding


def _bounded(seconds: float) -> float:
    return round(min(max(seconds, 0.1), MOST_RETRY_AFTER_S), 3)
