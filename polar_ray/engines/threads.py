"""Which threads compute on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def in_passing_thread(compute: Callable[[], T]) -> T:
    """What `compute` gives or raises, in a thread that ends with it.

    OpenMP keeps helpers for every thread that has computed. Where all of them together are more than the processors,
    they sleep between any two loops instead of waiting awake, and a small model runs at about half its speed. So what
    another thread is going to compute with must not be loaded or tried in one that stays.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(compute).result()
