"""What a process and all that descend from it have spent and hold; and having them wait."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import psutil


class ProcessTree:
    """The process `pid` and whatever descends from it at the time of a call. Ended ones are left out."""

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def cpu_s(self) -> float:
        """User and system seconds so far."""
        total = 0.0
        for process in self._running():
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                spent = process.cpu_times()
                total += spent.user + spent.system
        return total

    def memory(self) -> int:
        """Bytes; what several of them have in common is counted once. Needs Linux."""
        total = 0
        for process in self._running():
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                total += process.memory_full_info().pss
        return total

    def pause(self) -> None:
        """Stop them where they are, so that one that polls takes no time from others."""
        for process in self._running():
            with suppress(psutil.NoSuchProcess):
                process.suspend()

    def resume(self) -> None:
        for process in self._running():
            with suppress(psutil.NoSuchProcess):
                process.resume()

    def kill(self) -> None:
        for process in self._running():
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def _running(self) -> Iterator[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            first = psutil.Process(self._pid)
            yield from [first, *first.children(recursive=True)]
