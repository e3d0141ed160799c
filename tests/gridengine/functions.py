"""Functions for jobs, which import this module: it imports little itself."""

from __future__ import annotations

import os

CALM = "calm"


def surroundings() -> dict[str, str]:
    """Return the surroundings that a job finds."""
    return {**os.environ, "cwd": os.getcwd()}


def die(signal_number: int, folder: str) -> str:
    """End the process at once, by a signal or, where that is 0, with exit code 7; not once the folder says so."""
    if not os.path.exists(f"{folder}/{CALM}"):
        os.write(2, b"last words\n")
        if signal_number:
            os.kill(os.getpid(), signal_number)
        os._exit(7)
    return CALM


def rank_of(value: int) -> tuple[int, int]:
    from mpi4py import MPI

    return MPI.COMM_WORLD.Get_rank(), value
