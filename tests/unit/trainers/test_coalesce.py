"""Many callers, few calls: who gets what, who gets which error, and what a caller that leaves does to the others."""

import asyncio

import pytest

from polar_ray.errors import Overloaded, RequestTooLarge, Unavailable
from polar_ray.trainers.coalesce import Coalescer
from polar_ray.triples import Scored, Triple


def triple(number):
    return Triple("p", "r", str(number))


class Sent:
    """Answers each triple with the number in its output; remembers every call."""

    def __init__(self, error=None, most=None, hangs=False):
        self.calls = []
        self.cancelled = 0
        self._error, self._most, self._hangs = error, most, hangs

    async def __call__(self, triples):
        self.calls.append([int(each.output) for each in triples])
        if self._hangs:
            try:
                await asyncio.Event().wait()
            finally:
                self.cancelled += 1
        if self._most is not None and len(triples) > self._most:
            raise RequestTooLarge("too many", max_rows=self._most)
        if self._error is not None:
            raise self._error
        return [Scored(float(each.output)) for each in triples]


def rewards(rows):
    return [row.reward for row in rows]


def test_callers_of_one_moment_share_a_call_and_each_gets_its_own_rows_in_order():
    sent = Sent()

    async def run():
        coalescer = Coalescer(sent)
        return await asyncio.gather(*(coalescer.ask([triple(2 * n), triple(2 * n + 1)]) for n in range(50)))

    assert [rewards(rows) for rows in asyncio.run(run())] == [[2.0 * n, 2.0 * n + 1] for n in range(50)]
    assert sent.calls == [list(range(100))]


def test_callers_of_different_moments_do_not_wait_for_each_other():
    sent = Sent()

    async def run():
        coalescer = Coalescer(sent, wait_s=0.001)
        return [rewards(await coalescer.ask([triple(n)])) for n in range(3)]

    assert asyncio.run(run()) == [[0.0], [1.0], [2.0]]
    assert sent.calls == [[0], [1], [2]]


def test_enough_rows_are_sent_without_waiting():
    sent = Sent()

    async def run():
        coalescer = Coalescer(sent, wait_s=3600, most_rows=4)
        return await asyncio.gather(*(coalescer.ask([triple(n)]) for n in range(8)))

    assert [rewards(rows) for rows in asyncio.run(run())] == [[float(n)] for n in range(8)]
    assert sent.calls == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_caller_that_fills_a_request_goes_at_once_and_by_itself():
    small, large = Sent(), Sent(hangs=True)

    async def run():
        coalescer = Coalescer(small, send_large=large, wait_s=0.001, rows_of_a_request=3)
        before = asyncio.create_task(coalescer.ask([triple(0)]))
        giant = asyncio.create_task(coalescer.ask([triple(n) for n in range(10, 13)]))
        after = asyncio.create_task(coalescer.ask([triple(1), triple(2)]))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        sent_at_once = [list(call) for call in large.calls], list(small.calls)
        answers = rewards(await before), rewards(await after)
        giant.cancel()
        await asyncio.wait([giant])
        await coalescer.aclose()
        return sent_at_once, answers

    sent_at_once, answers = asyncio.run(run())
    assert sent_at_once == ([[10, 11, 12]], [])
    assert answers == ([0.0], [1.0, 2.0])
    assert small.calls == [[0, 1, 2]]
    assert large.cancelled == 1


def test_without_a_way_of_their_own_large_callers_take_the_others():
    sent = Sent()
    assert rewards(asyncio.run(Coalescer(sent, rows_of_a_request=1).ask([triple(4)]))) == [4.0]


def test_nothing_asked_is_nothing_sent():
    sent = Sent()
    assert asyncio.run(Coalescer(sent).ask([])) == []
    assert sent.calls == []


def test_every_caller_gets_an_error_object_of_its_own():
    async def run():
        coalescer = Coalescer(Sent(error=Overloaded("full", retry_after_s=3)))
        return await asyncio.gather(*(coalescer.ask([triple(n)]) for n in range(3)), return_exceptions=True)

    errors = asyncio.run(run())
    assert [(type(error), str(error), error.details) for error in errors] == [
        (Overloaded, "full", {"retry_after_s": 3})
    ] * 3
    assert len({id(error) for error in errors}) == 3


def test_a_giant_fails_its_own_caller_alone():
    sent = Sent(most=3)

    async def run():
        coalescer = Coalescer(sent)
        giant = coalescer.ask([triple(n) for n in range(10, 15)])
        small = [coalescer.ask([triple(n)]) for n in range(4)]
        return await asyncio.gather(*small[:2], giant, *small[2:], return_exceptions=True)

    first, second, failed, third, fourth = asyncio.run(run())
    assert [rewards(rows) for rows in (first, second, third, fourth)] == [[0.0], [1.0], [2.0], [3.0]]
    assert isinstance(failed, RequestTooLarge)


def test_a_caller_that_leaves_while_waiting_is_not_sent():
    sent = Sent()

    async def run():
        coalescer = Coalescer(sent)
        asked = [asyncio.create_task(coalescer.ask([triple(n)])) for n in range(3)]
        await asyncio.sleep(0)
        asked[1].cancel()
        return await asyncio.gather(*asked, return_exceptions=True)

    stayed, left, also_stayed = asyncio.run(run())
    assert (rewards(stayed), rewards(also_stayed)) == ([0.0], [2.0])
    assert isinstance(left, asyncio.CancelledError)
    assert sent.calls == [[0, 2]]


@pytest.mark.parametrize(("leaving", "cancelled"), [(1, 0), (2, 1)], ids=["one of two", "both"])
def test_a_call_is_cancelled_when_nobody_waits_for_it_any_more(leaving, cancelled):
    sent = Sent(hangs=True)

    async def run():
        coalescer = Coalescer(sent, wait_s=0.001)
        asked = [asyncio.create_task(coalescer.ask([triple(n)])) for n in range(2)]
        while not sent.calls:
            await asyncio.sleep(0.001)
        for one in asked[:leaving]:
            one.cancel()
        await asyncio.wait(asked, timeout=0.02)
        found = sent.cancelled
        await coalescer.aclose()
        return found, [one for one in asked if not one.cancelled()]

    found, stayed = asyncio.run(run())
    assert found == cancelled
    assert [type(one.exception()) for one in stayed] == [Unavailable] * (2 - leaving)


def test_closing_fails_who_waits_to_be_sent():
    sent = Sent()

    async def run():
        coalescer = Coalescer(sent, wait_s=3600)
        asked = asyncio.create_task(coalescer.ask([triple(1)]))
        await asyncio.sleep(0)
        await coalescer.aclose()
        return await asyncio.gather(asked, return_exceptions=True)

    assert [type(error) for error in asyncio.run(run())] == [Unavailable]
    assert sent.calls == []
