"""Futures made from other futures."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any, SupportsIndex, TypeVar, overload

from executorlib.errors import refuse_future
from executorlib.futures.inputs import Stored, failed_call, input_error
from executorlib.futures.lean import LeanFuture
from executorlib.futures.locks import RLock

T = TypeVar("T")
K = TypeVar("K")


def _hand_on_failure(record: Any, future: Future[Any]) -> None:
    """Let a future share the failure record of another one, so that asking either of them counts."""
    if record:
        record.share(future)


class DerivedFuture(LeanFuture[Any]):
    """A future that is made from others."""

    __reduce__ = refuse_future


class _Ours:
    """The first callback of another library's future, which calls all of ours.

    Such a future stops at a callback that raises a `BaseException`, such as SystemExit, and skips the rest. So our
    callbacks come first, and all of them are called before the first of their own exceptions is raised.
    """

    __slots__ = ("receivers",)

    def __init__(self) -> None:
        self.receivers: list[Callable[[Future[Any]], object]] = []

    def __call__(self, future: Future[Any]) -> None:
        receivers, self.receivers = self.receivers, []
        raised = None
        for receiver in receivers:
            try:
                receiver(future)
            except BaseException as error:
                raised = raised or error
        if raised is not None:
            raise raised


def when_done(future: Future[Any], receiver: Callable[[Future[Any]], object]) -> None:
    """Have ``receiver(future)`` called when a future is done, whatever its other callbacks raise."""
    # A LeanFuture calls all of its callbacks. If a class adds callbacks in its own way, only its interface is known.
    if type(future).add_done_callback is Future.add_done_callback and not isinstance(future, LeanFuture):
        with future._condition:
            if not future.done():
                callbacks: list[Any] = future._done_callbacks  # type: ignore[attr-defined]
                if not callbacks or not isinstance(callbacks[0], _Ours):
                    callbacks.insert(0, _Ours())
                callbacks[0].receivers.append(receiver)
                return
    future.add_done_callback(receiver)


class _Derive:
    """Resolves a derived future once its source is done, and keeps neither of them afterwards.

    Futures keep their callbacks forever, so a plain reference would keep the result of one as long as the other lives.
    """

    __slots__ = ("_compute", "_derived")

    def __init__(self, derived: Future[Any], compute: Callable[[Any], Any]) -> None:
        self._derived: Future[Any] | None = derived
        self._compute = compute

    def __call__(self, source: Future[Any]) -> None:
        derived, self._derived = self._derived, None
        if derived is None or not derived.set_running_or_notify_cancel():
            return
        error = input_error(source)
        if error is None:
            try:
                value = self._compute(source.result())
            except Exception as caught:
                # The frames of its traceback, and their callers, refer to the source and its result.
                error = caught.with_traceback(None)
            else:
                derived.set_result(value)
                return
        else:
            _hand_on_failure(getattr(source, "_unasked", None), derived)
        derived._failed_call = failed_call(source)  # type: ignore[attr-defined]
        derived.set_exception(error)


def derived_future(source: Future[Any], compute: Callable[[Any], Any]) -> Future[Any]:
    """Return a future of what a cheap function makes of another future's result, as soon as that is done."""
    derived: Future[Any] = DerivedFuture()
    when_done(source, _Derive(derived, compute))
    return derived


# The type of an item of a result is not known, so it is Any; a union would reject correct programs.
@overload
def get_item_from_future(future: Future[list[T]], key: SupportsIndex) -> Future[T]: ...
@overload
def get_item_from_future(future: Future[dict[K, T]], key: K) -> Future[T]: ...
@overload
def get_item_from_future(future: Future[Any], key: Any) -> Future[Any]: ...
def get_item_from_future(future: Future[Any], key: Any) -> Future[Any]:
    """Return a future of ``future.result()[key]``.

    Args:
        future: A future whose result can be indexed.
        key: The key or index.

    Returns:
        A future that is done when ``future`` is. It can be an input of any call.
    """
    item = getattr(future, "item", None)
    if item is not None:  # the call is only recorded, for the dependency graph
        recorded: Future[Any] = item(key)
        return recorded
    derived = derived_future(future, lambda result: result[key])
    source: Stored | None = getattr(future, "_stored", None)
    if source is not None:
        derived._stored = Stored(source.call, (*source.keys, key))  # type: ignore[attr-defined]
    return derived


@overload
def split_future(future: Future[list[T]], n: int) -> list[Future[T]]: ...
@overload
def split_future(future: Future[Any], n: int) -> list[Future[Any]]: ...
def split_future(future: Future[Any], n: int) -> list[Future[Any]]:
    """Return futures of the first ``n`` elements of a result.

    Args:
        future: A future whose result is a sequence of at least ``n`` elements.
        n: The number of elements; at least 1.

    Returns:
        ``n`` futures, in order.

    Raises:
        ValueError: ``n`` is below 1.
    """
    if n < 1:
        raise ValueError(f"split_future needs n of at least 1, got {n}.")
    return [get_item_from_future(future, index) for index in range(n)]


def batched(iterable: Iterable[Any], n: int) -> list[Future[list[Any]]]:
    """Make the futures that `BaseExecutor.batched` returns."""
    if n < 1:
        raise ValueError(f"batched needs n of at least 1, got {n}.")
    futures = [item if isinstance(item, Future) else _done(item) for item in iterable]
    groups: list[Future[list[Any]]] = [DerivedFuture() for _ in range(-(-len(futures) // n))]
    collector = _Grouping(groups, n, len(futures))
    for future in futures:
        when_done(future, collector.on_done)
    return groups


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = DerivedFuture()
    future.set_result(value)
    return future


class _Grouping:
    """Collects results as they come, and resolves one group after the other."""

    def __init__(self, groups: list[Future[list[Any]]], n: int, total: int) -> None:
        self._lock = RLock()
        self._groups = deque(groups)  # groups leave it once resolved, or callbacks would keep the results
        self._n = n
        self._missing = total
        self._results: list[Any] = []
        self._errors: list[tuple[BaseException, Any]] = []  # each with the record that tells of it if nobody asks

    def on_done(self, future: Future[Any]) -> None:
        ready: list[tuple[Future[list[Any]], list[Any], BaseException | None, Any]] = []
        with self._lock:
            error = input_error(future)
            if error is None:
                self._results.append(future.result())
            else:
                self._errors.append((error, getattr(future, "_unasked", None)))
            self._missing -= 1
            while self._groups and (len(self._results) >= self._n or not self._missing):
                values = self._results[: self._n]
                del self._results[: self._n]
                group_error, record = None, None
                if len(values) < self._n and self._errors:
                    group_error, record = self._errors[0]
                    del self._errors[: self._n - len(values)]
                ready.append((self._groups.popleft(), values, group_error, record))
        # Outside the lock, because callbacks of a group may finish further inputs. All groups, even if callbacks raise.
        raised = None
        for group, values, group_error, record in ready:
            if not group.set_running_or_notify_cancel():
                continue
            try:
                if group_error is None:
                    group.set_result(values)
                else:
                    _hand_on_failure(record, group)
                    group.set_exception(group_error)
            except BaseException as error:
                raised = raised or error
        if raised is not None:
            raise raised
