"""Write the Grafana dashboard of endpoints and jobs: python jobs/make_dashboard.py

Panels are a title, a unit and queries; where they stand follows from their order. A test says when the file is not
what this makes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path(__file__).parents[1] / "cluster" / "observability" / "dashboard.json"

COLUMNS, PANEL_WIDTH, PANEL_HEIGHT = 24, 8, 8
"""Of Grafana's grid."""

ENDPOINT = '{replica!="", instance=~"$endpoint"}'
JOB = '{job_id=~"$job"}'
ALL = "$__rate_interval"

DATA_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


class Query(NamedTuple):
    """A query and what its lines are called."""

    expression: str
    legend: str


class Panel(NamedTuple):
    """A drawing of some queries; `unit` is Grafana's name of one."""

    title: str
    unit: str
    queries: list[Query]
    text: str = ""
    kind: str = "timeseries"


def rate(name: str, where: str = ENDPOINT, by: str = "", more: str = "") -> str:
    """What a counter gains a second; `more` narrows `where`."""
    chosen = where[:-1] + (f", {more}" if more else "") + "}"
    return f"sum{f' by ({by})' if by else ''} (rate(polar_ray_{name}{chosen}[{ALL}]))"


def quantile(share: float, name: str, where: str = ENDPOINT) -> str:
    return f"histogram_quantile({share}, {rate(f'{name}_bucket', where, 'le')})"


def share(part: str, whole: str) -> str:
    return f"{part} / {whole}"


def gauge(name: str, where: str, by: str, fold: str = "sum") -> str:
    return f"{fold} by ({by}) (polar_ray_{name}{where})"


def health(where: str, who: str) -> list[Panel]:
    """What tells of rewards, of endpoints and of jobs alike; `who` is the label to tell them apart by."""
    rows, groups = rate("rows_total", where, who), rate("groups_total", where, who)
    ok = rate("rows_total", where, who, 'status="ok"')
    echoes = rate("echo_rows_total", where, f"{who}, kind")
    each = f"{{{{{who}}}}}"
    return [
        Panel(
            "Rewards",
            "short",
            [Query(quantile(at, "reward", where), f"{at:.0%}") for at in (0.1, 0.5, 0.9)],
            "Deciles of the rewards given, as closely as the buckets tell.",
        ),
        Panel(
            "Rewards, distribution",
            "short",
            [Query(rate("reward_bucket", where, "le"), "{{le}}")],
            kind="heatmap",
        ),
        Panel(
            "Drift",
            "short",
            [Query(gauge("reward_drift", where, who, "max"), each)],
            "Population stability index, latest thousand rewards against the first; above 0.25 is a large change.",
        ),
        Panel(
            "Rewards and length",
            "short",
            [Query(gauge("reward_length_correlation", where, f"{who}, scope", "max"), f"{each} {{{{scope}}}}")],
            "Correlation of reward and characters of the output, over all latest rows and within their groups.",
        ),
        Panel(
            "Groups without spread",
            "percentunit",
            [Query(share(rate("zero_spread_groups_total", where, who), groups), each)],
            "All rewards of the group are equal.",
        ),
        Panel(
            "Outputs that echo the reference",
            "percentunit",
            [Query(f"{echoes} / on ({who}) group_left () {ok}", f"{each} {{{{kind}}}}")],
        ),
        Panel(
            "Rows cut",
            "percentunit",
            [Query(share(rate("cut_rows_total", where, who), ok), each)],
            "Rows that limits shortened before they were scored.",
        ),
        Panel("Tokens cut", "short", [Query(rate("cut_tokens_total", where, who), each)]),
        Panel(
            "Spoof attempts",
            "percentunit",
            [
                Query(share(rate("control_token_rows_total", where, who), rows), f"{each} rows"),
                Query(rate("removed_control_tokens_total", where, who), f"{each} tokens/s"),
            ],
            "Rows with the model's own control tokens in their texts; they are taken out.",
        ),
    ]


def engine(where: str, who: str) -> list[Panel]:
    each = f"{{{{{who}}}}}"
    return [
        Panel(
            "Engine busy",
            "percentunit",
            [Query(rate("engine_seconds_total", where, who), each)],
            "Seconds of engine work a second: 1 for each engine that never waits.",
        ),
        Panel(
            "Fill of the engine calls",
            "percentunit",
            [Query(share(rate("computed_tokens_total", where, who), rate("budget_tokens_total", where, who)), each)],
            "Computed tokens of the token budget.",
        ),
        Panel("Engine calls", "ops", [Query(rate("engine_calls_total", where, who), each)]),
        Panel(
            "MFU",
            "percentunit",
            [Query(share(rate("flops_total", where, who), rate("peak_flops_total", where, who)), each)],
            "Of the data sheet's peak, while the engine computes. On known GPUs only.",
        ),
    ]


def sharing(where: str, who: str) -> list[Panel]:
    tokens, computed = rate("tokens_total", where, who), rate("computed_tokens_total", where, who)
    each = f"{{{{{who}}}}}"
    return [
        Panel(
            "Tokens",
            "short",
            [Query(tokens, f"{each} of the rows"), Query(computed, f"{each} computed")],
            "A second. What lies between the two was saved by sharing.",
        ),
        Panel("Saved by sharing", "percentunit", [Query(f"1 - {computed} / {tokens}", each)]),
    ]


ROUTES = 'route!~"/metrics|/healthz|/readyz"'
FAILED = f'{ROUTES}, code!~"ok|caller_gone"'

ROWS: dict[str, list[Panel]] = {
    "Endpoints: traffic": [
        Panel("Rows", "ops", [Query(rate("rows_total", by="status"), "{{status}}")]),
        Panel(
            "Requests", "reqps", [Query(rate("requests_total", by="route, code", more=ROUTES), "{{route}} {{code}}")]
        ),
        Panel("Callers that went away", "reqps", [Query(rate("dropped_requests_total"), "dropped")]),
    ],
    "Endpoints: latency": [
        Panel("Requests", "s", [Query(quantile(at, "request_seconds"), f"p{at * 100:.0f}") for at in (0.5, 0.9, 0.99)]),
        Panel(
            "In the queue", "s", [Query(quantile(at, "queue_seconds"), f"p{at * 100:.0f}") for at in (0.5, 0.9, 0.99)]
        ),
    ],
    "Endpoints: queue": [
        Panel("Pending tokens", "short", [Query(gauge("pending_tokens", ENDPOINT, "priority"), "{{priority}}")]),
        Panel(
            "Work that waits",
            "s",
            [Query(f"sum (polar_ray_pending_tokens{ENDPOINT}) / {rate('computed_tokens_total')}", "seconds of work")],
        ),
        Panel(
            "Pending tokens of a replica", "short", [Query(gauge("pending_tokens", ENDPOINT, "replica"), "{{replica}}")]
        ),
    ],
    "Endpoints: engine": [
        *engine(ENDPOINT, "replica"),
        Panel(
            "Tokens of an engine call",
            "short",
            [Query(quantile(at, "batch_tokens"), f"{at:.0%}") for at in (0.1, 0.5, 0.9)],
        ),
    ],
    "Endpoints: sharing": sharing(ENDPOINT, "instance"),
    "Endpoints: errors": [
        Panel(
            "Requests that failed",
            "percentunit",
            [
                Query(
                    f"{rate('requests_total', by='code', more=FAILED)} "
                    f"/ ignoring (code) group_left () {rate('requests_total', more=ROUTES)}",
                    "{{code}}",
                )
            ],
        ),
        Panel(
            "Rows without a reward", "ops", [Query(rate("rows_total", by="status", more='status!="ok"'), "{{status}}")]
        ),
        Panel(
            "Receipts",
            "short",
            [Query(gauge("receipt_info", ENDPOINT, "instance, receipt_id"), "{{instance}} {{receipt_id}}")],
            "Replicas by the receipt of their rewards; more than one for long is wrong.",
        ),
    ],
    "Endpoints: reward health": health(ENDPOINT, "instance"),
    "Jobs": [
        Panel("Rows", "ops", [Query(rate("rows_total", JOB, "job_id, status"), "{{job_id}} {{status}}")]),
        Panel("Rows of a node", "ops", [Query(rate("rows_total", JOB, "node"), "{{node}}")]),
        Panel("Units left", "short", [Query(gauge("units_left", JOB, "job_id"), "{{job_id}}")]),
        Panel("Units written", "ops", [Query(rate("units_total", JOB, "job_id"), "{{job_id}}")]),
        Panel(
            "Deaths",
            "short",
            [
                Query(gauge("process_deaths_total", JOB, "job_id"), "{{job_id}} processes that died"),
                Query(gauge("units_repeated_total", JOB, "job_id"), "{{job_id}} units begun again"),
                Query(gauge("quarantined_rows_total", JOB, "job_id"), "{{job_id}} rows quarantined"),
                Query(gauge("engines_started_total", JOB, "job_id"), "{{job_id}} engines that came up"),
            ],
            "Of this run.",
        ),
        Panel(
            "Since the last engine call",
            "s",
            [Query(gauge("seconds_since_progress", JOB, "job_id", "max"), "{{job_id}}")],
        ),
    ],
    "Jobs: engine and sharing": [*engine(JOB, "job_id"), *sharing(JOB, "job_id")],
    "Jobs: reward health": health(JOB, "job_id"),
}


def dashboard() -> dict[str, Any]:
    """What Grafana imports."""
    return {
        "title": "polar_ray",
        "uid": "polar-ray",
        "description": "Endpoints and jobs of polar_ray. Made by jobs/make_dashboard.py.",
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "timezone": "utc",
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {
            "list": [_data_source(), _choice("endpoint", "replica", "instance"), _choice("job", "job_id", "job_id")]
        },
        "panels": list(_panels()),
    }


def _panels() -> Iterator[dict[str, Any]]:
    y = number = 0
    for title, panels in ROWS.items():
        number += 1
        yield {
            "id": number,
            "type": "row",
            "title": title,
            "collapsed": False,
            "gridPos": {"h": 1, "w": COLUMNS, "x": 0, "y": y},
        }
        y += 1
        for place, panel in enumerate(panels):
            number += 1
            line, column = divmod(place, COLUMNS // PANEL_WIDTH)
            where = {"h": PANEL_HEIGHT, "w": PANEL_WIDTH, "x": column * PANEL_WIDTH, "y": y + line * PANEL_HEIGHT}
            yield {"id": number, "gridPos": where, **_drawn(panel)}
        y += -(-len(panels) // (COLUMNS // PANEL_WIDTH)) * PANEL_HEIGHT


def _drawn(panel: Panel) -> dict[str, Any]:
    is_heatmap = panel.kind == "heatmap"
    targets = [
        {
            "refId": chr(ord("A") + place),
            "datasource": DATA_SOURCE,
            "expr": query.expression,
            "legendFormat": query.legend,
            "format": "heatmap" if is_heatmap else "time_series",
        }
        for place, query in enumerate(panel.queries)
    ]
    options = {"calculate": False} if is_heatmap else {"legend": {"displayMode": "list", "placement": "bottom"}}
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text,
        "datasource": DATA_SOURCE,
        "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
        "options": options,
        "targets": targets,
    }


def _data_source() -> dict[str, Any]:
    return {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"}


def _choice(name: str, has: str, label: str) -> dict[str, Any]:
    query = f'label_values(polar_ray_receipt_info{{{has}!=""}}, {label})'
    return {
        "name": name,
        "type": "query",
        "datasource": DATA_SOURCE,
        "query": {"query": query, "refId": name},
        "definition": query,
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".+",
        "current": {"text": "All", "value": "$__all"},
    }


if __name__ == "__main__":
    FILE.write_text(json.dumps(dashboard(), indent=1) + "\n")
