"""A Ray cluster with token auth and a dashboard, in a process of its own: `python -m tests.support.token_cluster`.

It prints one line of JSON, `{"gcs": "host:port", "dashboard": "host:port", "agent": "host:port", "logs": "folder"}`,
and lives until its stdin is closed. Which token, the environment says: RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH.
"""

import json
import socket
import sys

from ray.cluster_utils import Cluster

CPUS = 4
OBJECT_STORE_BYTES = 128 << 20


def main() -> None:
    dashboard, agent = free_ports(2)
    cluster = Cluster()
    cluster.add_node(
        num_cpus=CPUS,
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=True,
        dashboard_host="127.0.0.1",
        dashboard_port=dashboard,
        dashboard_agent_listen_port=agent,  # jobs are started by the agent, and another cluster may have its usual port
    )
    host = cluster.gcs_address.rpartition(":")[0]
    where = {
        "gcs": cluster.gcs_address,
        "dashboard": f"127.0.0.1:{dashboard}",
        "agent": f"{host}:{agent}",
        "logs": cluster.head_node.get_logs_dir_path(),
    }
    sys.stdout.write(json.dumps(where) + "\n")
    sys.stdout.flush()
    sys.stdin.read()
    cluster.shutdown()


def free_ports(count: int) -> list[int]:
    """All at the same time, so that they differ."""
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in servers]
    for server in servers:
        server.close()
    return ports


if __name__ == "__main__":
    main()
