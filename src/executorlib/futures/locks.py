"""Locks, conditions and events that no Ctrl-C can leave locked.

Python runs signal handlers in the main thread, between any two steps of code that is written in Python; only a step
that is written in C is whole. The conditions and events of `threading` lock themselves in Python: a Ctrl-C inside them
leaves them locked, and whoever comes next waits for ever. Here, whatever another thread may have to wait for is locked
by the ``with`` statement of a lock made in C, which is one step.

Python 3.14 is the exception: a handler may run when the lock has been taken and before the block has been entered that
releases it (https://github.com/python/cpython/issues/148874, mended in 3.15.0). There, `RLock` looks after itself.
"""

from __future__ import annotations

import _thread
import sys
from _thread import allocate_lock
from collections.abc import Callable
from threading import Lock


class RLock(_thread.RLock):  # type: ignore[misc]  # final in typeshed, not in Python
    """A lock that its owner can take again."""

    __slots__ = ()

    if sys.version_info[:2] == (3, 14):

        def __enter__(self) -> bool:
            # A function written in Python is entered and left without a look at signals, but for one at its beginning.
            try:
                return _thread.RLock.acquire(self)
            except BaseException:
                if self._is_owned():  # else the handler came while it waited
                    _thread.RLock.release(self)
                raise


class Condition(RLock):  # type: ignore[misc]  # see above
    """A lock, and those who sleep until what it guards has changed.

    It is smaller than a `threading.Condition`, which alone takes more memory than the rest of a queued call.
    """

    __slots__ = ("_sleepers",)

    def __init__(self) -> None:
        self._sleepers: list[Lock] | None = None

    def sleep(self, is_over: Callable[[], bool], timeout: float | None) -> bool:
        """Wait, without the lock, until ``is_over()``, of which `notify_all` tells; whether it came in time."""
        with self:
            if is_over():
                return True
            sleeper = allocate_lock()
            sleeper.acquire()
            if self._sleepers is None:
                self._sleepers = []
            self._sleepers.append(sleeper)
        try:
            if timeout is None:
                return sleeper.acquire()
            return sleeper.acquire(timeout=timeout) if timeout > 0 else sleeper.acquire(blocking=False)
        finally:
            with self:
                if self._sleepers and sleeper in self._sleepers:
                    self._sleepers.remove(sleeper)

    def notify_all(self) -> None:
        """Wake all that sleep; for whoever has the lock."""
        sleepers, self._sleepers = self._sleepers, None
        for sleeper in sleepers or ():
            sleeper.release()


class Event:
    """As `threading.Event`."""

    __slots__ = ("_condition", "_is_set")

    def __init__(self) -> None:
        self._condition = Condition()
        self._is_set = False

    def is_set(self) -> bool:  # noqa: D102  # this and the others are `threading.Event`'s
        return self._is_set

    def set(self) -> None:  # noqa: D102
        with self._condition:
            self._is_set = True
            self._condition.notify_all()

    def clear(self) -> None:  # noqa: D102
        with self._condition:
            self._is_set = False

    def wait(self, timeout: float | None = None) -> bool:  # noqa: D102
        return self._condition.sleep(self.is_set, timeout)
