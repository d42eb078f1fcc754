"""The page says what the evaluation says, whatever it is, and needs nothing from elsewhere."""

import json
import re
import xml.etree.ElementTree as ET

import pytest

from polar_ray.evaluation.report import write_report
from polar_ray.evaluation.result import Bin, Interval
from polar_ray.evaluation.run import evaluate
from polar_ray.evaluation.words import lead, rival, share, span
from tests.support.comparisons import fake, pair, triple

HOSTILE = "<script>alert(1)&'\""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pages")


def evaluated(folder, rows, **changes):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return evaluate(str(path), fake(**changes))


@pytest.fixture(scope="module")
def pairs(folder):
    """Pairs of two sources, one of which cannot be scored."""
    rows = [pair(n, source="good", chosen="c" * (n + 1), rejected="r" * (60 - n)) for n in range(60)]
    return evaluated(folder, [*rows, pair(99, source="bad", reference=None)], by=["source"])


@pytest.fixture(scope="module")
def graded(folder):
    return evaluated(folder, [triple(n % 8, f"{n}", -(n % 3)) for n in range(40)])


def parse(page):
    """The page as a tree; raises where it is not well-formed."""
    return ET.fromstring(page.split("\n", 1)[1])


def words(page):
    """What is on the page to read, with plain spaces."""
    return " ".join(" ".join(parse(page).find("body").itertext()).split())


def drawing(page, title):
    (found,) = [svg for svg in parse(page).iter("svg") if svg.get("aria-label") == title]
    return found


def tooltips(page, title):
    return [" ".join(element.text.split()) for element in drawing(page, title).iter("title")]


def plain(text):
    return " ".join(text.split())


def test_the_page_needs_nothing_from_elsewhere(pairs, graded):
    for found in (pairs, graded):
        page = write_report(found)
        assert parse(page).tag == "html"
        assert not re.search(r"https?:|src=|@import|<script|<link|url\((?!#)", page)


def test_the_model_and_every_baseline_are_in_the_table(pairs):
    rows = [[plain("".join(cell.itertext())) for cell in row] for row in parse(write_report(pairs)).iter("tr")]
    for method in pairs.total.methods:
        (line,) = [row for row in rows if row[0] == method.title][:1]
        assert line[1:5] == ["60", plain(share(method.accuracy)), span(method.accuracy_interval), str(method.ties)]
        assert line[6] == lead(method)


def test_the_head_has_the_strongest_baseline_beside_the_model(pairs):
    said = words(write_report(pairs))
    strongest = rival(pairs.total)
    assert strongest.accuracy == max(method.accuracy for method in pairs.total.methods[1:])
    assert f"strongest baseline {plain(share(strongest.accuracy))} {strongest.title}" in said
    assert "pairs 60 60 groups, 1 pairs not scored" in said


def test_what_is_left_out_is_said(pairs):
    said = words(write_report(pairs))
    assert "1 pairs could not be scored and are in no figure; outputs: 2 triple_invalid." in said
    assert "bad, 1 not scored" in said
    assert "triple_invalid 2 (1.6 %) A triple cannot be scored as it stands" in said
    assert "Outputs without a reward" not in words(write_report(pairs.model_copy(update={"by_status": {"ok": 1}})))


def test_fake_and_untrained_figures_are_marked(pairs):
    assert "hashes of the token ids" in words(write_report(pairs))
    settings = pairs.settings.model_copy(update={"engine": pairs.settings.engine.model_copy(update={"kind": "torch"})})
    untrained = pairs.model_copy(update={"settings": settings, "untrained": True})
    assert "its accuracy is a coin's" in words(write_report(untrained))
    trained = pairs.model_copy(update={"settings": settings, "untrained": False})
    assert not [p for p in parse(write_report(trained)).iter("p") if p.get("class") == "notice"]


def test_drawings_have_the_figures(pairs):
    page = write_report(pairs)
    counted = [int(line.rpartition(": ")[2].split()[0]) for line in tooltips(page, "Histogram of margins")]
    assert sum(counted) == 60
    for title, bins in (("Accuracy by length ratio", pairs.by_length_ratio), ("Accuracy by length", pairs.by_length)):
        assert len(tooltips(page, title)) == len(bins)
    predicted = tooltips(page, "Reliability: predicted against observed accuracy")
    assert len(predicted) == len(pairs.reliability.bins)
    assert tooltips(page, "Accuracy by source")[0].startswith("source = good: model")


def test_wrong_margins_have_another_colour_than_right_ones(pairs):
    bars = {}
    for group in drawing(write_report(pairs), "Histogram of margins").iter("g"):
        kinds = [shape.get("class") for shape in group.iter("rect")]
        bars |= {group.find("title").text.partition(" ")[0].replace("−", "-"): kind for kind in kinds if kind != "hit"}
    assert {kind.split()[0] for start, kind in bars.items() if float(start) < 0} == {"base"}
    assert {kind.split()[0] for start, kind in bars.items() if float(start) >= 0} == {"bar"}


def test_a_dot_is_where_its_figure_is(pairs):
    reliable = pairs.reliability.model_copy(
        update={
            "bins": [
                Bin(low=0.5, high=0.55, pairs=3, mean_x=0.5, accuracy=0.5, interval=Interval(low=0.5, high=1.0)),
                Bin(low=0.95, high=1.0, pairs=3, mean_x=1.0, accuracy=1.0, interval=None),
            ]
        }
    )
    shown = drawing(
        write_report(pairs.model_copy(update={"reliability": reliable})),
        "Reliability: predicted against observed accuracy",
    )
    dots = [(dot.get("cx"), dot.get("cy")) for dot in shown.iter("circle")]
    (guide,) = [line for line in shown.iter("line") if line.get("class") == "guide"]
    assert dots == [(guide.get("x1"), guide.get("y1")), (guide.get("x2"), guide.get("y2"))]
    (whisker,) = [line for line in shown.iter("line") if "whisker" in line.get("class")]
    assert {whisker.get("y1"), whisker.get("y2")} == {guide.get("y1"), guide.get("y2")}


def test_best_of_n_is_drawn_and_in_a_table_and_its_scale_is_said(graded):
    page = write_report(graded)
    assert len(tooltips(page, "Best of n")) == 3 * (1 + len(graded.best_of))
    assert "0 % is the lowest label, −2.00, 100 % the highest, 0.00." in words(page)
    assert "picked at random" in words(page)
    assert "Spearman" in words(page)


def test_names_cannot_become_markup(folder):
    rows = [pair(n, kind=HOSTILE, **{HOSTILE: "x"}) for n in range(3)]
    found = evaluated(folder, rows, by=["kind", HOSTILE]).model_copy(
        update={"model": HOSTILE, "inputs": [f"/a/{HOSTILE}.parquet"], "receipt": {HOSTILE: HOSTILE}}
    )
    page = write_report(found)
    assert "<script" not in page
    assert words(page).count(HOSTILE) >= 6


DEGENERATE = {
    "one pair": [pair(0)],
    "one tie": [pair(0, chosen="same", rejected="same")],
    "one group": [pair(0), pair(0, chosen="other")],
    "no pairs": [triple(n, f"{n}", n % 2) for n in range(4)],
    "one of each label": [triple(0, "a", 1), triple(0, "b", 2)],
    "huge labels": [triple(n % 2, f"{n}", n * 1e12) for n in range(6)],
    "long outputs": [pair(0, chosen="c " * 9000), pair(1, rejected="r")],
    "nothing in common": [pair(n, reference="!", chosen="?", rejected="…") for n in range(3)],
}


@pytest.mark.parametrize("rows", DEGENERATE.values(), ids=DEGENERATE)
def test_degenerate_evaluations_make_a_sound_page(folder, rows):
    page = write_report(evaluated(folder, [{**row, "kind": f"k{n}"} for n, row in enumerate(rows)], by=["kind"]))
    for element in parse(page).iter():
        for attribute in set(element.keys()) & {"x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "width", "height", "d"}:
            assert not re.search("nan|inf|e[+-]|None", element.get(attribute)), element.attrib
    assert not re.search(r"\b(nan|inf|None)\b", words(page))
