"""Admission: how full is too full, and when it is worth coming back."""

import time

import pytest

from polar_ray.errors import Overloaded
from polar_ray.serving.admission import Admission


class Queue:
    """A batcher's account of itself."""

    token_budget = 100
    most_ahead = 10_000

    def __init__(self, tokens_per_s=None, **pending):
        self.tokens_per_s = tokens_per_s
        self.pending = {"interactive": 0, "bulk": 0, **pending}

    def pending_tokens(self, priority=None):
        return sum(self.pending.values()) if priority is None else self.pending[priority]

    def tokens_ahead(self, tokens, priority, deadline):
        return self.pending_tokens() if priority == "bulk" else min(self.pending["interactive"], self.most_ahead)

    def seconds_ahead(self, tokens, priority, deadline):
        return None if self.tokens_per_s is None else (self.pending_tokens() + tokens) / self.tokens_per_s


def in_seconds(seconds):
    return time.monotonic() + seconds


def reserve(admission, tokens, priority):
    return admission.reserve(tokens, priority, in_seconds(60))


def test_there_is_room_until_the_limit_is_reached():
    queue = Queue(interactive=999)
    admission = Admission(queue, 1000)
    with reserve(admission, 50, "interactive"):
        assert admission.pending_tokens() == 1049
        with pytest.raises(Overloaded, match=r"queue\.max_queued_tokens = 1000"), reserve(admission, 50, "interactive"):
            pass
    assert admission.pending_tokens() == 999


def test_a_reservation_ends_with_the_error_that_ended_the_encoding():
    admission = Admission(Queue(), 1000)
    with pytest.raises(ValueError, match="no"), reserve(admission, 50, "bulk"):
        raise ValueError("no")
    assert admission.pending_tokens() == 0


def test_bulk_leaves_half_of_the_queue_to_interactive_calls():
    admission = Admission(Queue(bulk=500), 1000)
    with pytest.raises(Overloaded), reserve(admission, 1, "bulk"):
        pass
    with reserve(admission, 1, "interactive"):
        pass


@pytest.mark.parametrize(("rate", "wait"), [(None, 1.0), (100.0, 6.0), (1e9, 0.1), (1e-3, 600.0)])
def test_the_time_to_come_back_is_the_surplus_and_an_engine_call_over_the_engines_speed(rate, wait):
    admission = Admission(Queue(tokens_per_s=rate, interactive=1500), 1000)
    with pytest.raises(Overloaded) as refused, reserve(admission, 1, "interactive"):
        pass
    assert refused.value.details["retry_after_s"] == wait
    assert refused.value.retryable


def test_who_may_turn_out_larger_than_guessed_is_behind_those_of_like_size():
    """Else none of many that come at once would see the others before it."""
    admission = Admission(Queue(), 1000)
    with reserve(admission, 700, "interactive"), reserve(admission, 400, "interactive"):
        with pytest.raises(Overloaded), reserve(admission, 200, "interactive"):
            pass
        with reserve(admission, 90, "interactive"):
            pass


def test_one_large_call_and_a_backfill_shut_nobody_out():
    queue = Queue(interactive=9000, bulk=5000)
    queue.most_ahead = 300
    admission = Admission(queue, 1000)
    with reserve(admission, 300, "interactive"), reserve(admission, 300, "interactive"):
        with reserve(admission, 50, "interactive"):
            assert admission.pending_tokens() == 14650
        with pytest.raises(Overloaded), reserve(admission, 350, "interactive"), reserve(admission, 350, "interactive"):
            pass


def test_a_deadline_that_cannot_be_met_is_refused_at_once():
    admission = Admission(Queue(tokens_per_s=100.0, interactive=900), 1000)
    admission.check_deadline(100, "interactive", in_seconds(11.0))
    with pytest.raises(Overloaded, match=r"about 10\.0 s and 4\.0 s are left") as refused:
        admission.check_deadline(100, "interactive", in_seconds(4.0))
    assert refused.value.details["retry_after_s"] == pytest.approx(6.0, abs=0.2)


def test_an_idle_engine_is_tried_whatever_is_thought_of_its_speed():
    Admission(Queue(tokens_per_s=0.001), 1000).check_deadline(100, "interactive", in_seconds(1.0))


def test_nothing_is_foretold_while_the_speed_is_unknown():
    Admission(Queue(interactive=10**9), 1000).check_deadline(10**9, "bulk", in_seconds(0.001))
