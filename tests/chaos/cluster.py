"""A real cluster of several raylets on this machine, and what can befall it."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

WORKERS = 3

QUICK_TO_NOTICE = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 5000,
    "health_check_failure_threshold": 5,
}
"""A dead node is one in seconds, not in the half minute that suits a data centre."""


class ChaosCluster:
    """A head without CPUs, whose GCS keeps its state on disk, and workers of one CPU each."""

    def __init__(self, chance):
        from ray.cluster_utils import Cluster

        self._chance = chance
        head = {"num_cpus": 0, "include_dashboard": False, "_system_config": QUICK_TO_NOTICE}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self._workers = []
        for _ in range(WORKERS):
            self.add_node()

    @property
    def address(self):
        return self._cluster.address

    def add_node(self):
        """Must be called in the main thread."""
        self._workers.append(self._cluster.add_node(num_cpus=1, object_store_memory=80 << 20))

    def lose_node(self, node=None):
        """SIGKILL a worker's raylet, and with it all that runs there; another node comes in its place."""
        node = node or self._chance.choice(self._workers)
        self._workers.remove(node)
        self._cluster.remove_node(node, allow_graceful=False)
        self.add_node()

    def drain_node(self, notice_s):
        """Preempt a worker with notice: Ray is told, and after `notice_s` seconds the node is gone."""
        node = self._chance.choice(self._workers)
        command = [
            str(Path(sys.executable).with_name("ray")), "drain-node", "--address", self.address,
            "--node-id", node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot",
            "--deadline-remaining-seconds", str(notice_s),
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True)
        time.sleep(notice_s)
        self.lose_node(node)

    def freeze_node(self, seconds):
        """Stop all of a worker's processes, as when a host hangs; then it is gone for good."""
        node = self._chance.choice(self._workers)
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        for process in [raylet, *raylet.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.suspend()
        time.sleep(seconds)
        self.lose_node(node)

    def restart_gcs(self, seconds):
        """SIGKILL the GCS; after `seconds` it comes back with what it has on disk."""
        self._cluster.head_node.kill_gcs_server()
        time.sleep(seconds)
        self._cluster.head_node.start_gcs_server()

    def kill_process(self, name):
        """SIGKILL one process of the workers (and the head) with `name` in its title. False if there is none."""
        victims = self._processes(name)
        if victims:
            self._chance.choice(victims).kill()
        return bool(victims)

    def pause_process(self, name, seconds):
        """Stop one such process for a while: a slow node. False if there is none."""
        victims = self._processes(name)
        if victims:
            victim = self._chance.choice(victims)
            with suppress(psutil.NoSuchProcess):
                victim.suspend()
                time.sleep(seconds)
                victim.resume()
        return bool(victims)

    def _processes(self, name):
        raylets = [node.all_processes["raylet"][0].process.pid for node in [self._cluster.head_node, *self._workers]]
        children = [child for pid in raylets for child in psutil.Process(pid).children()]
        return [child for child in children if _has_title(child, name)]

    def shutdown(self):
        for process in self._processes(""):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)
        self._cluster.shutdown()


def _has_title(process, name):
    with suppress(psutil.NoSuchProcess):
        return name in " ".join(process.cmdline())
    return False


@contextmanager
def chaos_cluster(chance, folder):
    """Such a cluster, for as long as the block lasts; `folder` is for the GCS's state."""
    settings = {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(folder)}
    os.environ.update(settings)
    cluster = ChaosCluster(chance)
    try:
        yield cluster
    finally:
        cluster.shutdown()
        for name in settings:
            os.environ.pop(name)
