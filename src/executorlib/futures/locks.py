"""Locks, conditions and events that no Ctrl-C can leave locked.

Python runs signal handlers in the main thread, between any two steps of Python code; only a step written in C is
atomic. The conditions and events of `threading` lock themselves in Python code: a Ctrl-C inside them leaves them
locked, and the next thread waits forever. Here, everything that another thread may wait for is locked by the ``with``
statement of a lock made in C, which is one step.

Python 3.14 is the exception: a handler may run after the lock is taken and before the block is entered that releases it
(https://github.com/python/cpython/issues/148874, fixed in 3.15.0). On 3.14, `RLock` takes care of this itself.
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
            # A function written in Python is entered and left without a check for signals, except one at its start.
            try:
                return _thread.RLock.acquire(self)
            except BaseException:
                if self._is_owned():  # if not, the handler ran while this waited
                    _thread.RLock.release(self)
                raise


class Condition(RLock):  # type: ignore[misc]  # as above
    """A lock, together with those who sleep until the guarded state has changed.

    It is smaller than a `threading.Condition`, which alone takes more memory than the rest of a queued call.
    """

    __slots__ = ("_sleepers",)

    def __init__(self) -> None:
        self._sleepers: list[Lock] | None = None

    def sleep(self, is_over: Callable[[], bool], timeout: float | None) -> bool:
        """Wait without the lock until ``is_over()``, announced by `notify_all`; return True if that came in time."""
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
        """Wake everybody who sleeps. The caller must have the lock."""
        sleepers, self._sleepers = self._sleepers, None
        for sleeper in sleepers or ():
            sleeper.release()


class Event:
    """Does what `threading.Event` does."""

    __slots__ = ("_condition", "_is_set")

    def __init__(self) -> None:
        self._condition = Condition()
        self._is_set = False

    def is_set(self) -> bool:  # noqa: D102  # all methods are those of `threading.Event`
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
