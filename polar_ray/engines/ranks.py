"""Our torch engine over several devices: each rank is a process of its own that holds a part of every layer.

Ranks are children of the engine's process and not Ray actors: one actor asks for all their GPUs, in a job as in a
replica, and when it goes, however it goes, they go with it. Placement groups that a Data actor makes outlive the job.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np

from polar_ray.config import EngineConfig
from polar_ray.engines.channel import Channel, Message, batch_message
from polar_ray.errors import EngineError, EngineStartError, PolarRayError, ProcessCrashed, error_kinds
from polar_ray.planning import Batch, Rewards

PROGRAM = "polar_ray.engines.torch.rank"

REPLY_S = 900.0
"""For one batch: a CPU takes minutes for a long one."""

COLLECTIVE_TIMEOUT_S = 120.0
"""For the ranks to add up one sum. They do equal work and hardly wait for each other, so this finds one that hangs."""

GRACE_S = 5.0
"""For ranks to leave by themselves; for the others to reply once one has failed."""

TAIL_LINES = 12
"""Of what the ranks have written, in the error that says why one ended."""


class RanksEngine:
    """Keeps the promises of `Engine`. Not thread-safe, but for `is_running`.

    A batch on which all ranks fail alike is an `EngineError`. A rank that ends, hangs or falls out of step takes the
    others with it: that call and all later ones raise `ProcessCrashed`, and the owner has to start another engine.
    """

    def __init__(self, ranks: _Ranks, *, token_budget: int, max_shared_length: int | None) -> None:
        self._ranks = ranks
        self._token_budget = token_budget
        self._max_shared_length = max_shared_length
        self._end: str | None = None
        self._forgotten = weakref.finalize(self, ranks.end)

    @classmethod
    def start(
        cls, folder: Path, engine: EngineConfig, *, collective_timeout_s: float = COLLECTIVE_TIMEOUT_S
    ) -> RanksEngine:
        """`engine.tensor_parallel_size` ranks of the checkpoint in `folder`: each on a GPU, or with its share of the
        CPU threads.

        Raises `CheckpointError`, or `EngineStartError` if they are not up within `engine.start_timeout_s`.
        """
        count, budget = engine.tensor_parallel_size, engine.token_budget
        threads = max(1, (engine.threads or len(os.sched_getaffinity(0))) // count)
        ranks = _Ranks(count, threads)
        task = {
            "folder": str(folder),
            "dtype": engine.dtype,
            "device": engine.device,
            "rope_base": engine.rope_base,
            "threads": threads,
            "ranks": count,
            "store": ranks.store,
            "collective_timeout_s": collective_timeout_s,
        }
        try:
            for rank, channel in enumerate(ranks.channels):
                channel.send(Message({**task, "rank": rank}), GRACE_S)
            ready = {}
            for rank, message in ranks.replies(engine.start_timeout_s):
                if "error" in message.head:
                    raise _error(message)
                ready[rank] = message.head
        except (OSError, _RankLost) as error:
            ranks.end()
            raise EngineStartError(f"{error}; if it still loads, raise engine.start_timeout_s") from None
        except BaseException:
            ranks.end()
            raise
        return cls(ranks, token_budget=budget or 4096, max_shared_length=ready[0]["max_shared_length"])

    @property
    def token_budget(self) -> int:
        return self._token_budget

    @property
    def max_shared_length(self) -> int | None:
        return self._max_shared_length

    def score(self, batch: Batch) -> Rewards:
        if self._end is not None:
            raise ProcessCrashed(self._end)
        if self._ranks.is_over:
            raise EngineError("the engine is closed; load it again")
        if not len(batch):
            return np.empty(0, dtype=np.float32)
        try:
            return self._score(batch)
        except (OSError, _RankLost) as error:
            self._lose(f"{error}; the engine has to be started again")
            raise ProcessCrashed(self._end or "") from None
        except EngineError:
            raise
        except (
            BaseException
        ):  # an interrupted exchange leaves replies under way, which no later batch may take for its own
            self._lose("a batch was interrupted; the engine has to be started again")
            raise

    def is_running(self) -> bool:
        """Whether every rank is there. Safe in any thread."""
        return self._ranks.are_running()

    def close(self) -> None:
        self._ranks.end(GRACE_S)

    def _score(self, batch: Batch) -> Rewards:
        message = batch_message(batch)
        for channel in self._ranks.channels:
            channel.send(message, REPLY_S)
        replies = dict(self._ranks.replies(REPLY_S))
        failed = [reply for _, reply in sorted(replies.items()) if "error" in reply.head]
        if not failed:
            return np.frombuffer(replies[0].body, dtype=np.float32).copy()
        in_step = len({reply.head["done"] for reply in replies.values()}) == 1 and failed[0].head["done"] is not None
        if len(failed) == len(replies) and in_step:
            raise _error(failed[0])
        raise _RankLost(f"not all of {len(replies)} ranks failed on a batch alike: {failed[0].head['detail']}")

    def _lose(self, why: str) -> None:
        self._end = why
        self._ranks.end()


class _RankLost(Exception):
    """A rank has ended, or does not answer; the message says which, and what is known of why."""


class _Ranks:
    """The processes and the connections to them, from the first's start to the last's end."""

    def __init__(self, count: int, threads: int) -> None:
        self.channels: list[Channel] = []
        self.store = os.memfd_create("polar_ray-ranks")
        """Descriptor, here and in the ranks, of the memory in which they tell each other their addresses: no file that
        a killed process would leave, no port that another could take."""

        self.is_over = False
        self._processes: list[subprocess.Popen[bytes]] = []
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._may_end = threading.Event()
        started: Future[None] = Future()
        threading.Thread(target=self._keep, args=(count, threads, started), daemon=True, name="polar-ray-ranks").start()
        try:
            started.result()
        except OSError as error:
            self.end()
            raise EngineStartError(f"no process can be started: {error}") from error

    def replies(self, timeout_s: float) -> Iterator[tuple[int, Message]]:
        """A message of each rank, with its number, as they come. Raises `_RankLost`."""
        deadline = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            for rank, channel in enumerate(self.channels):
                selector.register(channel, selectors.EVENT_READ, rank)
            while selector.get_map():
                found = selector.select(max(0.0, deadline - time.monotonic()))
                if not found:
                    silent = ", ".join(str(key.data) for key in selector.get_map().values())
                    raise _RankLost(f"rank {silent} of {len(self.channels)} does not answer")
                for key, _ in found:
                    message = self._receive(key.data)
                    selector.unregister(key.fileobj)
                    if "error" in message.head:
                        deadline = min(deadline, time.monotonic() + GRACE_S)
                    yield key.data, message

    def are_running(self) -> bool:
        return not self.is_over and all(process.poll() is None for process in self._processes)

    def end(self, grace_s: float = 0.0) -> None:
        """Let every process end, or end it after `grace_s`, and return when all are gone. May be called twice."""
        if self.is_over:
            return
        self.is_over = True
        for channel in self.channels:
            channel.close()
        deadline = time.monotonic() + grace_s
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
        for process in self._processes:
            process.wait()
        self._may_end.set()
        self._log.close()
        os.close(self.store)

    def _receive(self, rank: int) -> Message:
        message = self.channels[rank].receive(GRACE_S)
        if message is not None:
            return message
        try:
            status = self._processes[rank].wait(GRACE_S)
        except subprocess.TimeoutExpired:
            raise _RankLost(f"rank {rank} of {len(self.channels)} has hung up") from None
        if status < 0:
            how = f"was ended by {signal.Signals(-status).name}"
            raise _RankLost(f"rank {rank} of {len(self.channels)} {how}" + (": out of memory?" if status == -9 else ""))
        raise _RankLost(f"rank {rank} of {len(self.channels)} ended with status {status}: {self._tail()}")

    def _keep(self, count: int, threads: int, started: Future[None]) -> None:
        """Start the ranks, and stay: the kernel ends them with the thread that started them, which must not be one of a
        caller's that ends before the engine does."""
        try:
            for _ in range(count):
                self._start_one(threads)
        except OSError as error:
            started.set_exception(error)
        else:
            started.set_result(None)
        self._may_end.wait()

    def _start_one(self, threads: int) -> None:
        ours, theirs = socket.socketpair()
        self.channels.append(Channel(ours))
        with theirs:
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-P", "-m", PROGRAM, str(theirs.fileno()), str(os.getpid())],
                    stdin=subprocess.DEVNULL,
                    stdout=self._log,
                    stderr=self._log,
                    pass_fds=(theirs.fileno(), self.store),
                    env={
                        **os.environ,
                        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
                        "OMP_NUM_THREADS": str(threads),
                        "GLOO_SOCKET_IFNAME": "lo",
                        "NCCL_SOCKET_IFNAME": "lo",
                    },
                )
            )

    def _tail(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").splitlines()
        return "\n".join(["the ranks' log ends:", *lines[-TAIL_LINES:]]) if lines else "it has logged nothing"


def _error(message: Message) -> PolarRayError:
    kind = error_kinds()[message.head["error"]]
    return kind(message.head["detail"], **message.head["details"])
