"""Whether a call may join the queue, and if not, when it is worth coming back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from polar_ray.errors import Overloaded
from polar_ray.serving.batcher import Batcher
from polar_ray.wire import Priority

BULK_FRACTION = 0.5
"""Of the queue: `bulk` calls are refused beyond it, so that `interactive` ones always find room."""

MOST_RETRY_AFTER_S = 600.0
"""A guess further ahead is worth nothing."""

GUESSED_RETRY_AFTER_S = 1.0
"""While the engine's speed is not known."""


class Admission:
    """Keeps the queue of one replica short enough to be worth standing in.

    The bound is soft by one call: who comes while there is room is let in whole, however large.
    """

    def __init__(self, batcher: Batcher, max_queued_tokens: int) -> None:
        self._batcher = batcher
        self._reserved: dict[Priority, int] = {"interactive": 0, "bulk": 0}
        self.max_queued_tokens = max_queued_tokens

    @contextmanager
    def reserve(self, tokens: int, priority: Priority) -> Iterator[None]:
        """Room for a call that is being encoded, whose size is so far a guess. Raises `Overloaded` if there is none."""
        self._refuse_when_full(priority)
        self._reserved[priority] += tokens
        try:
            yield
        finally:
            self._reserved[priority] -= tokens

    def check_deadline(self, tokens: int, priority: Priority, remaining_s: float) -> None:
        """Raise `Overloaded` if a call of so many tokens cannot be done in the time that is left."""
        needed_s = self._batcher.seconds_ahead(tokens, priority)
        if needed_s is not None and needed_s > remaining_s:
            raise Overloaded(
                f"this would take about {needed_s:.1f} s and {remaining_s:.1f} s are left of the deadline; come back, "
                "ask for fewer rows, or give it longer",
                retry_after_s=_bounded(needed_s - remaining_s),
            )

    def pending_tokens(self, priority: Priority | None = None) -> int:
        """Tokens that wait, are being encoded or computed."""
        reserved = sum(self._reserved.values()) if priority is None else self._reserved[priority]
        return self._batcher.pending_tokens(priority) + reserved

    def _refuse_when_full(self, priority: Priority) -> None:
        surplus = self.pending_tokens() - self.max_queued_tokens
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


def _bounded(seconds: float) -> float:
    return round(min(max(seconds, 0.1), MOST_RETRY_AFTER_S), 3)
