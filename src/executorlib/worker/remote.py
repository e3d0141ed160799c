"""A long-lived worker that connects to its executor over the network: ``python -m executorlib.worker.remote``.

A scheduler's job runs it, on whatever node; one job is one worker. It says ``["hello", {...}]``, gets ``["setup",
{...}]`` and runs calls as `worker.call` describes, one at a time, until ``["stop"]``.
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

# Between the loss of the connection and the end by force, in seconds: an idle worker ends by itself.
_GRACE_SECONDS = 3.0


class _Granted(protocol.Permits):
    """The executor sends one call at a time, so each may start."""

    def __init__(self) -> None:
        """Needs no socket."""

    def allow(self, number: int) -> bool:
        """See `Permits.allow`."""
        return True


def hello(size: int = 1, library: str = "") -> list[Any]:
    """The first message of a worker that connects by itself.

    Args:
        size: Ranks of the MPI world that it is.
        library: Name and version of the MPI library.

    Returns:
        The message's header: ``["hello", {"host", "pid", "size", "library", "version"}]``.
    """
    host = socket.gethostname()
    return ["hello", {"host": host, "pid": os.getpid(), "size": size, "library": library, "version": __version__}]


def end_by_force() -> None:
    """End this process, and what it started, although a call is running; nobody is there for its result."""
    time.sleep(_GRACE_SECONDS)
    with contextlib.suppress(Exception):  # what reads this may have gone with the executor
        sys.stderr.write(
            "executorlib: the connection to the executor was lost while a call was running; it is ended.\n"
        )
        sys.stderr.flush()
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def main(path: str = "", identity: str = "", numbered_by: Sequence[str] | None = None) -> None:
    """Connect, serve calls, then end the process.

    Exit code 0: it was told to stop, or could not be set up, of which the executor was told. 1: it could not connect,
    or the connection was lost, of which standard error tells.

    Args:
        path: File with the credentials; by default they are in the environment.
        identity: The worker's name, where the file is for several workers; by default the one in the file.
        numbered_by: The variables that tell the job's number in its array, which is appended to the name then; None
            for a name that is whole.
    """
    family.unblock()
    guard.begin()
    family.lead()
    family.adopt()
    try:
        given = os.environ.pop(CONNECTION_VARIABLE, "")
        credentials = Credentials.read(path) if path else Credentials.parse(given)
        name = (identity or credentials.identity) + protocol.element_text(numbered_by)
        dealer = Dealer(credentials, name, on_lost=end_by_force)
    except (OSError, ValueError) as error:
        sys.exit(f"executorlib: this worker cannot connect: {error}")
    try:
        dealer.send(hello())
        call.serve(cast("Connection", dealer), _Granted())  # it has the same send and receive
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
