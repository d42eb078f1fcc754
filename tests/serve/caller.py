"""A caller who does as `polar_ray.client` does: what is retryable is asked again, and all of it remembered."""

import asyncio
import re
import time
from collections import defaultdict
from dataclasses import dataclass, field

import httpx
from prometheus_client.parser import text_string_to_metric_families

from polar_ray.errors import PolarRayError, Unavailable
from polar_ray.wire import RewardsReply, read_error, triple_to_json

LEAKS = re.compile(rb"Traceback|File \"|\d+\.\d+\.\d+\.\d+|\bpid\b|ActorID|actor_id|/site-packages/|Question \d+")
"""What no error may tell a caller: where it came from, on which machine, whose text it was about."""

PAUSE_S = 0.2
GIVE_UP_S = 60


@dataclass
class Endpoint:
    """An application on the cluster, as seen from outside and, through Serve's controller, from inside."""

    name: str
    url: str
    errors: list[PolarRayError] = field(default_factory=list)
    error_bodies: list[bytes] = field(default_factory=list)

    def client(self, **options) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None)
        return httpx.AsyncClient(base_url=self.url, timeout=GIVE_UP_S, limits=limits, **options)

    def read(self, reply: httpx.Response) -> RewardsReply:
        """The rewards in `reply`. Raises the error that it tells of, and keeps it."""
        if reply.status_code == 200:
            return RewardsReply.model_validate_json(reply.content)
        self.error_bodies.append(reply.content)
        error = read_error(reply.status_code, reply.content, reply.headers)
        self.errors.append(error)
        raise error

    async def ask(self, client, triples, **options) -> RewardsReply:
        """One request, tried once."""
        body = {"triples": [triple_to_json(triple) for triple in triples], **options}
        try:
            reply = await client.post("/v1/rewards", json=body)
        except httpx.TransportError as error:
            self.errors.append(Unavailable(type(error).__name__))
            raise self.errors[-1] from None
        return self.read(reply)

    async def score(self, client, triples, **options) -> list[float]:
        """The rewards of `triples`, asked for until they come. Raises what is not retryable."""
        end = time.monotonic() + GIVE_UP_S
        while True:
            try:
                reply = await self.ask(client, triples, **options)
            except PolarRayError as error:
                if not error.retryable or time.monotonic() > end:
                    raise
                await asyncio.sleep(error.details.get("retry_after_s", PAUSE_S))
            else:
                assert [row.index for row in reply.rewards] == list(range(len(triples)))
                return [row.reward for row in reply.rewards]

    def wait_until_ready(self, seconds: float) -> None:
        self.wait_for(lambda: httpx.get(f"{self.url}/readyz").is_success, seconds)

    def metrics(self) -> defaultdict[str, float]:
        """Each metric's sum over replicas and labels, and each of its label values' sum, as `name{value}`."""
        sums: defaultdict[str, float] = defaultdict(float)
        for family in text_string_to_metric_families(httpx.get(f"{self.url}/metrics").raise_for_status().text):
            for sample in family.samples:
                labels = [value for label, value in sample.labels.items() if label not in ("replica", "le")]
                for key in (sample.name, *(f"{sample.name}{{{value}}}" for value in labels)):
                    sums[key] += sample.value
        return sums

    def replicas(self) -> dict[int, str]:
        """Process id to node id of each replica that runs."""
        from ray.serve.context import _get_global_client

        found = _get_global_client().get_serve_details()["applications"][self.name]["deployments"].values()
        replicas = [replica for deployment in found for replica in deployment["replicas"]]
        return {replica["pid"]: replica["node_id"] for replica in replicas if replica["state"] == "RUNNING"}

    @staticmethod
    def wait_for(is_true, seconds: float = GIVE_UP_S) -> None:
        """Until `is_true()`; fails the test after `seconds`."""
        end = time.monotonic() + seconds
        while not is_true():
            assert time.monotonic() < end, "it did not happen"
            time.sleep(0.1)

    def check_errors(self) -> None:
        """Every error seen was typed, retryable and told nothing it should not."""
        assert all(error.retryable for error in self.errors), {type(error).__name__ for error in self.errors}
        assert not [body for body in self.error_bodies if LEAKS.search(body)]
