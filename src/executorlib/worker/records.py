"""Sends what a worker logs to the executor, for the handlers of the user's program, if that was requested.

A record travels as a message ``["log", call number, rank, {...}]`` of plain data. It is sent at once, so that what was
logged before a death arrives. `Loop.on_message` receives it.
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

# The most characters of a message, a traceback or a stack; of any other text; and the most attributes of the user's
# own. All of them together fit into a message's header, where a character takes at most twelve bytes.
_MOST_TEXT, _MOST_OTHER, _MOST_ATTRIBUTES = 100_000, 1000, 100

# The most messages that may wait for the end of a `Reporter.receive`.
_MOST_WAITING = 1000

# Attributes that become part of others, or are for one handler only.
_NOT_SENT = frozenset(("args", "exc_info", "message", "asctime"))
_TEXTS = frozenset(("msg", "exc_text", "stack_info"))

# Signals for which the user may have set handlers that raise an exception.
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
    """A worker's connection that also carries its log records. It replaces the connection that it is made from.

    The user's threads may log while this one sends results, and signal handlers may log in a thread that is sending.

    Args:
        made: The connection, or None to make it for the first record or answer.
        connect: Makes the connection in that case.
        rank: The number of this rank in an MPI world.

    Attributes:
        number: The number of the call that runs; 0 before the first one.
    """

    def __init__(self, made: Any, connect: Callable[[], Any] | None = None, rank: int = 0) -> None:
        self._made = made
        self._connect = connect
        self._rank = rank
        self.number = 0
        self._lock = threading.RLock()  # a signal handler may take it again
        self._in_use = False  # True while the connection sends, perhaps in interrupted code, or receives
        self._receiving = False
        self._waiting: deque[tuple[list[Any], Sequence[Frame]]] = deque()
        self._ended = False
        # Processes that a call forks log as if records were not sent, because only this one may use its connection.
        os.register_at_fork(after_in_child=settings.divert(_Handler(self)))

    def _connection(self) -> Any:
        if self._made is None and self._connect is not None:
            self._made = self._connect()
        return self._made

    def send(self, header: list[Any], frames: Sequence[Frame] = ()) -> None:
        """Send a message after all records that were logged before."""
        with self._lock:
            if self._receiving and len(self._waiting) >= _MOST_WAITING:
                return  # a record from threads that earlier calls left behind
            self._waiting.append((header, frames))
            self._send_waiting()

    def _send_waiting(self) -> None:
        while self._waiting and not self._in_use:
            before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
            try:
                # If a signal handler raised an exception here, half a message would be left behind.
                signal.pthread_sigmask(signal.SIG_BLOCK, _INTERRUPTING)
                self._in_use = True
                header, frames = self._waiting.popleft()
                try:
                    self._connection().send(header, frames)
                except (OSError, EOFError):
                    if header[0] != "log":  # a lost record is no error: the next answer finds the executor gone
                        raise
            finally:
                self._in_use = False
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def receive(self) -> Message:
        """Wait for a message."""
        connection = self._connection()
        if isinstance(connection, Connection):  # a socket, through which other threads may send meanwhile
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
        """Stop sending records if the connection is about to be closed."""
        # A socket is only closed when the process ends, and takes records until then.
        if not isinstance(self._made, Connection):
            with self._lock:
                self._ended = True

    def close(self) -> None:
        """Close the connection, if there is one."""
        self._end()
        if self._made is not None:
            self._made.close()


class _Handler(logging.Handler):
    """Passes all records to a reporter."""

    def __init__(self, reporter: Reporter) -> None:
        super().__init__()
        self._reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        """Send a record."""
        try:
            values = _plain(record)
        except Exception:
            self.handleError(record)
        else:
            self._reporter.report(values)


def _plain(record: logging.LogRecord) -> dict[str, Any]:
    """Convert a record to plain data, with texts in place of objects, which may be impossible to send."""
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
