"""The account of a unit, and the sum of accounts, which is the same whoever adds them up in which order."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polar_ray.corpus.summary import UnitReport, combine, length_bin, report_unit
from polar_ray.errors import RowUnreadable
from polar_ray.health import REWARD_BIN, RewardHealth, Spread
from polar_ray.scoring import Usage
from polar_ray.triples import Scored, Triple

COUNTS = st.integers(0, 1000)
BINS = st.dictionaries(st.integers(-60, 60), st.integers(1, 100), max_size=5)
WHOLE = st.integers(-1000, 1000).map(float)  # exact sums, so that order cannot show
REPORTS = st.builds(
    UnitReport,
    rows=COUNTS,
    ok=COUNTS,
    by_status=st.dictionaries(st.sampled_from(["ok", "triple_empty", "engine_failed"]), COUNTS),
    tokens=COUNTS,
    computed_tokens=COUNTS,
    duplicates=COUNTS,
    cut_rows=COUNTS,
    cut_tokens=COUNTS,
    control_token_rows=COUNTS,
    seconds=WHOLE,
    engine_seconds=WHOLE,
    reward_sum=WHOLE,
    reward_square_sum=WHOLE,
    lowest_reward=st.none() | WHOLE,
    highest_reward=st.none() | WHOLE,
    reward_bins=BINS,
    length_bins=BINS,
    spread=st.builds(Spread, groups=COUNTS, zero_groups=COUNTS, bins=BINS),
    finished=st.lists(st.tuples(WHOLE, COUNTS, COUNTS, COUNTS), max_size=3).map(sorted),
)


def triple(prompt="p", reference="r", output="o"):
    return Triple(prompt, reference, output)


def spread_of(*rows):
    """The spread of rows given as (prompt, reward)."""
    triples = [RowUnreadable("bad") if prompt is None else triple(prompt) for prompt, _ in rows]
    scored = [Scored(None, "engine_failed", "x") if reward is None else Scored(reward, tokens=1) for _, reward in rows]
    return report_unit(triples, scored, Usage(), 1.0).spread


def test_a_report_counts_rows_by_what_came_of_them():
    scored = [
        Scored(-1.0, tokens=8, cut_tokens=2),
        Scored(0.5, tokens=16, removed_control_tokens=1),
        Scored(None, "row_unreadable", "x"),
        Scored(None, "engine_failed", "x", tokens=4, cut_tokens=1),
    ]
    triples = [triple("a"), triple("b"), RowUnreadable("x"), triple("c")]
    report = report_unit(triples, scored, Usage(3, 28, 20, 1, 0.25), seconds=2.0)
    assert (report.rows, report.ok, report.failed) == (4, 2, 2)
    assert report.by_status == {"ok": 2, "row_unreadable": 1, "engine_failed": 1}
    assert (report.tokens, report.computed_tokens, report.duplicates) == (28, 20, 1)
    assert (report.cut_rows, report.cut_tokens, report.control_token_rows) == (2, 3, 1)
    assert (report.seconds, report.engine_seconds) == (2.0, 0.25)
    assert (report.lowest_reward, report.highest_reward, report.reward_mean) == (-1.0, 0.5, -0.25)
    assert report.reward_std == pytest.approx(0.75)
    assert report.reward_bins == {-4: 1, 2: 1}
    assert report.length_bins == {12: 1, 16: 1, 8: 1}
    ((_, *counts),) = report.finished
    assert counts == [4, 28, 20]


def test_a_unit_without_rewards_has_no_mean_and_no_extremes():
    report = report_unit([RowUnreadable("x")], [Scored(None, "row_unreadable", "x")], Usage(), 1.0)
    assert (report.reward_mean, report.reward_std, report.lowest_reward, report.highest_reward) == (None,) * 4
    assert (report.rows, report.ok, report.reward_bins, report.length_bins) == (1, 0, {}, {})


def test_equal_rewards_have_no_deviation_however_they_round():
    scored = [Scored(0.1, tokens=1)] * 1000
    assert report_unit([triple()] * 1000, scored, Usage(), 1.0).reward_std == pytest.approx(0, abs=1e-6)


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=30))
def test_every_reward_is_in_the_bin_that_holds_it(rewards):
    report = report_unit([triple()] * len(rewards), [Scored(reward, tokens=1) for reward in rewards], Usage(), 1.0)
    assert sum(report.reward_bins.values()) == len(rewards)
    for reward in rewards:
        assert report.reward_bins[math.floor(reward / REWARD_BIN)] >= 1


@given(st.integers(1, 1 << 20))
def test_a_length_is_between_the_edges_of_its_bin(tokens):
    place = length_bin(tokens)
    assert 2 ** (place / 4) <= tokens * (1 + 1e-9)
    assert tokens * (1 - 1e-9) < 2 ** ((place + 1) / 4)


def test_neighbours_with_one_prompt_and_reference_are_a_group():
    spread = spread_of(("a", 0.0), ("a", 1.0), ("a", 0.5), ("b", 3.0), ("c", 2.0), ("c", 2.0))
    assert (spread.groups, spread.zero_groups, spread.bins) == (2, 1, {4: 1, 0: 1})


def test_rows_without_a_reward_are_of_no_group_and_part_none():
    assert spread_of(("a", 0.0), ("a", None), (None, None), ("a", 0.25)).bins == {1: 1}
    assert spread_of(("a", 0.0), ("a", None)).groups == 0


def test_groups_that_are_not_neighbours_are_two():
    assert spread_of(("a", 0.0), ("b", 0.0), ("a", 1.0)).groups == 0


def test_conversations_and_references_tell_groups_apart():
    conversation = [{"role": "user", "content": "a"}]
    rows = [triple(conversation), triple(list(conversation)), triple(conversation, "other"), triple("a"), triple("a")]
    report = report_unit(rows, [Scored(float(n), tokens=1) for n in range(5)], Usage(), 1.0)
    assert (report.spread.groups, report.spread.zero_groups) == (2, 0)


def test_nothing_sums_to_nothing():
    assert combine([]) == UnitReport()


@settings(deadline=None, max_examples=50)
@given(st.lists(REPORTS, max_size=5), st.randoms(use_true_random=False))
def test_the_order_of_reports_does_not_matter(reports, random):
    shuffled = random.sample(reports, len(reports))
    assert combine(shuffled) == combine(reports)


@settings(deadline=None, max_examples=50)
@given(REPORTS, REPORTS, REPORTS)
def test_sums_may_be_summed(one, two, three):
    assert combine([combine([one, two]), three]) == combine([one, combine([two, three])]) == combine([one, two, three])


@settings(deadline=None, max_examples=50)
@given(REPORTS, REPORTS)
def test_summing_changes_no_report(one, two):
    before = one.model_copy(deep=True), two.model_copy(deep=True)
    combine([one, two]).by_status["new"] = 1
    assert (one, two) == before


@settings(deadline=None, max_examples=50)
@given(REPORTS)
def test_one_report_is_its_own_sum_and_survives_json(report):
    assert combine([report]) == report
    assert UnitReport.model_validate_json(report.model_dump_json()) == report


def test_every_field_of_a_report_is_summed():
    """A field that is added to `UnitReport` and forgotten in `combine` would vanish from every job's report."""
    report = report_unit(
        [triple("a"), triple("a"), triple("b")],
        [Scored(1.0, tokens=5, cut_tokens=1, removed_control_tokens=1), Scored(1.0, tokens=5), Scored(None, "x", "x")],
        Usage(3, 10, 8, 1, 0.5, 2, 64, 1e9, 4e9),
        2.0,
    )
    total = combine([report, report])
    for name in UnitReport.model_fields.keys() - {"lowest_reward", "highest_reward", "spread", "health", "finished"}:
        was, now = getattr(report, name), getattr(total, name)
        assert now == ({key: 2 * count for key, count in was.items()} if isinstance(was, dict) else 2 * was), name
        assert was, name
    assert total.spread == Spread(groups=2, zero_groups=2, bins={0: 2})
    assert total.finished == report.finished * 2


def test_a_report_of_an_earlier_version_can_be_read():
    old = """{"rows": 3, "ok": 2, "by_status": {"ok": 2, "triple_empty": 1}, "tokens": 50, "computed_tokens": 40,
    "duplicates": 0, "cut_rows": 0, "cut_tokens": 0, "control_token_rows": 0, "seconds": 1.0, "engine_seconds": 0.5,
    "reward_sum": 1.0, "reward_square_sum": 1.0, "lowest_reward": 0.0, "highest_reward": 1.0,
    "reward_bins": {"0": 1, "4": 1}, "length_bins": {"18": 2},
    "spread": {"groups": 1, "zero_groups": 0, "bins": {"4": 1}},
    "finished": [[1763870020.0, 3, 50, 40]]}"""
    report = UnitReport.model_validate_json(old)
    assert combine([report, report]).ok == 4
    assert report.health == RewardHealth()


def test_the_sum_of_a_reports_health_is_the_healths_sum():
    scored = [Scored(1.0, tokens=5), Scored(0.0, tokens=5)]
    report = report_unit([triple(output="r"), triple(output="longer")], scored, Usage(), 1.0)
    total = combine([report, report])
    assert (total.health.rows, total.health.equal_echoes, total.health.length.x) == (4, 2, 14)
    assert total.health.length_in_groups.correlation == pytest.approx(-1)
