"""What a Prometheus would see of this process's Ray: the exposition of every node's agent."""

import time
from collections.abc import Callable
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from polar_ray.corpus.manifest import load_manifest
from polar_ray.corpus.metrics import JOB_ID_DIGITS
from polar_ray.corpus.storage import Location

RAY_PREFIX = "ray_"
GIVE_UP_S = 30


class Sample:
    """One line of an exposition, its name as the scrape configuration leaves it."""

    def __init__(self, name: str, labels: dict[str, str], value: float) -> None:
        self.name, self.value = name.removeprefix(RAY_PREFIX), value
        self.labels = {label: text for label, text in labels.items() if text}


def parse(exposition: str) -> list[Sample]:
    """Our own series of an exposition, of an endpoint's or of Ray's."""
    families = text_string_to_metric_families(exposition)
    samples = [Sample(*sample[:3]) for family in families for sample in family.samples]
    return [sample for sample in samples if sample.name.startswith("polar_ray_")]


def scrape_ray() -> list[Sample]:
    """Our own series on the agents of the Ray that this process is connected to."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    addresses = [f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in nodes]
    return [sample for address in addresses for sample in parse(httpx.get(address, timeout=10).text)]


def job_label(output: Path) -> str:
    """The `job_id` of the job that writes to `output`."""
    manifest = load_manifest(Location(str(output)))
    assert manifest is not None
    return manifest.job_id[:JOB_ID_DIGITS]


def total(samples: list[Sample], name: str, **labels: str) -> float:
    """The sum of the series called `name` that have these labels."""
    return sum(sample.value for sample in samples if sample.name == name and labels.items() <= sample.labels.items())


def wait_for(is_there: Callable[[list[Sample]], bool]) -> list[Sample]:
    """The first scrape of Ray for which `is_there`; fails the test if none comes."""
    end = time.monotonic() + GIVE_UP_S
    seen: dict[str, float] = {}
    while not is_there(samples := scrape_ray()):
        seen.update({f"{sample.name}{sample.labels}": sample.value for sample in samples})
        assert time.monotonic() < end, f"not within {GIVE_UP_S} s; last seen: {seen}"
        time.sleep(0.3)
    return samples
