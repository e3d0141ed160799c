"""The same as ``interactive_serial.py``, for the ranks of an MPI world."""

from __future__ import annotations

import sys

from executorlib.api.program import serve_functions

if __name__ == "__main__":
    try:
        from mpi4py import MPI
    except ImportError as error:
        sys.exit(f'{error}. To run several ranks: pip install "executorlib[mpi]"')
    # A communicator of its own: the functions' messages are not mistaken for ours.
    serve_functions(MPI.COMM_WORLD.Dup())
