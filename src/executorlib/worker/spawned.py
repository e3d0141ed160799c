"""A worker that was started as a program of its own: `start_method="spawn"`."""

from __future__ import annotations

import socket
import sys

from executorlib.transports.messages import Connection
from executorlib.worker import call, protocol
from executorlib.worker.agent import CONNECTION_FD, PERMITS_FD, note_files


def main(pooled: bool, preload: list[str]) -> None:
    """Serve calls over the inherited descriptors, then end the process.

    Args:
        pooled: True if it runs many calls and so needs permits.
        preload: Modules to import first.
    """
    try:
        call.load(preload)
        note_files(preload)
        permits = protocol.WorkerPermits(_socket(PERMITS_FD)) if pooled else None
        connection = Connection(_socket(CONNECTION_FD))
        call.serve(connection, permits)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the executor is gone
    except BaseException as error:
        sys.stderr.write(call.traceback_text(error))
        call.leave(1)
    call.leave(0)


def _socket(fd: int) -> socket.socket:
    sock = socket.socket(fileno=fd)
    sock.set_inheritable(False)
    return sock
