"""Rows that kill their process are found in few deaths, others are not blamed, and nothing counts twice."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import polar_ray.corpus.tracker
from polar_ray.corpus.tracker import (
    DEATHS_BEFORE_NARROWING,
    ENGINE_FAILURES_BEFORE_GIVING_UP,
    FAILED_STARTS_BEFORE_GIVING_UP,
    NARROWING,
    OVERDUE_SECONDS,
    PRESENT_SECONDS,
    JobTracker,
    Rows,
)
from polar_ray.errors import EngineError, JobError

UNIT = 7


def work(tracker, rows, poison=(), dies_at=(), unit=UNIT):
    """Processes go through a unit, each until it meets a row that kills it or its number is in `dies_at`, until one
    comes to the end. Gives the last assignment and the number of deaths."""
    for deaths in range(100_000):
        assignment = tracker.begin(unit, rows)
        check_coverage(assignment, rows)
        for part in assignment.ranges:
            tracker.mark(unit, part)
            if deaths in dies_at or any(part.start <= row < part.stop for row in poison):
                break
            tracker.progress(unit, part.stop - part.start, 10, 5)
        else:
            tracker.finish(unit, rows, 10 * rows, 5 * rows)
            return assignment, deaths
    raise AssertionError("no process came to the end")


def check_coverage(assignment, rows):
    """Every row is in one range or in quarantine, and ranges are in order."""
    seen = [row for part in assignment.ranges for row in range(part.start, part.stop)]
    assert seen == [row for row in range(rows) if row not in assignment.quarantined]


def test_without_deaths_a_unit_is_one_range():
    tracker = JobTracker()
    assert work(tracker, 4096)[0].ranges == (Rows(0, 4096),)
    assert (tracker.snapshot().deaths, tracker.snapshot().quarantined) == (0, 0)


@pytest.mark.parametrize("row", [0, 1, 511, 512, 2048, 4095])
def test_a_poison_row_among_4096_is_found_by_the_seventh_death(row):
    tracker = JobTracker()
    assignment, deaths = work(tracker, 4096, {row})
    assert assignment.quarantined == {row}
    assert deaths <= 7
    assert (tracker.snapshot().deaths, tracker.snapshot().quarantined) == (deaths, 1)


@pytest.mark.parametrize("rows", [{0, 1}, {0, 4095}, {2047, 2048}, {5, 6}])
def test_two_poison_rows_among_4096_are_found_in_a_dozen_deaths(rows):
    assignment, deaths = work(JobTracker(), 4096, rows)
    assert assignment.quarantined == rows
    assert deaths <= 12


@pytest.mark.parametrize(("rows", "most"), [(1, 2), (2, 4), (8, 4), (9, 5), (64, 5), (100_000, 9)])
def test_units_of_any_size_give_up_their_poison_row(rows, most):
    assignment, deaths = work(JobTracker(), rows, {rows - 1})
    assert assignment.quarantined == {rows - 1}
    assert deaths <= most


def test_a_unit_of_nothing_but_poison_comes_to_its_end():
    assignment, deaths = work(JobTracker(), 32, set(range(32)))
    assert assignment.quarantined == set(range(32))
    assert assignment.ranges == ()
    assert deaths <= 2 * 32 + 3 + NARROWING


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(1, 4096), data=st.data())
def test_poison_rows_are_found_exactly_in_a_bounded_number_of_deaths(rows, data):
    poison = data.draw(st.sets(st.integers(0, rows - 1), max_size=5))
    assignment, deaths = work(JobTracker(), rows, poison)
    assert assignment.quarantined == poison
    assert deaths <= 2 + 5 * len(poison)


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(2, 4096), data=st.data())
def test_deaths_that_no_row_is_to_blame_for_quarantine_none(rows, data):
    poison = data.draw(st.sets(st.integers(1, rows - 1), max_size=3))
    assignment, _ = work(JobTracker(), rows, poison, dies_at={0, 1})
    assert assignment.quarantined == poison


def test_every_death_is_told_to_whoever_tries_next():
    tracker = JobTracker()
    tracker.begin(UNIT, 4)
    tracker.begin(UNIT, 4)
    tracker.mark(UNIT, Rows(0, 4))
    second, third = tracker.begin(UNIT, 4), tracker.begin(UNIT + 1, 4)
    assert (second.deaths, second.other_deaths, second.ranges) == (2, 1, (Rows(0, 4),))
    assert third.deaths == 0


def test_one_death_changes_nothing():
    tracker = JobTracker()
    tracker.begin(UNIT, 100)
    tracker.mark(UNIT, Rows(0, 100))
    assert tracker.begin(UNIT, 100).ranges == (Rows(0, 100),)
    assert tracker.snapshot().deaths == 1
    assert work(tracker, 100)[0].quarantined == frozenset()


def test_one_death_of_a_single_row_does_not_quarantine_it():
    tracker = JobTracker()
    assignment, deaths = work(tracker, 1, dies_at={0})
    assert (assignment.quarantined, deaths) == (frozenset(), 1)


def test_a_death_before_any_row_was_marked_blames_none():
    tracker = JobTracker()
    for _ in range(10):
        assert tracker.begin(UNIT, 100).ranges == (Rows(0, 100),)
    assert tracker.begin(UNIT, 100).other_deaths == 10


def test_a_death_in_one_unit_says_nothing_of_another():
    tracker = JobTracker()
    for unit in (1, 2):
        tracker.begin(unit, 100)
        tracker.mark(unit, Rows(0, 100))
    for unit in (1, 2):
        assert tracker.begin(unit, 100).ranges == (Rows(0, 100),)


def test_a_process_that_leaves_because_its_engine_fails_is_no_death():
    tracker = JobTracker()
    for attempt in range(1, ENGINE_FAILURES_BEFORE_GIVING_UP + 1):
        assert tracker.begin(UNIT, 100).ranges == (Rows(0, 100),)
        tracker.mark(UNIT, Rows(0, 100))
        assert tracker.engine_failed(UNIT) == (attempt < ENGINE_FAILURES_BEFORE_GIVING_UP)
    assert tracker.snapshot().deaths == 0


def test_processes_that_die_at_the_start_are_counted_and_bounded():
    tracker = JobTracker(most_actors=2)
    allowed = FAILED_STARTS_BEFORE_GIVING_UP * 2
    assert [tracker.starting() for _ in range(allowed + 2)] == [True] * allowed + [False] * 2


def test_a_start_that_succeeds_clears_the_count():
    tracker = JobTracker(most_actors=1)
    for _ in range(5):
        assert [tracker.starting() for _ in range(FAILED_STARTS_BEFORE_GIVING_UP)] == [True] * 3
        tracker.started()
    assert tracker.snapshot().actors == 5


def test_each_nodes_weights_are_checked_by_its_first_actor():
    tracker = JobTracker()
    assert [tracker.claim_check(node) for node in ("a", "b", "a")] == ["check", "check", "wait"]
    tracker.pass_check("a")
    assert [tracker.claim_check(node) for node in ("a", "b")] == ["passed", "wait"]


def test_progress_is_counted_as_it_is_made_and_once_when_the_unit_is_done():
    tracker = JobTracker()
    tracker.begin(UNIT, 100)
    tracker.mark(UNIT, Rows(0, 100))
    tracker.progress(UNIT, 40, 400, 200)
    tracker.progress(UNIT, 20, 200, 100)
    snapshot = tracker.snapshot()
    assert (snapshot.rows, snapshot.tokens, snapshot.computed_tokens) == (60, 600, 300)
    assert [(stuck.unit, stuck.rows) for stuck in snapshot.in_flight] == [(UNIT, Rows(0, 100))]
    tracker.finish(UNIT, 100, 1000, 500)
    snapshot = tracker.snapshot()
    assert (snapshot.rows, snapshot.tokens, snapshot.computed_tokens) == (100, 1000, 500)
    assert snapshot.in_flight == ()


def test_rows_of_a_process_that_died_are_not_counted_again_in_the_next():
    tracker = JobTracker()
    for _ in range(3):
        assignment = tracker.begin(UNIT, 100)
        tracker.mark(UNIT, assignment.ranges[0])
        tracker.progress(UNIT, 60, 600, 300)
        assert tracker.snapshot().rows == 60
    tracker.begin(UNIT, 100)
    assert tracker.snapshot().rows == 0


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.tuples(st.integers(1, 300), st.sets(st.integers(0, 299), max_size=2), st.sets(st.integers(0, 3))), max_size=5
    )
)
def test_when_all_is_done_every_row_was_counted_once(units):
    tracker = JobTracker()
    for unit, (rows, poison, dies_at) in enumerate(units):
        work(tracker, rows, {row for row in poison if row < rows}, dies_at, unit)
    snapshot = tracker.snapshot()
    total = sum(rows for rows, _, _ in units)
    assert (snapshot.rows, snapshot.tokens, snapshot.computed_tokens) == (total, 10 * total, 5 * total)


def test_a_unit_that_is_finished_twice_counts_once():
    tracker = JobTracker()
    for _ in range(2):  # the first process was slow, not dead
        tracker.begin(UNIT, 100)
        tracker.mark(UNIT, Rows(0, 100))
    for _ in range(2):
        tracker.progress(UNIT, 50, 500, 250)
        tracker.finish(UNIT, 100, 1000, 500)
    assert tracker.snapshot().rows == 100


def test_a_process_that_was_given_up_for_dead_may_go_on_talking():
    tracker = JobTracker()
    for _ in range(3):
        tracker.begin(UNIT, 100)
        tracker.mark(UNIT, Rows(0, 100))
    tracker.begin(UNIT, 100)
    tracker.mark(UNIT, Rows(0, 100))  # the rows as they were before they were narrowed
    tracker.begin(UNIT, 100)
    assert work(tracker, 100)[0].quarantined == frozenset()
    tracker.mark(UNIT, Rows(0, 100))
    assert tracker.progress(UNIT, 1, 1, 1) == "drop"
    assert tracker.engine_failed(UNIT)
    assert tracker.snapshot().rows == 100


def test_a_tracker_that_was_restarted_goes_on_with_units_it_has_never_heard_of():
    tracker = JobTracker()
    tracker.mark(UNIT, Rows(0, 8))
    assert tracker.progress(UNIT, 5, 5, 5) == "go_on"
    assert tracker.engine_failed(UNIT)
    tracker.finish(UNIT, 10, 10, 10)
    assert tracker.snapshot().rows == 10


class Clock:
    """In place of the module's clock: it stands until it is moved."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(polar_ray.corpus.tracker, "time", clock)
    return clock


def at_work(clock, units=4, seconds=20.0):
    """A tracker of units of 100 rows, the first of which was finished in so many seconds."""
    tracker = JobTracker(2, range(units))
    tracker.begin(0, 100)
    clock.now += seconds
    tracker.finish(0, 100, 1000, 500)
    return tracker


def test_an_idle_actor_is_given_what_nobody_has_begun_from_the_end(clock):
    tracker = at_work(clock)
    tracker.begin(1, 100)
    assert [tracker.back_up("a") for _ in range(3)] == [3, 2, "wait"]


def test_a_unit_is_overdue_after_twice_the_time_its_rows_take_and_is_given_out_once_for_each_such_time(clock):
    tracker = at_work(clock, units=2)
    tracker.begin(1, 200)
    clock.now += 79
    assert tracker.back_up("a") == "wait"
    clock.now += 2
    assert tracker.back_up("a") == 1
    tracker.begin(1, 200, "a")
    assert tracker.back_up("b") == "wait"
    clock.now += 81
    assert tracker.back_up("b") == 1


def test_no_unit_is_overdue_before_one_is_done(clock):
    tracker = JobTracker(2, [0])
    tracker.begin(0, 100)
    clock.now += 1e6
    assert tracker.back_up("a") == "wait"


def test_small_units_are_not_overdue_at_once(clock):
    tracker = at_work(clock, units=2, seconds=0.01)
    tracker.begin(1, 100)
    clock.now += OVERDUE_SECONDS - 1
    assert tracker.back_up("a") == "wait"
    clock.now += 2
    assert tracker.back_up("a") == 1


def test_more_idle_actors_than_units_may_leave(clock):
    tracker = at_work(clock, units=3)
    assert tracker.back_up("a") == 2
    tracker.begin(1, 100)
    tracker.begin(2, 100, "a")
    assert [tracker.back_up(who) for who in "bcd"] == ["wait", "wait", "leave"]
    clock.now += PRESENT_SECONDS + 1
    assert tracker.back_up("d") == "wait", "those that are gone take nobody's place"


def test_the_first_file_wins_and_the_other_is_told_to_drop_the_unit(clock):
    tracker = at_work(clock, units=2)
    tracker.begin(1, 100)
    clock.now += 100
    assert tracker.back_up("a") == 1
    tracker.begin(1, 100, "a")
    assert tracker.progress(1, 100, 1000, 500, "a") == "go_on"
    assert tracker.progress(1, 60, 600, 300) == "go_on"
    assert tracker.snapshot().rows == 200, "a unit's rows are counted once, of whoever is ahead"
    assert tracker.scored(1, "a") == "go_on"
    tracker.finish(1, 100, 1000, 500, "a")
    assert (tracker.progress(1, 10, 100, 50), tracker.scored(1)) == ("drop", "drop")
    assert (tracker.snapshot().rows, tracker.snapshot().finished) == (200, 2)
    assert tracker.back_up("a") == "leave"


def test_an_actor_that_asks_for_work_has_died_on_what_it_had(clock):
    tracker = at_work(clock, units=2)
    tracker.begin(1, 100)
    clock.now += 100
    for _ in range(DEATHS_BEFORE_NARROWING):
        assert tracker.back_up("a") == 1
        assignment = tracker.begin(1, 100, "a")
        tracker.mark(1, assignment.ranges[0], "a")
        clock.now += 100
    tracker.back_up("a")
    assert tracker.snapshot().deaths == DEATHS_BEFORE_NARROWING
    assert len(tracker.begin(1, 100, "a").ranges) == NARROWING


def test_a_job_that_stops_lets_idle_actors_go(clock):
    tracker = at_work(clock)
    tracker.stop()
    assert (tracker.back_up("a"), tracker.progress(1, 1, 1, 1)) == ("leave", "stop")


def test_the_first_error_is_the_jobs():
    tracker = JobTracker()
    assert tracker.snapshot().error is None
    first = EngineError("the first")
    for error in (first, JobError("the second")):
        tracker.fail(error)
    assert tracker.snapshot().error is first


def test_a_stopped_job_tells_everybody_at_their_next_word():
    tracker = JobTracker()
    tracker.begin(UNIT, 10)
    assert tracker.progress(UNIT, 1, 1, 1) == "go_on"
    tracker.stop()
    assert tracker.progress(UNIT, 1, 1, 1) == "stop"
    assert tracker.progress(99, 1, 1, 1) == "stop"


def test_time_without_progress_runs_from_the_last_word(monkeypatch):
    now = 1000.0
    monkeypatch.setattr("polar_ray.corpus.tracker.time.monotonic", lambda: now)
    tracker = JobTracker()
    tracker.begin(UNIT, 10)
    tracker.mark(UNIT, Rows(0, 10))
    for say in (tracker.started, lambda: tracker.progress(UNIT, 1, 1, 1), lambda: tracker.finish(8, 1, 1, 1)):
        now += 60
        assert tracker.snapshot().seconds_since_progress == 60
        say()
        assert tracker.snapshot().seconds_since_progress == 0
    assert tracker.snapshot().in_flight[0].seconds == 180


def test_deaths_outside_the_engine_are_counted_and_blamed_on_no_row():
    tracker = JobTracker()
    assert tracker.begin(0, 8).other_deaths == 0
    assert tracker.begin(0, 8).other_deaths == 1  # died while reading
    tracker.mark(0, Rows(0, 8))
    tracker.scored(0)
    again = tracker.begin(0, 8)  # died while writing
    assert again.other_deaths == 2
    assert again.ranges == (Rows(0, 8),)
    assert not again.quarantined


def test_a_process_that_dies_with_two_units_in_its_hands_died_once():
    """One of them is written while the next is begun."""
    tracker = JobTracker()
    for unit in (0, 1):
        tracker.begin(unit, 8, process="a")
        tracker.mark(unit, Rows(0, 8))
        tracker.scored(unit)
    assert [tracker.begin(unit, 8, process="b").other_deaths for unit in (0, 1)] == [1, 1]
    assert tracker.snapshot().deaths == 1
    tracker.begin(1, 8, process="c")
    assert tracker.snapshot().deaths == 2
