"""Every metric of endpoints and jobs: names, units and labels, in one table. Texts and addresses are in none of them.

An endpoint's are on its `/metrics`; a job's, and an endpoint's too, are on Ray's own metrics agents
(`ray_export.py`). Each has labels of its own besides: a replica's series `replica`, a job's `job_id`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PREFIX = "polar_ray_"

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
TOKENS = (128.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0, 32768.0, 65536.0, 131072.0)
REWARDS = (-12.0, -10.0, -8.0, -6.0, -4.0, -3.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 4.0)
"""Where POLAR's published rewards lie: from about -12 to about 1."""

Kind = Literal["counter", "gauge", "histogram"]

Place = Literal["endpoint", "job"]

ENDPOINT_LABELS = ("replica",)

RECEIPT_ID_DIGITS = 12
"""Of a receipt id in a label: enough to tell two apart, and what the report shows."""


@dataclass(frozen=True, slots=True, eq=False)  # each is itself alone, and quick to look up
class MetricSpec:
    """One metric. `name` is without the prefix and without what Prometheus hangs on: `_total`, `_bucket`."""

    name: str
    kind: Kind
    text: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    places: tuple[Place, ...] = ("endpoint", "job")

    @property
    def full_name(self) -> str:
        return PREFIX + self.name

    @property
    def series(self) -> tuple[str, ...]:
        """The names that a scrape shows. A histogram with bounds below zero has no sum, which would not only grow."""
        endings = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_count", "_sum"]}[self.kind]
        if self.buckets and self.buckets[0] < 0:
            endings = ["_bucket", "_count"]
        return tuple(self.full_name + ending for ending in endings)


def _endpoint(name: str, kind: Kind, text: str, *labels: str, buckets: tuple[float, ...] = ()) -> MetricSpec:
    return MetricSpec(name, kind, text, labels, buckets, ("endpoint",))


def _job(name: str, kind: Kind, text: str, *labels: str) -> MetricSpec:
    return MetricSpec(name, kind, text, labels, places=("job",))


REQUESTS = _endpoint("requests", "counter", "Requests answered, by route and code (ok or an error's).", "route", "code")
REQUEST_SECONDS = _endpoint("request_seconds", "histogram", "From arrival to answer.", "route", buckets=SECONDS)
QUEUE_SECONDS = _endpoint("queue_seconds", "histogram", "From the queue to the engine.", buckets=SECONDS)
BATCH_TOKENS = _endpoint("batch_tokens", "histogram", "Computed tokens of one engine call.", buckets=TOKENS)
DROPPED_REQUESTS = _endpoint("dropped_requests", "counter", "Requests whose caller went away before the answer.")
PENDING_TOKENS = _endpoint("pending_tokens", "gauge", "Tokens that wait or are computed.", "priority")

ROWS = MetricSpec("rows", "counter", "Rows answered, by status (ok, or the code of an error).", ("status",))
TOKENS_OF_ROWS = MetricSpec("tokens", "counter", "Tokens of the rows that were computed.")
COMPUTED_TOKENS = MetricSpec(
    "computed_tokens", "counter", "Tokens that went through the model; what rows share counts once."
)
ENGINE_CALLS = MetricSpec("engine_calls", "counter", "Calls to the engine.")
BUDGET_TOKENS = MetricSpec(
    "budget_tokens", "counter", "Tokens that the engine calls had room for; computed ones over these are the fill."
)
ENGINE_SECONDS = MetricSpec("engine_seconds", "counter", "Seconds that the engine computed.")
FLOPS = MetricSpec(
    "flops", "counter", "Floating point operations of the computed tokens, from the model's shape. On known GPUs only."
)
PEAK_FLOPS = MetricSpec(
    "peak_flops",
    "counter",
    "Operations that the GPUs' data sheets promise for the engine's seconds; flops over these is MFU. On known GPUs "
    "only.",
)
CUT_ROWS = MetricSpec("cut_rows", "counter", "Rows that limits shortened.")
CUT_TOKENS = MetricSpec("cut_tokens", "counter", "Tokens that limits removed.")
CONTROL_TOKEN_ROWS = MetricSpec(
    "control_token_rows", "counter", "Rows with control tokens in their texts, which were taken out: spoof attempts."
)
REMOVED_CONTROL_TOKENS = MetricSpec(
    "removed_control_tokens", "counter", "Control tokens that stood in texts and were taken out."
)
REWARD = MetricSpec(
    "reward", "histogram", "Rewards given: their drift is the first sign of a broken run.", buckets=REWARDS
)
GROUPS = MetricSpec(
    "groups",
    "counter",
    "Groups of at least two rewarded rows: neighbours in a request or a unit with one prompt and reference.",
)
ZERO_SPREAD_GROUPS = MetricSpec(
    "zero_spread_groups",
    "counter",
    "Groups whose rewards are all equal: a group-relative trainer learns nothing there.",
)
ECHO_ROWS = MetricSpec(
    "echo_rows",
    "counter",
    "Rewarded outputs that are the reference (equal), or hold the whole of a long one (contained).",
    ("kind",),
)
REWARD_DRIFT = MetricSpec(
    "reward_drift",
    "gauge",
    "Population stability index of the latest rewards against the first thousand; above 0.25 is a large change.",
)
REWARD_LENGTH_CORRELATION = MetricSpec(
    "reward_length_correlation",
    "gauge",
    "Of reward and characters of the output among the latest rows: over all of them (rows), and less the means of "
    "their groups (groups).",
    ("scope",),
)
RECEIPT_INFO = MetricSpec(
    "receipt_info",
    "gauge",
    "Always 1; the label is the head of the receipt id, by which rewards can be compared.",
    ("receipt_id",),
)

UNITS = _job("units", "counter", "Units whose files this run wrote.")
UNITS_LEFT = _job("units_left", "gauge", "Units whose files are not there yet.")
UNITS_REPEATED = _job("units_repeated", "counter", "Units begun again, as the process that had them died.")
PROCESS_DEATHS = _job("process_deaths", "counter", "Processes that died with a unit in their hands.")
QUARANTINED_ROWS = _job("quarantined_rows", "counter", "Rows found to kill their process, and left out.")
ENGINES_STARTED = _job("engines_started", "counter", "Engines that came up in this run.")
SECONDS_SINCE_PROGRESS = _job("seconds_since_progress", "gauge", "Since any engine call of the job ended.")

SPECS: tuple[MetricSpec, ...] = tuple(value for value in globals().values() if isinstance(value, MetricSpec))
"""All of them, in the order of this file."""
