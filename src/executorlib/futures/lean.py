"""A small future that no Ctrl-C can leave locked.

The standard future is locked by a `threading.Condition`, which a Ctrl-C can leave locked; the thread that should
resolve the future then waits forever. This one uses a condition from `locks`.

The standard library's `concurrent.futures.wait` and `as_completed` cannot be changed. They keep futures from being
resolved while they look at them, and wait for events with locks, so this module replaces what they use of a future.
"""

from __future__ import annotations

import logging
import sys
from _thread import allocate_lock, get_ident
from collections.abc import Callable
from concurrent.futures import Future
from types import FrameType
from typing import Any, TypeVar

from executorlib.futures.locks import Condition, Event, RLock

_T = TypeVar("_T")

# The logger that the standard future uses for its callbacks.
_logger = logging.getLogger("concurrent.futures")

# While a future is being read, the thread that wants to resolve it looks again at this interval, in seconds.
_READ_SECONDS = 0.001


class _Condition(Condition):  # type: ignore[misc]  # as its base
    """Takes the place of a future's `threading.Condition`.

    As a lock, it is for the ``with`` statement only. `wait` and `as_completed` call `acquire` and `release` on all
    their futures in a row, and a Ctrl-C in between would leave futures locked. So they do not get the lock. They are
    noted as readers instead, with the frame that reads: once that frame has ended, it no longer counts.
    """

    __slots__ = ("_readers",)

    def __init__(self) -> None:
        super().__init__()
        self._readers: tuple[tuple[int, FrameType], ...] = ()

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Keep the future from being resolved until `release`, or until the caller's caller ends."""
        frame = sys._getframe(1)
        with self:
            self._readers = (*self._readers, (get_ident(), frame.f_back or frame))
        return True

    def release(self) -> None:
        """Undo the last `acquire` of this thread."""
        with self:
            readers = list(self._readers)
            for index in reversed(range(len(readers))):
                if readers[index][0] == get_ident():
                    del readers[index]
                    break
            self._readers = tuple(readers)

    def is_read(self) -> bool:
        """Return True if another thread is reading. The caller must have the lock."""
        if not self._readers:
            return False
        stacks = sys._current_frames()
        self._readers = tuple(each for each in self._readers if _is_running(each[1], stacks.get(each[0])))
        return any(ident != get_ident() for ident, _ in self._readers)

    def wait(self, timeout: float | None = None) -> bool:
        """Return False: the future is never resolved here, because `LeanFuture` waits beforehand."""
        return False


def _is_running(frame: FrameType, top: FrameType | None) -> bool:
    """Return True if a frame is on the stack whose newest frame is ``top``."""
    while top is not None and top is not frame:
        top = top.f_back
    return top is not None


class _Waiters(list[Any]):
    """The objects by which `wait` and `as_completed` learn that a future is done."""

    __slots__ = ()

    def append(self, waiter: Any) -> None:
        """Take a waiter. All of its futures are being read, so nobody uses its event and lock yet: replace them."""
        if not isinstance(waiter.event, Event):
            waiter.event = Event()
            if hasattr(waiter, "lock"):
                waiter.lock = RLock()
        super().append(waiter)


class LeanFuture(Future[_T]):
    """A future that stays usable for all threads after a Ctrl-C in any thread's use of it.

    All of its callbacks are called, even after one that raises a `BaseException` such as SystemExit, which is raised at
    the end. So what depends on this future does not depend on the order of its callbacks.
    """

    _condition: _Condition  # type: ignore[assignment]
    _unasked: Any = None  # an `unasked.Record`, if it failed

    def __init__(self) -> None:
        super().__init__()
        self._condition = _Condition()
        self._waiters: list[Any] = _Waiters()

    def _failure(self) -> BaseException | None:
        """Return a finished future's exception, for other futures. This does not count as the user's asking for it."""
        return super().exception(0)

    def result(self, timeout: float | None = None) -> _T:
        """Wait for the result and return it, or raise the call's exception."""
        try:
            self._condition.sleep(self.done, timeout)
            return super().result(0)
        finally:
            if self._unasked:
                self._unasked.clear()
            # Breaks a cycle: the exception's traceback, this frame, the future, the exception.
            del self

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the end, and return the call's exception or None."""
        try:
            self._condition.sleep(self.done, timeout)
            return super().exception(0)
        finally:
            if self._unasked:
                self._unasked.clear()

    def set_running_or_notify_cancel(self) -> bool:
        """Mark the future as running, unless it was cancelled, and return True if it runs."""
        running: bool = self._while_unread(super().set_running_or_notify_cancel)
        return running

    def set_result(self, result: _T) -> None:
        """Set the result and call the callbacks."""
        self._while_unread(super().set_result, result)
        self._invoke_callbacks()

    def set_exception(self, exception: BaseException | None) -> None:
        """Set the exception and call the callbacks."""
        self._while_unread(super().set_exception, exception)
        self._invoke_callbacks()

    def _while_unread(self, change: Callable[..., Any], *args: Any) -> Any:
        """Change the state while no `wait` or `as_completed` is looking at it."""
        while True:
            with self._condition:
                if not self._condition.is_read():
                    return change(*args)
            pause = allocate_lock()
            pause.acquire()
            pause.acquire(timeout=_READ_SECONDS)

    def _invoke_callbacks(self) -> None:
        if not self._done_callbacks or self._condition._is_owned():  # type: ignore[attr-defined]
            return  # called within `_while_unread`, whose caller repeats it without the lock
        raised = None
        for callback in self._done_callbacks:  # type: ignore[attr-defined]
            try:
                callback(self)
            except Exception:
                _logger.exception("a callback of %r raised", self)
            except BaseException as error:
                raised = raised or error
        if raised is not None:
            raise raised
