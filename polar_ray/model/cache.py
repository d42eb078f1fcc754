"""What is computed from a checkpoint once for all processes of a node, and kept for the next time."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from polar_ray.model.checkpoint import Checkpoint


def cache_folder() -> Path:
    """`polar_ray` in XDG_CACHE_HOME, or in `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "polar_ray"


def kept(checkpoint: Checkpoint, kind: str, version: str, make: Callable[[Path], None]) -> Path:
    """A folder that `make` has filled once for these weights; another process that asks meanwhile waits for it.

    `version` names what besides the weights decides its content. The weights are known by their files' paths, sizes,
    times and headers and not by their bytes, which a node would have to read whole at every start; the time at which
    the system last saw a file change cannot be set back, so files that are replaced are other weights.
    """
    folder = cache_folder() / kind / f"{_stamp(checkpoint)}-{version}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
            try:
                make(aside)
                aside.rename(folder)
            except BaseException:
                shutil.rmtree(aside, ignore_errors=True)
                raise
    return folder


def _stamp(checkpoint: Checkpoint) -> str:
    stamp = hashlib.sha256(checkpoint.config.model_dump_json().encode())
    for file in sorted({stored.file for stored in checkpoint.stored.values()}):
        found = file.stat()
        stamp.update(f"\n{file.resolve()} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}".encode())
    for name, stored in sorted(checkpoint.stored.items()):
        stamp.update(f"\n{name} {stored.dtype} {stored.shape} {stored.start}".encode())
    return stamp.hexdigest()[:32]
