"""What workers and those who start them agree on: permits, and variables of the environment."""

from __future__ import annotations

import os
import socket
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

# The libraries' own documentation names these: OpenMP, OpenBLAS, MKL, numexpr, Apple's Accelerate (vecLib).
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
GPU_VARIABLES = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")

PERMIT = struct.Struct("<Q")


class Permits:
    """Says which of the calls that a worker holds it may start.

    A worker of a block may hold calls beyond the one that it runs, so that it need not wait for the next. Whether it
    starts one of these or the executor takes it back is settled by who reads the call's number from this socket
    first: both have a descriptor of its reading end. A number is sent before its call.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._next = 0  # read already, for a call that comes later

    def allow(self, number: int) -> bool:
        """Whether call ``number``, the first that the worker holds, may start; if not, it was taken back."""
        if not self._next:
            try:
                data = self._sock.recv(PERMIT.size, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return False
            if len(data) < PERMIT.size:
                return False
            (self._next,) = PERMIT.unpack(data)
        if self._next != number:
            return False
        self._next = 0
        return True


def first_number(names: Sequence[str]) -> int | None:
    """The first of these environment variables that holds a number."""
    for name in names:
        value = os.environ.get(name, "")
        if value.isdigit():
            return int(value)
    return None


def element_number(names: Sequence[str]) -> int:
    """This job's number in its job array; without one, it is the only job.

    Args:
        names: What its queuing system calls the variable. Those of others count for nothing: the session may have been
            in a job of theirs.
    """
    return first_number(names) or 0


def element_text(names: Sequence[str] | None) -> str:
    """The same as text; empty where there is no array to ask for."""
    return "" if names is None else str(element_number(names))
