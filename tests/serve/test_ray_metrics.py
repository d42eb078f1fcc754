"""An endpoint's metrics are on Ray's agents as well as on its own `/metrics`."""

import httpx
import pytest

from polar_ray.triples import TEXT_FIELDS
from polar_ray.wire import REWARDS_PATH
from tests.serve.conftest import groups
from tests.support.scrape import parse, total, wait_for

pytestmark = pytest.mark.ray


def test_a_scrape_of_ray_says_what_the_endpoint_says(deploy):
    endpoint = deploy(replicas=2)
    triples = groups(4, 3)
    for triple in triples:
        body = {"triples": [{field: getattr(triple, field) for field in TEXT_FIELDS}]}
        httpx.post(f"{endpoint.url}{REWARDS_PATH}", json=body).raise_for_status()
    endpoint.wait_for(lambda: endpoint.metrics()["polar_ray_rows_total"] == len(triples))
    own = [sample for sample in parse(httpx.get(f"{endpoint.url}/metrics").text) if "_created" not in sample.name]
    replicas = {sample.labels["replica"] for sample in own}
    labels = {label for sample in own for label in sample.labels}

    def of_endpoint(samples):
        """Value by name and labels, without what changes by being asked for."""
        return {
            (sample.name, *sorted(sample.labels.items() & {(label, sample.labels.get(label)) for label in labels})): (
                sample.value
            )
            for sample in samples
            if sample.labels.get("replica") in replicas and sample.labels.get("route") in (None, REWARDS_PATH)
        }

    samples = wait_for(
        lambda found: sum(total(found, "polar_ray_rows_total", replica=one) for one in replicas) == len(triples)
    )
    assert len(replicas) == 2
    assert of_endpoint(samples) == of_endpoint(own)
