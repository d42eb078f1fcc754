"""Alerts and dashboard name metrics that exist, and all of them; every alert says why and what to do."""

import json
import re
import shutil
import subprocess

import make_dashboard
import metrics_table
import pytest

from polar_ray.metrics import SPECS
from tests.observability.files import FOLDER, SERIES, alerts, names_of, panels, queries

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


def test_every_metric_that_is_named_exists():
    named = names_of(queries())
    assert len(named) > 20
    assert named <= set(SERIES)


def test_every_metric_is_on_the_dashboard():
    shown = {SERIES[name] for name in names_of([target["expr"] for panel in panels() for target in panel["targets"]])}
    assert {spec.name for spec in SPECS} - {spec.name for spec in shown} == set()


def test_queries_ask_for_labels_that_the_metrics_have():
    known = {label for spec in SPECS for label in spec.labels} | {"replica", "instance", "job_id", "node", "job", "le"}
    asked = {
        label for query in queries() for labels in re.findall(r"by \(([^)]*)\)", query) for label in labels.split(", ")
    }
    assert {"instance", "le"} < asked <= known


def test_every_alert_has_a_summary_a_reason_for_its_threshold_and_a_remedy():
    assert len(alerts()) == len({rule["alert"] for rule in alerts()}) > 10
    for rule in alerts():
        assert set(rule["annotations"]) == {"summary", "threshold", "runbook"}, rule["alert"]
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert all(len(text) > 20 for text in rule["annotations"].values())


def test_every_alert_is_tried_on_both_sides_of_its_threshold():
    tried = (FOLDER / "alerts_test.yaml").read_text()
    assert all(f'alertname="{rule["alert"]}"' in tried for rule in alerts())


def test_the_dashboard_is_what_its_script_makes():
    assert json.loads((FOLDER / "dashboard.json").read_text()) == make_dashboard.dashboard()


def test_panels_do_not_overlap():
    taken = set()
    for panel in make_dashboard.dashboard()["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < make_dashboard.COLUMNS
        taken |= cells


@needs_promtool
@pytest.mark.parametrize(
    "command", ["check config prometheus.yaml", "check rules alerts.yaml", "test rules alerts_test.yaml"]
)
def test_promtool_accepts(command):
    done = subprocess.run(["promtool", *command.split()], cwd=FOLDER, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_table_of_metrics_is_the_codes():
    document = (FOLDER / "README.md").read_text()
    assert metrics_table.with_table(document) == document
    assert all(spec.full_name in document for spec in SPECS)
