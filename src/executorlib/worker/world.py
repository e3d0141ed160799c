"""What the ranks of an MPI world do together, whether the world serves an executor or is a job."""

from __future__ import annotations

import contextlib
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

# How long a rank that has failed waits for the others, in seconds: they may be waiting for it inside the function.
_PATIENCE_SECONDS = 0.5
# Where MPICH keeps what the ranks of a node share. From version 5 on it stays there when a world does not end in order.
_SHARED_FILES = "/dev/shm/mpich_shm_"


def join() -> Any:
    """Make a communicator of all ranks, for us alone: our messages must never meet those of the user's functions."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD.Dup()
    # No rank is through here before all have begun it, and by then each has mapped what is shared.
    unlink_shared_files(os.getpid())
    return world


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
