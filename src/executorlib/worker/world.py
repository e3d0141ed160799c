"""What the ranks of an MPI world do together, whether the world serves an executor or is a job."""

from __future__ import annotations

import contextlib
import os
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

# How long a rank that has failed waits for the others, in seconds: they may be waiting for it inside the function.
_PATIENCE_SECONDS = 0.5
# Where MPICH keeps what the ranks of a node share. From version 5 on it stays there when a world does not end in order.
# UCX, below it, removes the names of its files as soon as it has made them: a rank that is killed between leaves one.
_MEMORY = "/dev/shm"
_SHARED_FILES = _MEMORY + "/mpich_shm_"
_SHARED_NAMES = r"mpich_(shm|vci)_[0-9a-f]{1,8}_\d+|ucx_shm_posix_[0-9a-f]{1,16}"


def join() -> Any:
    """Make a communicator of all ranks, for us alone: our messages must never meet those of the user's functions."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD.Dup()
    # No rank is through here before all have begun it, and by then each has mapped what is shared.
    unlink_shared_files(os.getpid())
    return world


def is_on_one_node(world: Any) -> bool:
    """Whether all ranks are on one node; to be called on each."""
    from mpi4py import MPI

    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    size: int = node.Get_size()
    node.Free()
    return size == int(world.Get_size())


def unlink_shared_files(pid: int) -> None:
    """Remove the names of the memory that a rank shares with others: it is freed with the last one, whatever ends that.

    Args:
        pid: The rank; where others of its world may not have that memory yet, they are to be killed.
    """
    with contextlib.suppress(OSError), open(f"/proc/{pid}/maps") as maps:
        for line in maps:
            *_, path = line.rstrip("\n").partition(_SHARED_FILES)
            if path and not path.endswith(" (deleted)"):
                with contextlib.suppress(FileNotFoundError):  # another rank was first
                    os.unlink(_SHARED_FILES + path)


def remove_unused_files(since: float) -> bool:
    """Remove what is left of ranks that were killed before all had begun (see `join`).

    Nobody but the kernel knows who uses a file: processes in other containers are in no `/proc` of ours. It grants a
    lease for reading only where no process has the file open for writing, and a mapping counts as that. MPICH and
    UCX write to it from its creation on. Where the kernel has no leases the files stay.

    Args:
        since: When the first of these ranks was started. What was last written before that is left alone.

    Returns:
        Whether some are in use: by other worlds, or by ranks of which the kernel is still taking down the mappings. It
        may be at that after they have been reaped, if somebody was reading in their `/proc`.
    """
    import fcntl
    import re
    import signal

    used = False
    with contextlib.suppress(OSError):
        for name in filter(re.compile(_SHARED_NAMES).fullmatch, os.listdir(_MEMORY)):
            path = f"{_MEMORY}/{name}"
            with contextlib.suppress(OSError):  # another's, or removed meanwhile; or no leases here
                # Without waiting or following: anybody may put something there.
                fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
                try:
                    found = os.fstat(fd)
                    if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and found.st_mtime >= since:
                        # Whoever opens it meanwhile has us told of it; by default that ends a process.
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
    """Gather what the ranks have got out of a call.

    Args:
        world: What `join` returned.
        value: What this rank has.
        on_left_alone: Where this rank has failed: tells of it, so that the world is ended. Called from another thread,
            if the others do not come to this point soon.

    Returns:
        The values of all ranks, on the first one.
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
