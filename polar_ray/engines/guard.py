"""A program of its own, on the standard library alone: runs a command for as long as its own standard input is open.

The engine's process holds the other end of that pipe. However it ends, SIGKILL included, the pipe closes and the whole
process group of the command is ended; a parent-death signal alone would miss the command's own children, and would
fire when the thread that started it ends.

    python guard.py COMMAND [ARGUMENT...]
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time

GRACE_S = 5.0
"""Between SIGTERM and SIGKILL."""

PR_SET_PDEATHSIG = 1


def main(command: list[str]) -> int:
    libc = ctypes.CDLL(None)
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL),  # should this program be killed itself
    )
    ended = os.pidfd_open(child.pid)
    try:
        while True:
            readable, _, _ = select.select([sys.stdin, ended], [], [])
            if ended in readable:
                return child.wait()
            if not os.read(sys.stdin.fileno(), 4096):
                return 0
    finally:
        _end_group(child)


def _end_group(child: subprocess.Popen[bytes]) -> None:
    group = child.pid  # a session leader's; it may be gone while its children are not
    for signal_number, wait_s in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, GRACE_S)):
        try:
            os.killpg(group, signal_number)
        except ProcessLookupError:
            return
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline:
            child.poll()  # a zombie would keep the group
            try:
                os.killpg(group, 0)
            except ProcessLookupError:
                return
            time.sleep(0.02)


if __name__ == "__main__":
    # A terminal's Ctrl-C reaches the whole foreground group; when this ends is the engine's to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(main(sys.argv[1:]))
