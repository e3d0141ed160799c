"""Waits for descriptors and timers, and calls back. The executor's loop and a node's relay share this."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import select
import time
from collections.abc import Callable
from typing import Any, Protocol

# These bits are the same for epoll and poll. The selectors module would take longer per event than our own work does.
_HAS_EPOLL = hasattr(select, "epoll")
_READABLE, _WRITABLE = select.POLLIN, select.POLLOUT


class Waiting(Protocol):
    """The methods of an object that waits for descriptors and timers."""

    def watch(self, fileobj: Any, callback: Callable[[], None]) -> None:
        """Call ``callback`` whenever ``fileobj`` can be read."""
        ...

    def watch_writable(self, fileobj: Any, wanted: bool, callback: Callable[[], None]) -> None:
        """Call ``callback`` when a watched ``fileobj`` can be written, as long as that is ``wanted``."""
        ...

    def unwatch(self, fileobj: Any) -> None:
        """Stop watching, before the descriptor is closed."""
        ...

    def call_later(self, seconds: float, callback: Callable[[], None]) -> None:
        """Call ``callback`` once, after some time."""
        ...

    def fileno(self) -> int:
        """Return a descriptor, for `sleep_in`, that can be read when anything watched is ready. Linux only."""
        ...

    def sleep_in(self, sleep: Callable[[float], None] | None) -> None:
        """Let the loop sleep in another library's event loop, which does its own work meanwhile.

        Args:
            sleep: Called instead of the loop's own sleep, with the most seconds that it may take, or a number below
                zero for no limit. It must return when `fileno` can be read. None restores the loop's own sleep.
        """
        ...


class WakeUp:
    """A pipe by which other threads wake the thread that watches its reading end. Neither end blocks.

    It closes with its last reference, so that a thread that holds one never writes to another file with its number.

    Attributes:
        read: The reading end.
        write: The writing end.
    """

    __slots__ = ("read", "write")

    def __init__(self) -> None:
        self.read, self.write = os.pipe()
        os.set_blocking(self.read, False)
        os.set_blocking(self.write, False)

    def drain(self) -> None:
        """Read everything, so that the thread can sleep again."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.read, 4096)

    def __del__(self) -> None:
        os.close(self.read)
        os.close(self.write)


class Poller:
    """Implements `Waiting` for one thread."""

    def __init__(self) -> None:
        self._poll: Any = select.epoll() if _HAS_EPOLL else select.poll()
        self._callbacks: dict[int, tuple[Callable[[], None], Callable[[], None] | None]] = {}
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._timer_numbers = itertools.count()
        self._sleep: Callable[[float], None] | None = None

    def sleep_in(self, sleep: Callable[[float], None] | None) -> None:
        """Sleep in another library's event loop from now on, or in this one again."""
        self._sleep = sleep

    def fileno(self) -> int:
        """Return the descriptor of epoll."""
        number: int = self._poll.fileno()
        return number

    def watch(self, fileobj: Any, callback: Callable[[], None]) -> None:
        """Start watching."""
        fd = _descriptor(fileobj)
        self._poll.register(fd, _READABLE)
        self._callbacks[fd] = (callback, None)

    def watch_writable(self, fileobj: Any, wanted: bool, callback: Callable[[], None]) -> None:
        """Start or stop waiting for a watched ``fileobj`` to be writable."""
        fd = _descriptor(fileobj)
        callbacks = self._callbacks.get(fd)
        if callbacks is None or (callbacks[1] is not None) == wanted:
            return
        self._callbacks[fd] = (callbacks[0], callback if wanted else None)
        self._poll.modify(fd, _READABLE | _WRITABLE if wanted else _READABLE)

    def unwatch(self, fileobj: Any) -> None:
        """Stop watching, if it is watched."""
        fd = _descriptor(fileobj)
        if self._callbacks.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def call_later(self, seconds: float, callback: Callable[[], None]) -> None:
        """Start a timer."""
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._timer_numbers), callback))

    def next_timer(self) -> float:
        """Return the seconds until the next timer is due; below zero if there is none."""
        return max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else -1.0

    def poll(self, timeout: float) -> list[tuple[int, int]]:
        """Sleep until a descriptor is ready, at most for this many seconds; below zero there is no limit."""
        if self._sleep is not None:
            self._sleep(timeout)
            timeout = 0.0
        # epoll takes seconds, and poll takes milliseconds.
        ready: list[tuple[int, int]] = self._poll.poll(timeout if _HAS_EPOLL or timeout <= 0 else timeout * 1000)
        return ready

    def call_back(self, ready: list[tuple[int, int]]) -> None:
        """Call back for these descriptors, then for the timers that are due.

        Timers that these timers start wait for a later turn, even if due at once, so that descriptors need not wait.
        """
        for fd, mask in ready:
            callbacks = self._callbacks.get(fd)
            if callbacks is None:
                continue  # unwatched by an earlier callback of this turn
            on_readable, on_writable = callbacks
            if mask & _WRITABLE and on_writable is not None:
                on_writable()
            # This includes errors and hang-ups: reading shows which it is.
            if mask & ~_WRITABLE and fd in self._callbacks:
                on_readable()
        now = time.monotonic()
        due = []
        while self._timers and self._timers[0][0] <= now:
            due.append(heapq.heappop(self._timers)[2])
        for callback in due:
            callback()

    def close_poll(self) -> None:
        """Free epoll's descriptor. Watched descriptors stay open."""
        self._callbacks.clear()
        if _HAS_EPOLL:
            self._poll.close()


def _descriptor(fileobj: Any) -> int:
    fd: int = fileobj if isinstance(fileobj, int) else fileobj.fileno()
    return fd
