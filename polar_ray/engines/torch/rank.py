"""The program of one rank: its part of a model, and batches for as long as the engine's process is there.

    python -m polar_ray.engines.torch.rank SOCKET PARENT

SOCKET is the descriptor of the connection to the engine, PARENT the engine's process id. Every rank gets every batch
and replies to it; the rewards are rank 0's.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from polar_ray.engines.channel import Channel, Message, read_batch
from polar_ray.errors import EngineStartError, PolarRayError

if TYPE_CHECKING:
    from torch import Tensor

    from polar_ray.engines.torch.engine import TorchEngine

PR_SET_PDEATHSIG = 1


class SumOfRanks:
    """Adds partial sums up over all ranks, in float32; every rank gets the same bits."""

    def __init__(self) -> None:
        self.done: int | None = 0
        """Sums so far, by which the ranks are known to be in step; None once one has failed, which ends the group."""

    def __call__(self, partial: Tensor) -> Tensor:
        import torch.distributed as dist

        total = partial.float()
        done, self.done = self.done, None
        dist.all_reduce(total)
        self.done = None if done is None else done + 1
        return total


def main(descriptor: int, parent: int) -> None:
    _end_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole foreground group; the engine says when
    channel = Channel(socket.socket(fileno=descriptor))
    task = channel.receive()
    if task is None:
        return
    add_up = SumOfRanks()
    try:
        engine = _load(task.head, add_up)
    except PolarRayError as error:
        channel.send(_failed(error, add_up))
        return
    channel.send(Message({"max_shared_length": engine.max_shared_length}))
    while (message := channel.receive()) is not None:
        try:
            rewards = engine.score(read_batch(message))
        except PolarRayError as error:
            channel.send(_failed(error, add_up))
        else:
            channel.send(Message({"done": add_up.done}, rewards.tobytes() if task.head["rank"] == 0 else b""))


def _end_with(parent: int) -> None:
    """Have the kernel end this process with the thread that started it, which lives as long as the engine does."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before that
        sys.exit(1)


def _load(task: dict[str, Any], add_up: SumOfRanks) -> TorchEngine:
    """Join the group, then read this rank's part. Raises what `TorchEngine.load` raises."""
    import torch
    import torch.distributed as dist

    from polar_ray.engines.torch.engine import TorchEngine
    from polar_ray.engines.torch.shard import Shard

    rank, ranks, on_gpu = task["rank"], task["ranks"], task["device"] == "cuda"
    device = f"cuda:{rank}" if on_gpu else "cpu"
    if on_gpu and torch.cuda.device_count() < ranks:
        raise EngineStartError(
            f"engine.tensor_parallel_size = {ranks}: {torch.cuda.device_count()} GPUs are visible here; lower it, or "
            "give the engine's process more"
        )
    try:
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=dist.FileStore(f"/proc/self/fd/{task['store']}", ranks),  # type: ignore[attr-defined]  # not in __all__
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=task["collective_timeout_s"]),
            device_id=torch.device(device) if on_gpu else None,
        )
    except RuntimeError as error:
        raise EngineStartError(f"the ranks do not find each other: {error}") from error
    return TorchEngine.load(
        task["folder"],
        dtype=task["dtype"],
        device=device,
        rope_base=task["rope_base"],
        threads=task["threads"],
        shard=Shard(rank, ranks),
        add_up=add_up,
    )


def _failed(error: PolarRayError, add_up: SumOfRanks) -> Message:
    return Message({"error": error.code, "detail": str(error), "details": error.details, "done": add_up.done})


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
    os._exit(0)  # nothing is left to write, and torch takes its time to be taken down, for which `close` would wait
