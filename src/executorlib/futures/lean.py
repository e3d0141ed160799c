"""A future that is small, and that no Ctrl-C can leave locked.

The standard future is locked by a `threading.Condition`, which a Ctrl-C can leave locked: then the thread that is to
resolve the future waits for ever. This one has a condition of `locks`.

`concurrent.futures.wait` and `as_completed` are code of the standard library, which goes on as it is. They keep futures
from being resolved while they look at them, and wait for events with locks; all of these are replaced below.
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

# To a future's callbacks what is the standard future's.
_logger = logging.getLogger("concurrent.futures")

# How long whoever resolves a future sleeps before it looks again whether the future is still being read, in seconds.
_READ_SECONDS = 0.001


class _Condition(Condition):  # type: ignore[misc]  # as its base
    """Stands for the `threading.Condition` of a future.

    As a lock, it is the ``with`` statement's. `wait` and `as_completed` call `acquire` and `release` instead, of all
    their futures in a row, and a Ctrl-C in between would leave locks behind. So they get no lock, but are noted as
    readers, with the frame that reads: one that has ended reads no more.
    """

    __slots__ = ("_readers",)

    def __init__(self) -> None:
        super().__init__()
        self._readers: tuple[tuple[int, FrameType], ...] = ()

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Keep the future from being resolved while the caller's caller runs, until `release`."""
        frame = sys._getframe(1)
        with self:
            self._readers = (*self._readers, (get_ident(), frame.f_back or frame))
        return True

    def release(self) -> None:
        """End what `acquire` began."""
        with self:
            readers = list(self._readers)
            for index in reversed(range(len(readers))):
                if readers[index][0] == get_ident():
                    del readers[index]
                    break
            self._readers = tuple(readers)

    def is_read(self) -> bool:
        """Whether another thread is reading; for whoever has the lock."""
        if not self._readers:
            return False
        stacks = sys._current_frames()
        self._readers = tuple(each for each in self._readers if _is_running(each[1], stacks.get(each[0])))
        return any(ident != get_ident() for ident, _ in self._readers)

    def wait(self, timeout: float | None = None) -> bool:
        """Whether the future was resolved meanwhile; never, as `LeanFuture` waits beforehand."""
        return False


def _is_running(frame: FrameType, top: FrameType | None) -> bool:
    """Whether a frame is on the stack whose newest frame is ``top``."""
    while top is not None and top is not frame:
        top = top.f_back
    return top is not None


class _Waiters(list[Any]):
    """What `wait` and `as_completed` leave with a future to be told of its end."""

    __slots__ = ()

    def append(self, waiter: Any) -> None:
        """Take a waiter, all of whose futures are being read, so that nobody uses its event and its lock yet."""
        if not isinstance(waiter.event, Event):
            waiter.event = Event()
            if hasattr(waiter, "lock"):
                waiter.lock = RLock()
        super().append(waiter)


class LeanFuture(Future[_T]):
    """A future that a Ctrl-C in any thread's use of it leaves usable for all others.

    All of its callbacks are called, also those that come after one that raises a `BaseException` such as SystemExit,
    which is raised in the end: what depends on this future must not depend on the order of its callbacks.
    """

    _condition: _Condition  # type: ignore[assignment]
    unasked: Any = None  # see `unasked.Record`

    def __init__(self) -> None:
        super().__init__()
        self._condition = _Condition()
        self._waiters: list[Any] = _Waiters()

    def failure(self) -> BaseException | None:
        """The exception of a future that is done, for other futures' sake: its user has not asked for it by that."""
        return super().exception(0)

    def result(self, timeout: float | None = None) -> _T:
        """See `concurrent.futures.Future.result`."""
        try:
            self._condition.sleep(self.done, timeout)
            return super().result(0)
        finally:
            if self.unasked:
                self.unasked.clear()
            # An exception's traceback refers to this frame, and the frame to the future, which has the exception.
            del self

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """See `concurrent.futures.Future.exception`."""
        try:
            self._condition.sleep(self.done, timeout)
            return super().exception(0)
        finally:
            if self.unasked:
                self.unasked.clear()

    def set_running_or_notify_cancel(self) -> bool:
        """See `concurrent.futures.Future.set_running_or_notify_cancel`."""
        running: bool = self._while_unread(super().set_running_or_notify_cancel)
        return running

    def set_result(self, result: _T) -> None:
        """See `concurrent.futures.Future.set_result`."""
        self._while_unread(super().set_result, result)
        self._invoke_callbacks()

    def set_exception(self, exception: BaseException | None) -> None:
        """See `concurrent.futures.Future.set_exception`."""
        self._while_unread(super().set_exception, exception)
        self._invoke_callbacks()

    def _while_unread(self, change: Callable[..., Any], *args: Any) -> Any:
        """Change the state while nobody looks at it for `wait` or `as_completed`."""
        while True:
            with self._condition:
                if not self._condition.is_read():
                    return change(*args)
            pause = allocate_lock()
            pause.acquire()
            pause.acquire(timeout=_READ_SECONDS)

    def _invoke_callbacks(self) -> None:
        if not self._done_callbacks or self._condition._is_owned():  # type: ignore[attr-defined]
            return  # from `_while_unread`; the caller of that calls them without the lock
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
