"""Functions of the tests of nodes. This module imports almost nothing, because every new worker imports it."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any


def node() -> str:
    return os.environ["SLURMD_NODENAME"]


def arguments() -> list[str]:
    return sys.argv


def same(value: Any) -> Any:
    return value


def append(path: str, number: int) -> int:
    with open(path, "a") as file:
        file.write(f"{number}\n")
    return number


def append_and_die(path: str, number: int) -> None:
    append(path, number)
    os.kill(os.getpid(), signal.SIGKILL)


def write_to_sockets(data: bytes) -> None:
    import contextlib
    import stat

    for fd in range(3, 64):
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.fstat(fd).st_mode):
                os.write(fd, data)


def fail() -> None:
    raise ValueError("an ordinary one")


def agent_and_relay() -> tuple[int, int]:
    return os.getppid(), relay()


def relay() -> int:
    """The process id of the relay, which is the parent of the node agent."""
    with open(f"/proc/{os.getppid()}/stat") as stat:
        return int(stat.read().rpartition(")")[2].split()[1])


def begin(folder: str, number: int) -> tuple[str, int]:
    """Tell which relay this is below, and wait until the file ``end`` is there."""
    path = os.path.join(folder, str(number))
    first = not os.path.exists(path)
    with open(path + ".new", "w") as file:
        file.write(f"{relay()} {node()}")
    os.rename(path + ".new", path)
    while first and not os.path.exists(os.path.join(folder, "end")):
        time.sleep(0.01)
    return node(), number


def limits() -> tuple[int, int]:
    import logging

    return sys.getrecursionlimit(), logging.getLogger("talkative").level
