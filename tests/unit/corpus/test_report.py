"""The page says what the counts say, whatever the counts are."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polar_ray.corpus.history import MOST_BUCKETS, MOST_PAUSES, trace
from polar_ray.corpus.rates import time_ticks
from polar_ray.corpus.report import ReportFacts, write_report
from polar_ray.corpus.summary import UnitReport, combine, length_bin
from polar_ray.corpus.trend import Part
from polar_ray.errors import EmptyText
from polar_ray.health import Moments, RewardHealth, Spread

STARTED = 1_763_870_000.0
FACTS = ReportFacts(
    title="scored",
    model="embedded",
    receipt={"engine": "fake", "dtype": "float32", "max_tokens": 16384},
    receipt_id="c0ffee" * 10 + "1234",
    inputs=("a.parquet",),
    started=STARTED,
    finished=STARTED + 60,
    wall_seconds=50.0,
    actors=2,
)
REPORT = UnitReport(
    rows=1000,
    ok=990,
    by_status={"ok": 990, "triple_empty": 8, "process_crashed": 2},
    tokens=400_000,
    computed_tokens=100_000,
    duplicates=7,
    cut_rows=20,
    cut_tokens=5_000,
    seconds=40.0,
    engine_seconds=38.0,
    reward_sum=-990.0,
    reward_square_sum=4 * 990.0,
    lowest_reward=-3.1,
    highest_reward=0.4,
    reward_bins={-13: 90, -6: 600, 1: 300},
    length_bins={length_bin(100): 500, length_bin(700): 490},
    spread=Spread(groups=100, zero_groups=25, bins={0: 30, 4: 70}),
    finished=[(STARTED + 20, 600, 240_000, 60_000), (STARTED + 40, 400, 160_000, 40_000)],
)


def render(report=REPORT, **changes):
    return write_report(report, ReportFacts(**{**vars(FACTS), **changes}))


def parse(page):
    """The page as a tree; raises where it is not well-formed."""
    return ET.fromstring(page.split("\n", 1)[1])


def words(page):
    """What is on the page to read, with plain spaces."""
    return " ".join(" ".join(parse(page).find("body").itertext()).split())


def bars(page, title):
    """The tooltips of the drawing called `title`."""
    (drawing,) = [svg for svg in parse(page).iter("svg") if svg.get("aria-label") == title]
    return [element.text for element in drawing.iter("title")]


def test_the_headline_has_the_numbers():
    said = words(render())
    assert "rows 1 k 2 units" in said
    assert "rewarded 99.0 % 10 without a reward" in said
    assert "tokens 400 k 404 a row" in said
    assert "computed tokens 100 k 75.0 % saved by sharing" in said
    assert "rows/s 20 50 s, 2 actors" in said
    assert "receipt c0ffeec0ffee" in said


def test_the_speed_is_that_of_this_run_only():
    said = words(render(started=STARTED + 30, wall_seconds=20.0))
    assert "rows/s 20 400 rows in 20 s" in said
    assert "this run had nothing left to score" in words(render(started=STARTED + 100))


def test_bars_count_what_the_bins_count():
    page = render()
    rewards = [line for line in bars(page, "Histogram of rewards") if not line.endswith(": 0 rows")]
    assert rewards == ["−3.25 to −3.00: 90 rows", "−1.50 to −1.25: 600 rows", "0.25 to 0.50: 300 rows"]
    spread = [line for line in bars(page, "Histogram of the spread of rewards within groups") if ": 0 " not in line]
    assert spread == ["0.00 to 0.25: 30 groups", "1.00 to 1.25: 70 groups"]
    lengths = [line for line in bars(page, "Histogram of lengths in tokens") if ": 0 " not in line]
    assert [line.split(": ")[1] for line in lengths] == ["500 rows", "490 rows"]


def test_mean_median_and_spread_are_said():
    said = words(render())
    assert "mean −1.00" in said
    assert "median ≈ −1.33" in said
    assert "From −3.10 to 0.40, standard deviation 1.73." in said
    assert "Without spread: 25.0 % of 100 groups." in said


HEALTH = RewardHealth(
    rows=990,
    equal_echoes=99,
    contained_echoes=33,
    length=Moments(n=4, x=10, y=-2, xx=30, yy=6, xy=0),
    length_in_groups=Moments(n=4, x=0, y=0, xx=8, yy=2, xy=-3.9),
)


def test_signs_of_ill_health_come_with_what_they_mean():
    said = words(
        render(REPORT.model_copy(update={"health": HEALTH, "control_token_rows": 5, "removed_control_tokens": 9}))
    )
    assert "rows cut 20 (2.0 %)" in said
    assert "groups without spread 25 (25.0 %)" in said
    assert "output is the reference 99 (10.0 %)" in said
    assert "output holds the reference 33 (3.3 %)" in said
    assert "rows with control tokens 5 (0.5 %) 9 of the model's own tokens" in said
    assert "reward and length, all rows r = 1.00 Longer outputs have clearly higher rewards." in said
    assert "reward and length, within groups r = −0.97 Shorter outputs have clearly higher rewards." in said


def test_what_an_earlier_version_did_not_measure_is_not_called_nothing():
    said = words(render())
    assert "output is the reference – " in said
    assert "reward and length, all rows – Not known" in said
    assert "Drift along the corpus Too few rows" in said


def test_drift_is_drawn_part_by_part_and_the_worst_is_said():
    parts = [Part(0, 500, -3.0, 0.0), Part(500, 1000, -3.1, 0.04), Part(1000, 1500, -1.0, 0.9)]
    page = write_report(REPORT, FACTS, parts)
    assert bars(page, "Drift of rewards along the corpus") == [
        "rows 0 to 500: drift 0.000, mean −3.00",
        "rows 500 to 1,000: drift 0.040, mean −3.10",
        "rows 1,000 to 1,500: drift 0.900, mean −1.00",
    ]
    assert "a large change, at most 0.90 (from row 1,000, with a mean of −1.00 after −3.00)" in words(page)


def test_failures_come_with_what_their_code_means():
    said = words(render())
    assert f"triple_empty 8 (0.8 %) {EmptyText.__doc__}" in said
    assert said.index("triple_empty 8") < said.index("process_crashed 2")
    assert "Rows without a reward" not in words(render(UnitReport(rows=3, ok=3, by_status={"ok": 3})))


def test_all_counts_and_the_receipt_are_in_tables():
    cells = {row[0].text: "".join(row[1].itertext()) for row in parse(render()).iter("tr")}
    assert cells["receipt_id"] == FACTS.receipt_id
    assert cells["max_tokens"] == "16384"
    assert cells["rows"] == "1,000"
    assert cells["rows, process_crashed"] == "2"
    assert cells["tokens cut"] == "5,000"
    assert cells["groups without spread"] == "25"


def test_names_cannot_become_markup_and_broken_ones_do_not_break_the_page():
    hostile = "<script>alert(1)</script>&'\""
    report = REPORT.model_copy(update={"by_status": {"ok": 990, hostile: 10}})
    page = render(report, title=hostile, model=hostile, inputs=(hostile, "b\udcff.parquet"), receipt={hostile: hostile})
    assert "<script" not in page
    assert words(page).count(hostile) >= 6
    assert page.encode().decode() == page


def test_a_long_list_of_inputs_is_shortened():
    said = words(render(inputs=tuple(f"part-{i}.parquet" for i in range(50))))
    assert "part-2.parquet and 47 more." in said
    assert "part-3" not in said


def test_the_page_needs_nothing_from_elsewhere():
    page = render()
    assert not re.search(r"https?:|src=|@import|<script|<link", page)


def rewarded(bins, **changes):
    """A report of rewards alone, at the bottoms of their bins."""
    values = {place * 0.25: count for place, count in bins.items()}
    rows = sum(values.values())
    return UnitReport(
        rows=rows,
        ok=rows,
        by_status={"ok": rows},
        reward_sum=sum(value * count for value, count in values.items()),
        reward_square_sum=sum(value * value * count for value, count in values.items()),
        lowest_reward=min(values),
        highest_reward=max(values),
        reward_bins=bins,
        **changes,
    )


DEGENERATE = {
    "nothing": UnitReport(),
    "no reward": UnitReport(rows=9, by_status={"triple_empty": 9}, seconds=0.1, finished=[(STARTED + 1, 9, 0, 0)]),
    "one row": rewarded(
        {-6: 1}, tokens=57, computed_tokens=57, length_bins={23: 1}, finished=[(STARTED + 1, 1, 57, 57)]
    ),
    "one token": rewarded({0: 1}, length_bins={0: 1}),
    "all equal": rewarded({-3: 4096}, spread=Spread(groups=512, zero_groups=512, bins={0: 512})),
    "huge rewards": rewarded({10**38: 1, -(10**38): 1, 0: 10}),
    "huge spread": rewarded({0: 9}, spread=Spread(groups=5, bins={10**9: 1, 3: 4})),
    "a billion rows": rewarded(dict.fromkeys(range(10), 10**8), tokens=10**12, computed_tokens=10**12 + 5),
    "all at once": rewarded({0: 4}, finished=[(STARTED, 1, 1, 1)] * 4, seconds=0.0),
    "many units": rewarded({0: 1}, finished=[(STARTED + i, 1, 9, 3) for i in range(100_000)], seconds=200_000.0),
}


@pytest.mark.parametrize("report", DEGENERATE.values(), ids=DEGENERATE)
def test_degenerate_counts_make_a_sound_page(report):
    page = render(report)
    for element in parse(page).iter():
        for attribute in set(element.keys()) & {"x", "y", "x1", "x2", "y1", "y2", "width", "height", "d"}:
            assert not re.search("nan|inf|e[+-]|None|-[0-9]", element.get(attribute)), element.attrib
    assert not re.search(r"\b(nan|inf|None)\b", words(page))


def test_what_cannot_be_drawn_says_why():
    said = words(
        render(UnitReport(rows=9, by_status={"triple_empty": 9}, finished=[(STARTED + 1, 9, 0, 0)], seconds=1))
    )
    assert "Rewards No row has a reward." in said
    assert "Lengths No row could be encoded." in said
    assert "Spread within groups No two neighbouring rows with a reward share prompt and reference." in said


def test_outliers_are_put_into_pale_end_bars_and_counted():
    page = render(rewarded({**dict.fromkeys(range(-20, 4), 1000), 40_000: 3, -4_000_000: 2}))
    assert "The pale end bars also hold 2 rows below −5.00 and 3 rows above 1.00." in words(page)
    tooltips = bars(page, "Histogram of rewards")
    assert len(tooltips) == 24
    assert tooltips[0] == "−5.00 to −4.75 and beyond: 1,002 rows"
    assert tooltips[-1] == "0.75 to 1.00 and beyond: 1,003 rows"


units = st.lists(
    st.tuples(st.floats(0, 10**7), st.integers(1, 9999), st.integers(0, 10**7), st.integers(0, 10**7)), min_size=1
)


@settings(deadline=None)
@given(units, st.floats(0.1, 10**5))
def test_the_history_has_all_the_work_in_few_buckets(finished, seconds):
    history = trace(sorted(finished), seconds)
    widths = history.ends - history.starts
    assert len(widths) <= MOST_BUCKETS
    assert (widths > 0).all()
    assert (history.pauses >= 0).all()
    assert (history.rows * widths).sum() == pytest.approx(sum(unit[1] for unit in finished), rel=1e-3)


def test_speeds_are_per_second_of_the_time_worked():
    finished = [(STARTED + 10, 100, 4000, 1000), (STARTED + 20, 100, 4000, 1000)]
    page = render(rewarded({0: 200}, finished=finished, seconds=20.0, tokens=8000, computed_tokens=2000))
    assert {line.split(": ")[1] for line in bars(page, "Rows per second over time")} == {"10 rows/s"}
    tokens = {line.split(": ")[1] for line in bars(page, "Tokens per second over time")}
    assert tokens == {"400 tokens/s of the rows, 100 tokens/s computed"}


def test_a_resumed_job_shows_its_pause():
    early = [(STARTED + 10 * i, 100, 1000, 400) for i in range(1, 11)]
    late = [(moment + 3600, *work) for moment, *work in early]
    pauses = [pause for pause in trace(early + late, 200.0).pauses if pause]
    assert pauses == [pytest.approx(3500)]
    page = render(rewarded({0: 2000}, finished=early + late, seconds=200.0, tokens=20_000, computed_tokens=8000))
    assert "1 pause without work of 58 min 20 s, cut out (striped)." in words(page)
    assert "no work for 58 min 20 s" in bars(page, "Rows per second over time")


def test_slow_units_are_no_pauses():
    rounds = [(STARTED + 600 * i + actor, 100, 1000, 400) for i in range(1, 4) for actor in range(8)]
    assert not trace(rounds, 24 * 600.0).pauses.any()


def test_of_many_pauses_the_longest_are_cut_out():
    finished = [(STARTED + 1000 * i * i, 100, 1000, 400) for i in range(1, 40)]
    assert np.count_nonzero(trace(finished, 39.0).pauses) == MOST_PAUSES


def test_reports_add_up_on_the_page():
    assert "rows 2 k 4 units" in words(render(combine([REPORT, REPORT])))


@pytest.mark.parametrize(
    ("seconds", "labels"),
    [
        (0.3, ["0.0 s", "0.1 s", "0.2 s", "0.3 s"]),
        (50, ["0 s", "10 s", "20 s", "30 s", "40 s", "50 s"]),
        (7000, ["0 min", "30 min", "60 min", "90 min"]),
        (86400 * 40, ["0 d", "10 d", "20 d", "30 d", "40 d"]),
    ],
)
def test_times_are_ticked_in_one_unit(seconds, labels):
    assert [label.replace("\u202f", " ") for _, label in time_ticks(seconds)] == labels
