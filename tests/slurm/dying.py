"""Functions whose jobs die until there is a file ``calm`` in their folder; from then on they return `CALM`.

So the very same call can be submitted again and succeeds. Jobs import this module, so that it imports little itself.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

CALM = "calm"
LAST_WORDS = "last words of the job"


def put(path: str) -> None:
    with open(path, "w"):
        pass


def _segfault() -> None:
    import ctypes
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.string_at(0)


def _take_memory() -> None:
    hoard = []
    for _ in range(600):
        hoard.append(b"x" * (1 << 20))
        time.sleep(0.001)
    time.sleep(60)  # where Slurm looks at the memory only now and then


def _kill_instead(_source: Any, _target: Any, **_folders: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_at_rename() -> None:
    os.rename = _kill_instead


def _keep_result_back() -> None:
    """Write the result where it is not looked for, as a slow file system does."""
    rename = os.rename

    def late(source: Any, target: Any, **folders: int) -> None:
        rename(source, f"{target}.late", **folders)

    os.rename = late  # type: ignore[assignment]


def _write_half() -> None:
    """Leave half of a result in its place, as a file system does that loses writes."""
    rename = os.rename

    def cut(source: Any, target: Any, src_dir_fd: int, dst_dir_fd: int) -> None:
        file = os.open(source, os.O_WRONLY, dir_fd=src_dir_fd)
        os.ftruncate(file, os.fstat(file).st_size // 2)
        os.close(file)
        rename(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

    os.rename = cut  # type: ignore[assignment]


WAYS: dict[str, Callable[[], Any]] = {
    "os._exit": lambda: os._exit(7),
    "os._exit(0)": lambda: os._exit(0),
    "os._exit(3)": lambda: os._exit(3),
    "sys.exit": lambda: sys.exit(7),
    "segfault": _segfault,
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "out of memory": _take_memory,
    "sleep": lambda: time.sleep(90),
    "other sleep": lambda: time.sleep(90),
    "long sleep": lambda: time.sleep(90),
    "calm": lambda: None,
    "calm too": lambda: None,
    "killed at the rename": _die_at_rename,
    "result is late": _keep_result_back,
    "half a result": _write_half,
    "short sleep": lambda: time.sleep(3),
}


def strike(way: str, folder: str) -> str:
    """Die in this way, after some last words on standard error."""
    if not os.path.exists(f"{folder}/calm"):
        os.write(2, f"{LAST_WORDS}\n".encode())
        with open(f"{folder}/{way} started", "a") as log:
            log.write(f"{os.getpid()}\n")
        WAYS[way]()
    return CALM


def strike_in_job(way: str, folder: str, pid: int) -> str:
    """As `strike`, but not in the process of this id."""
    return CALM if os.getpid() == pid else strike(way, folder)


@dataclass
class StrikesWhenUnpickled:
    way: str
    folder: str

    def __reduce__(self) -> Any:
        return strike_in_job, (self.way, self.folder, os.getpid())


@dataclass
class StrikesWhenPickled:
    way: str
    folder: str

    def __reduce__(self) -> Any:
        return str, (strike(self.way, self.folder),)


def identity(value: Any) -> Any:
    return value


def strike_in_rank_1(way: str, folder: str) -> str:
    from mpi4py import MPI

    if MPI.COMM_WORLD.Get_rank() == 1:
        strike(way, folder)
    MPI.COMM_WORLD.Barrier()
    return CALM


def large(folder: str) -> bytes:
    """More than fits on a small disk, until it is calm."""
    return b"" if os.path.exists(f"{folder}/calm") else os.urandom(3 << 20)
