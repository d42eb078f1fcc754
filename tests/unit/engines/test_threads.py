"""Engines on a CPU leave no helpers of OpenMP in the thread that has loaded them."""

import subprocess
import sys

COUNT = """
import os, time
import torch, transformers
from polar_ray.config import EngineConfig
from polar_ray.engines.threads import in_passing_thread
from polar_ray.scoring import CANARY, Scorer

def fewest(seconds=10):
    # Threads end a little after the one that had them.
    end, counts = time.monotonic() + seconds, [len(os.listdir("/proc/self/task"))]
    while time.monotonic() < end and counts[-1] > before:
        time.sleep(0.05)
        counts.append(len(os.listdir("/proc/self/task")))
    return min(counts)

torch.set_num_threads(4)  # keeps some of torch's own
ENCODES = 1  # a thread that stays with the scorer and does not compute
before = len(os.listdir("/proc/self/task")) + ENCODES
scorer = Scorer.open(engine=EngineConfig(kind="torch", device="cpu", threads=4))
scorer.prepare([CANARY]).cancel()
opened = fewest()
in_passing_thread(lambda: scorer.score([CANARY]))
tried = fewest()
scorer.score([CANARY])
print(before, opened, tried, fewest(1))
"""


def test_loading_and_trying_an_engine_leaves_no_threads_behind():
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True)
    before, opened, tried, computed_here = map(int, done.stdout.split())
    assert before == opened == tried
    assert computed_here == before + 3
