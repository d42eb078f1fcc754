"""The batcher: who shares an engine call, whose turn it is, and what becomes of calls that nobody waits for."""

import asyncio
import threading
import time

import numpy as np
import pytest

from polar_ray.encoding.encode import EncodedTriple
from polar_ray.errors import DeadlineExceeded, EngineError, EngineUnavailable, Unavailable
from polar_ray.scoring import Outcome
from polar_ray.serving.batcher import Batcher

PREFIX, OWN = 30, 10


def row(group: int, output: int) -> EncodedTriple:
    """A sequence of `PREFIX + OWN` tokens whose beginning is its group's."""
    ids = np.array([group] * PREFIX + [1000 + output] * OWN, dtype=np.int32)
    return EncodedTriple(ids, PREFIX, PREFIX)


def rows(group: int, *outputs: int) -> list[EncodedTriple]:
    return [row(group, output) for output in outputs]


def reward(encoded: EncodedTriple) -> float:
    return float(encoded.ids[0] * 10_000 + encoded.ids[-1])


class Engine:
    """Records what it is asked for; can be held until it is let go."""

    def __init__(self):
        self.calls: list[list[float]] = []
        self.let_go = threading.Event()
        self.let_go.set()
        self.error: Exception | None = None
        self.seconds = 0.0

    def __call__(self, encoded):
        self.let_go.wait(10)
        time.sleep(self.seconds)
        self.calls.append([reward(one) for one in encoded])
        if self.error is not None:
            raise self.error
        return [Outcome(reward(one), OWN) for one in encoded]

    @property
    def computed(self) -> list[float]:
        return [one for call in self.calls for one in call]


@pytest.fixture
def engine():
    engine = Engine()
    yield engine
    engine.let_go.set()


def run(test):
    """An async test, in a loop of its own."""
    return asyncio.run(test)


def in_seconds(seconds: float) -> float:
    return time.monotonic() + seconds


async def ask(batcher, encoded, priority="interactive", seconds=30.0):
    computed = await batcher.run(encoded, priority=priority, deadline=in_seconds(seconds))
    return [outcome.reward for outcome in computed.outcomes]


async def until(condition):
    deadline = in_seconds(10)
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.001)


async def start(engine, **settings):
    return Batcher(engine, **{"token_budget": 200, "batch_wait_s": 0.01, **settings})


async def hold(engine, batcher):
    """Keep the engine busy with a call of its own, so that everything asked from now on has to queue."""
    engine.let_go.clear()
    busy = asyncio.create_task(ask(batcher, rows(99, 0)))
    await until(lambda: batcher.computing_since is not None)
    return busy


def test_every_caller_gets_its_own_rewards_in_order(engine):
    async def test():
        batcher = await start(engine)
        given = [rows(group, *range(n)) for group, n in ((1, 3), (2, 1), (3, 17), (1, 2))]
        answers = await asyncio.gather(*(ask(batcher, encoded) for encoded in given))
        assert answers == [[reward(one) for one in encoded] for encoded in given]
        assert batcher.pending_tokens() == 0
        await batcher.close()

    run(test())


def test_no_rows_need_no_engine(engine):
    async def test():
        batcher = await start(engine)
        assert await ask(batcher, []) == []
        await batcher.close()

    run(test())
    assert engine.calls == []


def test_callers_that_come_together_share_an_engine_call(engine):
    async def test():
        batcher = await start(engine, batch_wait_s=0.2)
        await asyncio.gather(*(ask(batcher, rows(1, output)) for output in range(8)))
        await batcher.close()

    run(test())
    assert len(engine.calls) == 1


def test_a_group_is_taken_whole_although_others_came_between(engine):
    """Rows of four groups arrive in turn; the budget holds two groups, and no group is torn."""

    async def test():
        batcher = await start(engine, token_budget=2 * (PREFIX + 4 * OWN))
        busy = await hold(engine, batcher)
        calls = [asyncio.create_task(ask(batcher, rows(group, output))) for output in range(4) for group in range(1, 5)]
        await asyncio.sleep(0)
        engine.let_go.set()
        await asyncio.gather(busy, *calls)
        await batcher.close()

    run(test())
    groups = [{int(one // 10_000) for one in call} for call in engine.calls[1:]]
    assert groups == [{1, 2}, {3, 4}]


def test_an_engine_call_keeps_to_the_budget_unless_one_chunk_is_larger(engine):
    async def test():
        batcher = await start(engine, token_budget=100)
        wide = EncodedTriple(np.arange(500, dtype=np.int32), 400, 400)
        await asyncio.gather(ask(batcher, rows(1, *range(30))), ask(batcher, [wide]), ask(batcher, rows(2, *range(30))))
        await batcher.close()

    run(test())
    assert sorted(map(len, engine.calls)) == [1, 2, 2] + [7] * 8


def test_a_small_call_does_not_wait_for_a_large_one(engine):
    async def test():
        batcher = await start(engine)
        busy = await hold(engine, batcher)
        large = asyncio.create_task(ask(batcher, [row(group, 0) for group in range(100, 200)]))
        await asyncio.sleep(0)
        small = asyncio.create_task(ask(batcher, rows(5, 1)))
        await asyncio.sleep(0)
        engine.let_go.set()
        await small
        before = len(engine.calls)
        await asyncio.gather(busy, large)
        await batcher.close()
        return before

    assert run(test()) <= 3
    assert len(engine.calls) > 20


def test_a_stream_of_small_calls_does_not_keep_a_large_one_waiting(engine):
    async def test():
        batcher = await start(engine)
        engine.seconds = 0.001
        large = asyncio.create_task(ask(batcher, [row(group, 0) for group in range(100, 140)]))

        async def stream(group):
            n = 0
            while not large.done():
                await ask(batcher, rows(group, n))
                n += 1
            return n

        served = await asyncio.gather(*(stream(group) for group in range(1, 9)))
        await large
        await batcher.close()
        return served

    assert min(run(test())) > 10  # both got on: the small ones were not held up either


def test_bulk_yields_to_interactive_and_is_not_starved(engine):
    async def test():
        batcher = await start(engine, token_budget=PREFIX + OWN, bulk_share=0.25)
        busy = await hold(engine, batcher)
        bulk = asyncio.create_task(ask(batcher, [row(group, 0) for group in range(500, 540)], "bulk"))
        await asyncio.sleep(0)
        interactive = [asyncio.create_task(ask(batcher, [row(group, 0)])) for group in range(100, 140)]
        await asyncio.sleep(0)
        engine.let_go.set()
        await asyncio.gather(busy, *interactive)
        done = len(engine.calls) - 1 - len(interactive)
        await bulk
        await batcher.close()
        return done

    assert 8 <= run(test()) <= 11  # a quarter of forty, give or take where the line is cut


def test_an_idle_engine_is_all_bulks(engine):
    async def test():
        batcher = await start(engine)
        await ask(batcher, rows(1, *range(40)), "bulk")
        await batcher.close()

    run(test())
    assert len(engine.computed) == 40


def test_what_a_vanished_caller_asked_for_is_not_computed(engine):
    async def test():
        batcher = await start(engine)
        busy = await hold(engine, batcher)
        gone = asyncio.create_task(ask(batcher, rows(7, 1, 2, 3)))
        stays = asyncio.create_task(ask(batcher, rows(8, 1)))
        await asyncio.sleep(0)
        pending = batcher.pending_tokens()
        gone.cancel()
        await asyncio.sleep(0.01)
        assert batcher.pending_tokens() == pending - (PREFIX + 3 * OWN)
        engine.let_go.set()
        await asyncio.gather(busy, stays)
        await batcher.close()
        assert batcher.pending_tokens() == 0

    run(test())
    assert not [one for one in engine.computed if one // 10_000 == 7]


def test_a_caller_that_leaves_during_the_engine_call_harms_nobody(engine):
    async def test():
        batcher = await start(engine, batch_wait_s=0.05)
        engine.let_go.clear()
        gone, stays = (asyncio.create_task(ask(batcher, rows(1, output))) for output in (1, 2))
        await until(lambda: batcher.computing_since is not None)
        gone.cancel()
        await asyncio.sleep(0.01)
        engine.let_go.set()
        assert await stays == [reward(row(1, 2))]
        assert batcher.pending_tokens() == 0
        await batcher.close()

    run(test())


def test_work_past_its_deadline_is_refused_and_never_started(engine):
    async def test():
        batcher = await start(engine)
        busy = await hold(engine, batcher)
        with pytest.raises(DeadlineExceeded):
            await ask(batcher, rows(7, 1, 2, 3), seconds=0.05)
        engine.let_go.set()
        await busy
        await ask(batcher, rows(8, 1))
        await batcher.close()

    run(test())
    assert not [one for one in engine.computed if one // 10_000 == 7]


def test_rows_that_would_come_too_late_are_not_started(engine):
    """At a known speed the rest of a deadline can be seen to be too short for a call before it is over."""

    async def test():
        batcher = await start(engine)
        busy = await hold(engine, batcher)
        late = asyncio.create_task(ask(batcher, [row(group, 1) for group in range(100, 110)], seconds=20))
        others = asyncio.create_task(ask(batcher, rows(8, 1), seconds=500))
        await asyncio.sleep(0)
        batcher.tokens_per_s = 10.0  # each of the ten groups would be in time by itself
        engine.let_go.set()
        with pytest.raises(DeadlineExceeded, match="shorter than the engine needs"):
            await late
        await asyncio.gather(busy, others)
        assert batcher.pending_tokens() == 0
        await batcher.close()

    run(test())
    assert {int(one // 10_000) for one in engine.computed} == {99, 8}


def test_a_call_that_is_alone_is_tried_whatever_is_thought_of_the_engines_speed(engine):
    async def test():
        batcher = await start(engine)
        batcher.tokens_per_s = 0.001
        assert await ask(batcher, rows(7, 1), seconds=2) == [reward(row(7, 1))]
        await batcher.close()

    run(test())


def test_who_cannot_wait_passes_who_can(engine):
    """Three calls of one size: the shortest deadline is first, whoever came first."""

    async def test():
        batcher = await start(engine, token_budget=PREFIX + OWN)
        busy = await hold(engine, batcher)
        batcher.tokens_per_s = 1.0
        calls = [asyncio.create_task(ask(batcher, rows(group, 1), seconds=group)) for group in (400, 300, 500)]
        await asyncio.sleep(0)
        engine.let_go.set()
        await asyncio.gather(busy, *calls)
        await batcher.close()

    run(test())
    assert [int(one // 10_000) for one in engine.computed] == [99, 300, 400, 500]


def test_a_call_that_has_waited_long_for_its_size_is_first_whatever_its_deadline(engine):
    async def test():
        batcher = await start(engine, token_budget=PREFIX + OWN)
        busy = await hold(engine, batcher)
        batcher.tokens_per_s = 40 * 16 * 20.0  # one group is then due after a twentieth of a second
        patient = asyncio.create_task(ask(batcher, rows(1, 1), seconds=1000))
        await asyncio.sleep(0.2)
        hurried = asyncio.create_task(ask(batcher, rows(2, 1), seconds=20))
        await asyncio.sleep(0)
        engine.let_go.set()
        await asyncio.gather(busy, patient, hurried)
        await batcher.close()

    run(test())
    assert [int(one // 10_000) for one in engine.computed] == [99, 1, 2]


@pytest.mark.parametrize("error", [EngineUnavailable("gone"), RuntimeError("somebody's text")])
def test_an_engine_that_fails_is_an_error_for_its_callers_and_the_next_are_served(engine, error):
    async def test():
        batcher = await start(engine)
        engine.error = error
        with pytest.raises(EngineError) as raised:
            await ask(batcher, rows(1, 1))
        assert "somebody's text" not in str(raised.value)
        engine.error = None
        assert await ask(batcher, rows(2, 1)) == [reward(row(2, 1))]
        await batcher.close()

    run(test())


def test_closing_finishes_what_is_computed_and_refuses_what_waits(engine):
    async def test():
        batcher = await start(engine)
        busy = await hold(engine, batcher)
        waits = asyncio.create_task(ask(batcher, rows(7, 1)))
        await asyncio.sleep(0)
        assert batcher.is_alive
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0.05)
        engine.let_go.set()
        await closing
        await batcher.close()
        assert not batcher.is_alive
        with pytest.raises(Unavailable):
            await waits
        assert await busy == [reward(row(99, 0))]

    run(test())


def test_the_wait_is_foretold_from_the_queue_and_the_engines_speed(engine):
    async def test():
        batcher = await start(engine)
        assert batcher.seconds_ahead(100, "interactive", in_seconds(1000)) is None
        busy = await hold(engine, batcher)
        batcher.tokens_per_s = 100.0
        alone = batcher.seconds_ahead(100, "interactive", in_seconds(1000))
        assert alone == pytest.approx((PREFIX + OWN + 100) / 100)
        large = asyncio.create_task(ask(batcher, [row(group, 0) for group in range(100, 200)], seconds=1000))
        await asyncio.sleep(0)
        queued = 100 * (PREFIX + OWN)
        assert batcher.seconds_ahead(100, "interactive", in_seconds(1000)) == alone  # it would go before the large one
        behind = (PREFIX + OWN + queued + 100) / 100
        assert batcher.seconds_ahead(100_000, "interactive", in_seconds(2000)) == pytest.approx(behind + 999)
        assert batcher.seconds_ahead(100, "bulk", in_seconds(1000)) == pytest.approx(behind)
        large.cancel()
        engine.let_go.set()
        await busy
        await batcher.close()

    run(test())


def test_only_calls_that_fill_the_engine_tell_of_its_speed(engine):
    """One of a single row is mostly fixed cost: a queue judged by it would look many times longer than it is."""

    async def test():
        batcher = await start(engine)
        engine.seconds = 0.01
        await ask(batcher, rows(1, 1))
        assert batcher.tokens_per_s is None
        await ask(batcher, rows(1, *range(12)))
        known = batcher.tokens_per_s
        assert known is not None
        for _ in range(5):
            await ask(batcher, rows(1, 1))
        assert batcher.tokens_per_s == known
        await batcher.close()

    run(test())


def test_callers_that_leave_and_ask_again_do_not_pile_up(engine):
    async def test():
        batcher = await start(engine)
        busy = await hold(engine, batcher)
        stays = asyncio.create_task(ask(batcher, rows(5, 1)))
        for _ in range(20):
            gone = asyncio.create_task(ask(batcher, [row(group, 0) for group in range(100, 200)]))
            await asyncio.sleep(0)
            gone.cancel()
            await asyncio.sleep(0.001)
        assert len(batcher._queues["interactive"]) < 200
        engine.let_go.set()
        assert await stays == [reward(row(5, 1))]
        await busy
        await batcher.close()

    run(test())


def test_rows_cost_their_whole_length_where_prefixes_are_not_shared(engine):
    async def test(share_prefixes):
        batcher = await start(engine, token_budget=1000, share_prefixes=share_prefixes)
        busy = await hold(engine, batcher)
        before = batcher.pending_tokens()
        group = asyncio.create_task(ask(batcher, rows(1, *range(8))))
        await asyncio.sleep(0)
        cost = batcher.pending_tokens() - before
        engine.let_go.set()
        await asyncio.gather(busy, group)
        await batcher.close()
        return cost

    assert run(test(True)) == PREFIX + 8 * OWN
    assert run(test(False)) == 8 * (PREFIX + OWN)


def test_a_closed_batcher_refuses_at_once(engine):
    async def test():
        batcher = await start(engine)
        await batcher.close()
        with pytest.raises(Unavailable):
            await ask(batcher, rows(1, 1))

    run(test())


def test_a_storm_of_callers_leaves_nothing_behind(engine):
    """Five hundred calls, some cancelled, some late, of all sizes: who is answered is answered right."""

    async def test():
        random = np.random.default_rng(0)
        batcher = await start(engine, batch_wait_s=0.0)
        engine.seconds = 0.0005
        given = [[row(int(random.integers(1, 40)), int(o)) for o in random.integers(0, 9, n)] for n in
                 random.integers(1, 12, 500)]  # fmt: skip
        calls = []
        for place, encoded in enumerate(given):
            priority = "bulk" if place % 3 == 0 else "interactive"
            calls.append(asyncio.create_task(ask(batcher, encoded, priority, 0.05 if place % 7 == 0 else 30)))
            if place % 5 == 0:
                await asyncio.sleep(0.001)
                calls[int(random.integers(0, len(calls)))].cancel()
        answers = await asyncio.gather(*calls, return_exceptions=True)
        await until(lambda: batcher.computing_since is None and batcher.pending_tokens() == 0)
        await batcher.close()
        return given, answers

    given, answers = run(test())
    answered = [(encoded, got) for encoded, got in zip(given, answers, strict=True) if isinstance(got, list)]
    assert len(answered) > 250
    assert all(got == [reward(one) for one in encoded] for encoded, got in answered)
    refused = [got for got in answers if not isinstance(got, list)]
    assert {type(got) for got in refused} <= {asyncio.CancelledError, DeadlineExceeded}
