"""Sends what a worker logs to the executor, for the handlers of the user's program; only where that was asked for.

A record travels as a message ``["log", call number, rank, {...}]`` of plain data, at once, so that what was logged
before a death arrives. `Loop.on_message` is the other end.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections import deque

from executorlib.transports.messages import Connection
from executorlib.worker import settings
from executorlib.worker.call import bounded, safe_repr

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from executorlib.serialize import Frame
    from executorlib.transports.messages import Message

# Characters of the message, of a traceback and of a stack; of any other text; and attributes of the user's own. All of
# them together fit into a message's header, where a character takes twelve bytes at most.
_MOST_TEXT, _MOST_OTHER, _MOST_ATTRIBUTES = 100_000, 1000, 100

# Records that wait for the end of a `Reporter.receive`.
_MOST_WAITING = 1000

# What becomes part of other attributes, or is for one handler only.
_NOT_SENT = frozenset(("args", "exc_info", "message", "asctime"))
_TEXTS = frozenset(("msg", "exc_text", "stack_info"))

# Signals whose handlers, of the user's, may raise an exception.
_INTERRUPTING = [
    signal.SIGALRM,
    signal.SIGVTALRM,
    signal.SIGPROF,
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
]

_to_text = logging.Formatter()


class Reporter:
    """A worker's connection by which its records travel, too. It takes the place of the one that it is made from.

    The user's threads log while this one sends results, and signal handlers log within a thread that is sending.

    Args:
        made: The connection; None where it is made with the first record or answer.
        connect: Makes it then.
        rank: The rank that this is in an MPI world.

    Attributes:
        number: Of the call that runs; 0 before the first.
    """

    def __init__(self, made: Any, connect: Callable[[], Any] | None = None, rank: int = 0) -> None:
        self._made = made
        self._connect = connect
        self._rank = rank
        self.number = 0
        self._lock = threading.RLock()  # a signal handler may take it again
        self._in_use = False  # the connection: by the thread that this one has interrupted, or to receive
        self._receiving = False
        self._waiting: deque[tuple[list[Any], Sequence[Frame]]] = deque()
        self._ended = False
        # In processes that a call forks all is as if records were not sent: this one alone may use its connection.
        os.register_at_fork(after_in_child=settings.divert(_Handler(self)))

    def _connection(self) -> Any:
        if self._made is None and self._connect is not None:
            self._made = self._connect()
        return self._made

    def send(self, header: list[Any], frames: Sequence[Frame] = ()) -> None:
        """Send a message, after all records that were logged before."""
        with self._lock:
            if self._receiving and len(self._waiting) >= _MOST_WAITING:
                return  # what threads log that earlier calls have left behind
            self._waiting.append((header, frames))
            self._send_waiting()

    def _send_waiting(self) -> None:
        while self._waiting and not self._in_use:
            before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
            try:
                # An exception that a signal handler raises would leave half a message behind.
                signal.pthread_sigmask(signal.SIG_BLOCK, _INTERRUPTING)
                self._in_use = True
                header, frames = self._waiting.popleft()
                try:
                    self._connection().send(header, frames)
                except (OSError, EOFError):
                    if header[0] != "log":  # else the next answer finds that the executor is gone
                        raise
            finally:
                self._in_use = False
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def receive(self) -> Message:
        """Wait for a message."""
        connection = self._connection()
        if isinstance(connection, Connection):  # a socket, by which others may send meanwhile
            message: Message = connection.receive()
        else:
            with self._lock:
                self._in_use = self._receiving = True
            try:
                message = connection.receive()
            finally:
                with self._lock:
                    self._in_use = self._receiving = False
                    self._send_waiting()
        if message.header[0] == "call":
            self.number = message.header[1]
        elif message.header[0] == "stop":
            self._end()
        return message

    def report(self, record: dict[str, Any]) -> None:
        """Send a record."""
        if not self._ended:
            self.send(["log", self.number, self._rank, record])

    def _end(self) -> None:
        """Send no more records where the connection is about to be closed."""
        # A socket is closed by the end of the process, and takes them until then.
        if not isinstance(self._made, Connection):
            with self._lock:
                self._ended = True

    def close(self) -> None:
        """Close the connection, if there is one."""
        self._end()
        if self._made is not None:
            self._made.close()


class _Handler(logging.Handler):
    """Gives all records to a reporter."""

    def __init__(self, reporter: Reporter) -> None:
        super().__init__()
        self._reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler.emit`."""
        try:
            values = _plain(record)
        except Exception:
            self.handleError(record)
        else:
            self._reporter.report(values)


def _plain(record: logging.LogRecord) -> dict[str, Any]:
    """A record as plain data: with texts in the place of objects, which may not be fit for travelling."""
    values = {name: value for name, value in record.__dict__.items() if name not in _NOT_SENT}
    values["msg"] = record.getMessage()
    if record.exc_info and not record.exc_text:
        values["exc_text"] = _to_text.formatException(record.exc_info)
    names = list(values)[:_MOST_ATTRIBUTES]
    return {name: _value(values[name], _MOST_TEXT if name in _TEXTS else _MOST_OTHER) for name in names}


def _value(value: Any, most: int) -> str | int | float | None:
    if value is None or isinstance(value, float) or (isinstance(value, int) and value.bit_length() < 64):
        return value
    return bounded(value if isinstance(value, str) else safe_repr(value), most)
