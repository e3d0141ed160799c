"""Keeps the processes of a Flux job together: all of them end when the worker does, or when Flux's part does.

    Flux's shell ─▶ front ─▶ keeper ─▶ worker ─▶ what its calls start, in whatever session

Flux waits until nobody has a job's output open, and kills only the process that it started. So a process that a call
left behind would hold the job, and if a shell or broker died, a call would go on running although everybody is told
that it can be submitted again. Therefore the worker has two ancestors:

- The *keeper* becomes the parent of all processes that lose theirs. When the worker or the front has ended, it kills
  the others.
- The *front* is the process that Flux starts and signals. It passes signals on, and ends as the worker does. The keeper
  is not in its process group, so that it outlives a SIGKILL by Flux.

The front ends with Flux's shell. In an instance of the job's own, the broker is not always the front's parent, so the
keeper has a connection to the broker, which ends when the broker does.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import socket
import sys

from executorlib.worker import family

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

# An environment variable of jobs whose worker is to be guarded.
VARIABLE = "EXECUTORLIB_GUARD"
# <linux/prctl.h>
_PR_SET_DUMPABLE = 4


def begin() -> None:
    """Go on as a guarded worker if this process is to be one. Call this before the process has threads."""
    if not os.environ.pop(VARIABLE, "") or sys.platform != "linux":
        return
    broker = _connection_to_broker()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    family.prctl(family.PR_SET_PDEATHSIG, signal.SIGKILL)
    front = os.getpid()
    keeper = os.fork()
    if keeper:
        _Ancestor(keeper).wait()
    family.adopt()
    keeper = os.getpid()
    os.setpgid(0, 0)
    # It does not matter which signal: whatever wakes the keeper, it checks for its parent.
    family.prctl(family.PR_SET_PDEATHSIG, signal.SIGUSR1)
    worker = os.fork()
    if worker:
        with contextlib.suppress(OSError):  # the worker does this as well, so that it is done whoever is first
            os.setpgid(worker, worker)
        _Keeper(worker, front, broker).wait()
    if broker is not None:
        broker.close()
    family.prctl(family.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != keeper:
        os._exit(0)  # it died before its death could be signalled
    family.lead()
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _connection_to_broker() -> socket.socket | None:
    """Return a connection that ends with the broker, if the broker is that of an instance of the job's own."""
    uri = os.environ.get("FLUX_URI", "")
    if "FLUX_JOB_ID" in os.environ or not uri.startswith("local://"):
        return None
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(uri.removeprefix("local://"))
    except OSError:
        connection.close()
        return None
    return connection


class _Ancestor:
    """A process that waits for its child, passes signals on to it, and ends as it does. All signals are blocked.

    Args:
        child: The child.
    """

    def __init__(self, child: int) -> None:
        self._child = child

    def wait(self) -> NoReturn:
        """Wait until the child has ended."""
        while not self._is_over():
            number = signal.sigwait(signal.valid_signals())
            if number == signal.SIGCHLD:
                status = self._reap()
                if status is not None:
                    self._leave(status)
            elif not self._is_over():
                self._pass_on(number)
        self._leave(signal.SIGKILL)

    def _reap(self) -> int | None:
        """Reap all children that have ended. Return the wait status of the awaited child if it is among them."""
        found = None
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == self._child:
                    found = status
                if not pid:
                    break
        return found

    def _is_over(self) -> bool:
        """Return True if the child has to end."""
        return False

    def _pass_on(self, number: int) -> None:
        family.kill(self._child, number)

    def _leave(self, status: int) -> NoReturn:
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            family.prctl(_PR_SET_DUMPABLE, 0)  # the child has dumped its core already
            with contextlib.suppress(OSError):  # SIGKILL cannot be handled
                signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


class _Keeper(_Ancestor):
    """The worker's parent.

    Args:
        worker: The worker.
        front: This process's parent.
        broker: A connection that ends with the broker, or None if there is no broker to watch.
    """

    def __init__(self, worker: int, front: int, broker: socket.socket | None) -> None:
        super().__init__(worker)
        self._front = front
        self._broker: select.poll | None = None
        if broker is not None:
            self._broker = select.poll()
            self._broker.register(broker, select.POLLRDHUP)
            self._held = broker  # kept open until this process ends
            # SIGIO announces what happens on it.
            fcntl.fcntl(broker, fcntl.F_SETOWN, os.getpid())
            fcntl.fcntl(broker, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)

    def _is_over(self) -> bool:
        return os.getppid() != self._front or (self._broker is not None and bool(self._broker.poll(0)))

    def _pass_on(self, number: int) -> None:
        if number != signal.SIGIO or self._broker is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # it has ended, or does not lead a group yet
                os.killpg(self._child, number)

    def _leave(self, status: int) -> NoReturn:
        family.end()
        super()._leave(status)
