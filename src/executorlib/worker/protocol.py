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


# What queuing systems call the number of a job in its array; without one, the job is the only one.
ELEMENT_VARIABLES = ("SLURM_ARRAY_TASK_ID", "SGE_TASK_ID", "PBS_ARRAY_INDEX", "LSB_JOBINDEX")


def first_number(names: Sequence[str]) -> int | None:
    """The first of these environment variables that holds a number."""
    for name in names:
        value = os.environ.get(name, "")
        if value.isdigit():
            return int(value)
    return None


def element_number() -> int:
    """This job's number in its job array."""
    return first_number(ELEMENT_VARIABLES) or 0
