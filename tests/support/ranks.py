"""The rank processes of engines, as the operating system sees them."""

import time

import psutil

from polar_ray.engines.ranks import PROGRAM


def ranks_below(pid: int) -> list[psutil.Process]:
    """Those whose engine runs in process `pid` or one that it has started, by engine and then by rank."""
    found = psutil.Process(pid).children(recursive=True)
    return sorted((process for process in found if is_rank(process)), key=lambda process: process.pid)


def is_rank(process: psutil.Process) -> bool:
    try:
        return PROGRAM in process.cmdline()
    except psutil.Error:
        return False


def are_gone(processes, seconds: float = 10) -> bool:
    """Within so many seconds; a zombie that nobody has waited for yet is gone."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes):
            return True
        time.sleep(0.05)
    return False
