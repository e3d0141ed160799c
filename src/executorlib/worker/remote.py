"""A long-lived worker that connects to its executor over the network: ``python -m executorlib.worker.remote``.

A scheduler's job runs it on any node, and one job is one worker. It sends ``["hello", {...}]``, gets ``["setup",
{...}]``, and runs calls as `worker.call` describes, one at a time, until ``["stop"]``.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from typing import TYPE_CHECKING, Any, cast

from executorlib._version import __version__
from executorlib.transports.curve import CONNECTION_VARIABLE, Credentials
from executorlib.transports.dealer import Dealer
from executorlib.worker import call, family, guard, protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from executorlib.transports.messages import Connection

# Seconds from the loss of the connection to the end by force. An idle worker ends by itself before that.
_GRACE_SECONDS = 3.0


def hello(size: int = 1, library: str = "") -> list[Any]:
    """Make the first message of a worker that connects by itself.

    Args:
        size: The number of ranks, if it is an MPI world.
        library: The name and version of the MPI library.

    Returns:
        The message's header: ``["hello", {"host", "pid", "size", "library", "version"}]``.
    """
    host = socket.gethostname()
    return ["hello", {"host": host, "pid": os.getpid(), "size": size, "library": library, "version": __version__}]


def end_by_force() -> None:
    """End this process and what it started, although a call is running, because nobody is left to take its result."""
    time.sleep(_GRACE_SECONDS)
    with contextlib.suppress(Exception):  # the reader of this may be gone together with the executor
        sys.stderr.write(
            "executorlib: the connection to the executor was lost while a call was running; it is ended.\n"
        )
        sys.stderr.flush()
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def main(path: str = "", identity: str = "", numbered: Sequence[str] | bool = False) -> None:
    """Connect, serve calls, then end the process.

    The exit code is 0 if it was told to stop, or could not be set up and told the executor so. It is 1 if it could not
    connect or lost the connection, with the reason on standard error.

    Args:
        path: The file with the credentials. By default they are in the environment.
        identity: The worker's name, if the file is for several workers. By default it is the one in the file.
        numbered: The variables that may hold the job's number in its array, which is appended to the name. False
            appends nothing; sessions of older versions give True.
    """
    family.unblock()
    guard.begin()
    family.lead()
    family.adopt()
    try:
        given = os.environ.pop(CONNECTION_VARIABLE, "")
        credentials = Credentials.read(path) if path else Credentials.parse(given)
        name = (identity or credentials.identity) + protocol.element_text(numbered)
        dealer = Dealer(credentials, name, on_lost=end_by_force)
    except (OSError, ValueError) as error:
        sys.exit(f"executorlib: this worker cannot connect: {error}")
    try:
        dealer.send(hello())
        call.serve(cast("Connection", dealer), protocol.WorkerPermits(None))  # a Dealer has the same send and receive
        dealer.close()
    except EOFError as error:
        sys.stderr.write(f"executorlib: this worker ends: {error}\n")
        call.leave(1, family.end)
    except BaseException as error:
        sys.stderr.write(call.traceback_text(error))
        call.leave(1, family.end)
    call.leave(0, family.end)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python -m executorlib.worker.remote FILE_WITH_CREDENTIALS [IDENTITY]")
    main(sys.argv[1], "".join(sys.argv[2:]))
