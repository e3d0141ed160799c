"""The steps that all ranks of an MPI world take together, in a world that serves an executor and in a job."""

from __future__ import annotations

import contextlib
import os
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

# How long, in seconds, a rank that failed waits for the others, which may be waiting for it inside the function.
_PATIENCE_SECONDS = 0.5
# Where MPICH keeps the memory that ranks of a node share. From version 5 on, it stays if a world ends out of order.
# UCX, which MPICH uses, removes the names of its files right after making them, so a rank killed in between leaves one.
_MEMORY = "/dev/shm"
_SHARED_FILES = _MEMORY + "/mpich_shm_"
_SHARED_NAMES = r"mpich_(shm|vci)_[0-9a-f]{1,8}_\d+|ucx_shm_posix_[0-9a-f]{1,16}"


def join() -> Any:
    """Make a communicator of all ranks, for our messages alone. They must never mix with those of users' functions."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD.Dup()
    # No rank gets past this before all have entered it, and by then each has mapped what is shared.
    unlink_shared_files(os.getpid())
    return world


def is_on_one_node(world: Any) -> bool:
    """Return True if all ranks are on one node. Every rank has to call this."""
    from mpi4py import MPI

    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    size: int = node.Get_size()
    node.Free()
    return size == int(world.Get_size())


def unlink_shared_files(pid: int) -> None:
    """Remove the names of the memory that a rank shares with others. The last of them frees it, however it ends.

    Args:
        pid: The rank's process. If others of its world may not have mapped that memory yet, they must be killed.
    """
    with contextlib.suppress(OSError), open(f"/proc/{pid}/maps") as maps:
        for line in maps:
            *_, path = line.rstrip("\n").partition(_SHARED_FILES)
            if path and not path.endswith(" (deleted)"):
                with contextlib.suppress(FileNotFoundError):  # another rank was first
                    os.unlink(_SHARED_FILES + path)


def remove_unused_files(since: float) -> bool:
    """Remove the files left by ranks that were killed before all had begun (see `join`).

    Only the kernel knows who uses a file: processes in other containers are not in our `/proc`. It grants a lease for
    reading only if no process has the file open for writing, and a mapping counts as that. MPICH and UCX write to the
    file from its creation on. If the kernel has no leases, the files stay.

    Args:
        since: When the first of these ranks was started. Files last written before that are left alone.

    Returns:
        True if some files are in use: by other worlds, or by ranks whose mappings the kernel is still taking down. This
        may go on after they have been reaped, if somebody was reading in their `/proc`.
    """
    import fcntl
    import re
    import signal

    used = False
    with contextlib.suppress(OSError):
        for name in filter(re.compile(_SHARED_NAMES).fullmatch, os.listdir(_MEMORY)):
            path = f"{_MEMORY}/{name}"
            with contextlib.suppress(OSError):  # the file is another user's or gone, or there are no leases here
                # Opened without waiting and without following links, because anybody may put something there.
                fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
                try:
                    found = os.fstat(fd)
                    if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and found.st_mtime >= since:
                        # If somebody opens the file meanwhile, we get a signal. The default one would end this process.
                        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
                        try:
                            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
                        except BlockingIOError:
                            used = True
                        else:
                            os.unlink(path)
                finally:
                    os.close(fd)
    return used


def gather(world: Any, value: object, on_left_alone: Callable[[], None] | None = None) -> list[Any] | None:
    """Gather what the ranks got out of a call.

    Args:
        world: The communicator that `join` returned.
        value: What this rank got.
        on_left_alone: If this rank failed: reports the failure, so that the world is ended. It is called from another
            thread if the other ranks do not get here soon.

    Returns:
        On the first rank, the values of all ranks; on the others None.
    """
    if on_left_alone is None:
        world.Barrier()
    else:
        _meet(world, on_left_alone)
    gathered: list[Any] | None = world.gather(value, 0)
    return gathered


def _meet(world: Any, on_left_alone: Callable[[], None]) -> None:
    import threading

    met = threading.Event()

    def watch() -> None:
        if not met.wait(_PATIENCE_SECONDS):
            on_left_alone()

    watcher = threading.Thread(target=watch)
    watcher.start()
    world.Barrier()
    met.set()
    watcher.join()
