"""What replicas are busy with while they start, for whoever has deployed them and waits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray

from polar_ray.stages import watched

POLL_S = 0.25


class StageBoard:
    """The latest stage that any replica has told of. A Ray actor, which lives as long as somebody waits."""

    def __init__(self) -> None:
        self._told = ""

    def tell(self, text: str) -> None:
        self._told = text

    def read(self) -> str:
        return self._told


def _name(application: str) -> str:
    return f"polar_ray_start:{application}"


@contextmanager
def telling(application: str) -> Iterator[None]:
    """Of a replica: tell of this process's stages, if somebody waits for the application."""
    try:
        board = ray.get_actor(_name(application), namespace="serve")
    except ValueError:
        yield
        return
    with watched(lambda text: board.tell.remote(text)):
        yield


@contextmanager
def listening(application: str, show: Callable[[str], None]) -> Iterator[None]:
    """Of who waits: have `show` called, in a thread, with every new stage of the application's replicas."""
    options = {"name": _name(application), "namespace": "serve", "get_if_exists": True, "num_cpus": 0}
    board = ray.remote(StageBoard).options(**options).remote()
    over = threading.Event()

    def listen() -> None:
        shown = ""
        while not over.wait(POLL_S):
            told: str = ray.get(board.read.remote())
            if told != shown:
                shown = told
                show(told)

    listener = threading.Thread(target=listen, name="polar-ray-stages", daemon=True)
    listener.start()
    try:
        yield
    finally:
        over.set()
        listener.join()
