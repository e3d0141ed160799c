"""The agreement between workers and those who start them: permits, and environment variables."""

from __future__ import annotations

import os
import socket
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

# As named in the libraries' own documentation: OpenMP, OpenBLAS, MKL, numexpr, Apple's Accelerate (vecLib).
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
GPU_VARIABLES = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")

_PERMIT = struct.Struct("<Q")
# More than the number of calls that a worker ever holds.
_MOST_PERMITS = 4096


class SocketPermits:
    """The executor's side of the permits that say which of the calls that a worker holds it may start.

    A worker of a block may hold more calls than the one that it runs, so that it need not wait for the next. A call's
    number is sent through a socket before the call, and both the worker and the executor have a descriptor of its
    reading end. Whoever reads the number first has the call: the worker to start it, the executor to take it back.

    Args:
        give: The writing end.
        take: The reading end, which the worker has as well.
    """

    def __init__(self, give: socket.socket, take: socket.socket) -> None:
        self._give = give
        self._take = take
        give.setblocking(False)

    def grant(self, numbers: Iterable[int]) -> None:
        """Let the worker start these calls, which it is sent next."""
        self._give.send(b"".join(map(_PERMIT.pack, numbers)))

    def take_back(self, most: int = _MOST_PERMITS) -> list[int]:
        """Take back up to this many calls that the worker has not started, and will not start; returns their numbers.

        Args:
            most: How many; by default all.
        """
        try:
            data = self._take.recv(most * _PERMIT.size, socket.MSG_DONTWAIT)
        except OSError:
            return []
        return [number for (number,) in _PERMIT.iter_unpack(data)]

    def close(self) -> None:
        """Close the sockets."""
        self._give.close()
        self._take.close()


class WorkerPermits:
    """The worker's side of `SocketPermits`.

    Args:
        sock: The reading end; None for a worker that is sent one call at a time, each of which may start.
    """

    def __init__(self, sock: socket.socket | None) -> None:
        self._sock = sock
        self._next = 0  # read already, for a call that is yet to come

    def allow(self, number: int) -> bool:
        """Return True if call ``number``, the first that the worker holds, may start; False if it was taken back."""
        if self._sock is None:
            return True
        if not self._next:
            try:
                data = self._sock.recv(_PERMIT.size, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return False
            if len(data) < _PERMIT.size:
                return False
            (self._next,) = _PERMIT.unpack(data)
        if self._next != number:
            return False
        self._next = 0
        return True


def first_number(names: Sequence[str]) -> int | None:
    """Return the number in the first of these environment variables that holds one."""
    for name in names:
        value = os.environ.get(name, "")
        if value.isdigit():
            return int(value)
    return None


# Jobs that were queued by versions without dialects of queuing systems name no variables. Only Slurm had job arrays
# then, and without its variable every job of an array would run the first call.
OLDER_SETUP = {"element_variables": ("SLURM_ARRAY_TASK_ID",), "local_rank_variables": ("SLURM_LOCALID",)}


def element_number(names: Sequence[str]) -> int:
    """Return this job's number in its job array, or 0 outside an array.

    Args:
        names: The variables in which the job's own queuing system gives the number. Variables of other systems do not
            count, because the session may have been in a job of such a system.
    """
    return first_number(names) or 0


def element_text(names: Sequence[str] | bool) -> str:
    """Return the number to append to a worker's name, as text.

    Args:
        names: The variables, as for `element_number`. False appends nothing. True stands for those of `OLDER_SETUP`.
    """
    if names is False:
        return ""
    return str(element_number(OLDER_SETUP["element_variables"] if names is True else names))
