"""What an engine's start is busy with, for whoever waits: stages are logged, and can be watched."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger("polar_ray.start")
logger.setLevel(logging.INFO)


@contextmanager
def stage(what: str) -> Iterator[None]:
    """Log `what` as it begins, and again with its seconds when it is done. A stage may have others within."""
    logger.info(what)
    began = time.perf_counter()
    yield
    logger.info("%s: %.1f s", what, time.perf_counter() - began)


@contextmanager
def watched(show: Callable[[str], None]) -> Iterator[None]:
    """Have `show` called with every line that any thread logs meanwhile."""
    handler = _Showing(show)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _Showing(logging.Handler):
    def __init__(self, show: Callable[[str], None]) -> None:
        super().__init__()
        self._show = show

    def emit(self, record: logging.LogRecord) -> None:
        self._show(record.getMessage())
