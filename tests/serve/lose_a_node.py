"""A program of its own, for it needs a cluster of several nodes: one with a replica on it is killed under load.

Writes what came of it as JSON to the file that is its argument.
"""

import asyncio
import json
import sys
from functools import partial
from pathlib import Path

import ray
from ray import serve
from ray.cluster_utils import Cluster

from polar_ray.config import EngineConfig
from polar_ray.scoring import Scorer
from tests.serve.caller import Endpoint
from tests.serve.conftest import free_port, redeploy
from tests.serve.test_under_load import PACE, while_asking

QUICK_TO_NOTICE = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 3,
}


def main() -> int:
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": QUICK_TO_NOTICE}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    workers = [cluster.add_node(num_cpus=1, object_store_memory=80 << 20) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    port = free_port()
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    endpoint = Endpoint("fleet", f"http://127.0.0.1:{port}/fleet")
    redeploy(endpoint, replicas=2, replica_cpus=1, seconds_per_token=PACE)
    told = {"nodes": len(set(endpoint.replicas().values()))}
    with Scorer.open(engine=EngineConfig(kind="fake", device="cpu")) as scorer:
        truth = partial(rewards, scorer)
        told["rows"] = asyncio.run(while_asking(endpoint, truth, partial(lose, endpoint, cluster, workers[0])))
    endpoint.check_errors()
    told["errors"] = sorted({error.code for error in endpoint.errors})
    told["n_errors"] = len(endpoint.errors)
    Path(sys.argv[1]).write_text(json.dumps(told))
    serve.shutdown()
    ray.shutdown()
    cluster.shutdown()
    return 0


def rewards(scorer: Scorer, triples) -> list[float]:
    return [row.reward for row in scorer.score(triples)]


def lose(endpoint: Endpoint, cluster: Cluster, node) -> None:
    """Kill a node; what was on it comes up again elsewhere, or not at all until a node is added: one replica serves."""
    cluster.remove_node(node, allow_graceful=False)
    endpoint.wait_for(lambda: node.node_id not in endpoint.replicas().values())


if __name__ == "__main__":
    sys.exit(main())
