"""Batches and replies between an engine and its ranks, over a socket: JSON and plain arrays, no pickles."""

from __future__ import annotations

import json
import socket
import struct
from itertools import count
from typing import Any, NamedTuple

import numpy as np

from polar_ray.planning import Batch, Ids, Node

LENGTHS = struct.Struct("<QQ")
"""Bytes of the JSON, then of the array behind it."""


class Message(NamedTuple):
    """`head` is what JSON can say; `body` an array's bytes."""

    head: dict[str, Any]
    body: bytes = b""


class Channel:
    """One end of a connection between two processes that trust each other."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def fileno(self) -> int:
        """For `select`."""
        return self._end.fileno()

    def send(self, message: Message, timeout_s: float | None = None) -> None:
        """Raises `OSError` when the other end is gone, or takes nothing for `timeout_s`."""
        head = json.dumps(message.head).encode()
        self._end.settimeout(timeout_s)
        self._end.sendall(LENGTHS.pack(len(head), len(message.body)) + head + message.body)

    def receive(self, timeout_s: float | None = None) -> Message | None:
        """None when the other end is gone. Raises `TimeoutError` when a message does not go on for `timeout_s`."""
        self._end.settimeout(timeout_s)
        try:
            lengths = self._read(LENGTHS.size)
            if lengths is None:
                return None
            n_head, n_body = LENGTHS.unpack(lengths)
            head, body = self._read(n_head), self._read(n_body)
        except ConnectionError:
            return None
        return None if head is None or body is None else Message(json.loads(head), body)

    def close(self) -> None:
        self._end.close()

    def _read(self, size: int) -> bytes | None:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            count = self._end.recv_into(view)
            if not count:
                return None
            view = view[count:]
        return bytes(data)


def batch_message(batch: Batch) -> Message:
    """The ids of `batch`; the rows they belong to stay behind."""
    nodes = [[len(node.ids), node.parent, node.row is not None] for node in batch.nodes]
    return Message({"nodes": nodes}, np.concatenate([node.ids for node in batch.nodes]).astype("<i4").tobytes())


def read_batch(message: Message) -> Batch:
    """What `batch_message` was given, its sequences numbered from 0."""
    ids: Ids = np.frombuffer(message.body, dtype="<i4")
    nodes: list[Node] = []
    start, rows = 0, count()
    for length, parent, is_end in message.head["nodes"]:
        nodes.append(Node(ids[start : start + length], parent, next(rows) if is_end else None))
        start += length
    return Batch(tuple(nodes))
