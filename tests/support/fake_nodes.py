"""A Ray cluster that grows and shrinks by itself: autoscaler v2 with nodes that are processes of this machine.

Ray's own `AutoscalingCluster` needs a file that its wheel lacks, and stops every Ray on the machine when it starts.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

OBJECT_STORE_BYTES = 100_000_000
IDLE_MINUTES = 0.1
START_S = 60

HEAD_TYPE = "ray.head.default"
"""What the provider of fake nodes takes its head for."""

LISTS = (
    "initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands",
    "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter",
)  # fmt: skip
"""Of an autoscaler's configuration; nothing is installed on fake nodes."""


def _configuration(address: str, most: int, cpus: int, head: str) -> dict:
    provider = {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
        "gcs_address": address,
        "launch_multiple": True,
        "head_node_id": head,
    }
    worker = {"CPU": cpus, "object_store_memory": OBJECT_STORE_BYTES}
    return {
        "cluster_name": "fake",
        "max_workers": most,
        "provider": provider,
        "head_node_type": HEAD_TYPE,
        "available_node_types": {
            HEAD_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": worker, "node_config": {}, "min_workers": 0, "max_workers": most},
        },
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": IDLE_MINUTES,
        "file_mounts_sync_continuously": False,
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        **{name: [] for name in LISTS},
    }


@contextmanager
def growing_cluster(folder: Path, port: int, *, most: int, cpus: int):
    """The address of a cluster of a head without CPUs and no worker, which may grow to `most` of `cpus` CPUs each."""
    from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

    address = f"127.0.0.1:{port}"
    settings = folder / "autoscaling.json"
    settings.write_text(json.dumps(_configuration(address, most, cpus, FAKE_HEAD_NODE_ID)))
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", f"--autoscaling-config={settings}",
        "--num-cpus=0", f"--port={port}", f"--object-store-memory={OBJECT_STORE_BYTES}", "--include-dashboard=false",
        "--block",
    ]  # fmt: skip
    environment = {
        **os.environ,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }
    with (folder / "ray.log").open("w") as log:
        head = subprocess.Popen(command, env=environment, start_new_session=True, stdout=log, stderr=subprocess.STDOUT)
    try:
        _wait_until_up(head, address)
        yield address
    finally:
        _end(head)


def _wait_until_up(head: subprocess.Popen, address: str) -> None:
    host, port = address.split(":")
    deadline = time.monotonic() + START_S
    while True:
        assert head.poll() is None, "the head did not start"
        assert time.monotonic() < deadline, "the head did not answer"
        with suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
            return
        time.sleep(0.3)


def _end(head: subprocess.Popen) -> None:
    """The head and all that it and its autoscaler have started; fake nodes are sessions of their own."""
    below = psutil.Process(head.pid).children(recursive=True) if head.poll() is None else []
    head.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        head.wait(15)
    for process in [*below, psutil.Process(head.pid)] if head.poll() is None else below:
        with suppress(psutil.NoSuchProcess):
            process.kill()
