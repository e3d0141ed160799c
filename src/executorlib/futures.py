"""Futures as inputs of calls, and futures made from other futures."""

from __future__ import annotations

import copy
import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, Executor, Future
from typing import Any, NamedTuple

from executorlib import serialize
from executorlib.errors import EXECUTOR_ADVICE, FUTURE_ADVICE, refuse_future
from executorlib.lean_future import LeanFuture
from executorlib.locks import RLock

# Types that cannot hold a future: the common arguments, skipped without a closer look.
_LEAVES = frozenset({int, float, complex, bool, str, bytes, bytearray, type(None)})


class StoredCall:
    """A call whose result goes to a file that is known before it is there.

    Attributes:
        executor: Number of its executor, unique in this process.
        number: Its own, in the executor.
        key: Its cache key, once derived.
        path: The file.
        batch: The batch directory of the job that this session has submitted for it.
    """

    __slots__ = ("batch", "executor", "key", "number", "path")

    def __init__(self, executor: int, number: int) -> None:
        self.executor = executor
        self.number = number
        self.key = ""
        self.path = ""
        self.batch: str | None = None


class Stored(NamedTuple):
    """What a future stands for, in terms of files: a call's result, or ``result[keys[0]][keys[1]]...`` of it."""

    call: StoredCall
    keys: tuple[Any, ...] = ()


class StoredFuture(Future[Any]):
    """Stands for another future by the name of what it stands for, and never has the result.

    Args:
        stored: What that is.
    """

    def __init__(self, stored: Stored) -> None:
        # None of what a future has that somebody may wait for.
        self.stored = stored


def stored(future: Future[Any]) -> Stored | None:
    """Say which file will hold a future's result; None where it is only in memory, or not known yet."""
    found: Stored | None = getattr(future, "stored", None)
    return found if found is not None and found.call.path else None


def find_futures_in_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Future[Any]]:
    """`find_futures` for all arguments of a call."""
    for value in args:
        if type(value) not in _LEAVES:
            break
    else:
        if not kwargs:
            return []
    return find_futures((args, kwargs))


def find_futures(obj: object) -> list[Future[Any]]:
    """Find the futures in a value: itself, or at any depth of lists, tuples, sets, dicts and dataclasses.

    Returns:
        Each future once, in the order in which they are met.

    Raises:
        ValueError: A container that holds a future also holds itself; it could never be rebuilt with results.
    """
    found: dict[int, Future[Any]] = {}
    _search(obj, found, {}, set())
    return list(found.values())


def _search(obj: object, found: dict[int, Future[Any]], seen: dict[int, bool], cyclic: set[int]) -> bool:
    """Collect the futures below ``obj``; whether there are any. ``seen`` has the answers for containers met before."""
    if type(obj) in _LEAVES:
        return False
    if isinstance(obj, Future):
        found[id(obj)] = obj
        return True
    children = _children(obj)
    if children is None:
        return False
    key = id(obj)
    if key in seen:
        cyclic.add(key)  # or only shared, in which case nobody asks any more
        return seen[key]
    seen[key] = False  # while it is being searched
    holds = False
    for child in children:
        holds |= _search(child, found, seen, cyclic)
    seen[key] = holds
    if holds and key in cyclic:
        raise ValueError(
            "the inputs hold a future inside a container that contains itself (a cycle), so its result cannot be "
            "filled in. Pass the future as an argument of its own, or break the cycle."
        )
    return holds


def _children(obj: object) -> Iterable[object] | None:
    if isinstance(obj, (list, tuple, set, frozenset)):
        return obj
    if isinstance(obj, dict):
        return [*obj.keys(), *obj.values()]
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return [getattr(obj, field.name, None) for field in dataclasses.fields(obj)]
    return None


def _result(future: Future[Any]) -> Any:
    return future.result()


def fill_in(obj: Any, value_of: Callable[[Future[Any]], Any] = _result) -> Any:
    """Replace all futures by their values, results unless told otherwise; containers without any stay as they are."""
    return _fill(obj, value_of, {})


def _fill(obj: Any, value_of: Callable[[Future[Any]], Any], known: dict[int, Any]) -> Any:
    """`fill_in` with what came of the containers met before, so that shared ones stay shared."""
    if type(obj) in _LEAVES:
        return obj
    if isinstance(obj, Future):
        return value_of(obj)
    children = _children(obj)
    if children is None:
        return obj
    key = id(obj)
    if key in known:
        return known[key]
    known[key] = obj  # met again below itself, it has no futures: find_futures saw to that
    before = list(children)
    after = [_fill(child, value_of, known) for child in before]
    if any(old is not new for old, new in zip(before, after, strict=True)):
        known[key] = _rebuilt(obj, after)
    return known[key]


def _rebuilt(obj: Any, children: list[Any]) -> Any:
    """A container like ``obj`` with other children, in the order in which `_children` gives them."""
    if isinstance(obj, dict):
        result = copy.copy(obj)  # keeps the type and what belongs to it, such as a default factory
        result.clear()
        result.update(zip(children[: len(obj)], children[len(obj) :], strict=True))
        return result
    if isinstance(obj, tuple) and hasattr(obj, "_make"):  # a named tuple
        return obj._make(children)
    if isinstance(obj, (list, tuple, set, frozenset)):
        return type(obj)(children)
    # Not dataclasses.replace: fields may be absent from __init__, and __post_init__ ran once already.
    result = copy.copy(obj)
    for field, child in zip(dataclasses.fields(obj), children, strict=True):
        if hasattr(obj, field.name):
            object.__setattr__(result, field.name, child)
    return result


def misplaced(fn: object, args: Sequence[object], kwargs: Mapping[str, object]) -> str:
    """Say where a call that cannot be pickled has a future or an executor, and how to pass it; empty if it has none."""
    parts = [("the function", fn)]
    parts += [(f"argument {index}", value) for index, value in enumerate(args, 1)]
    parts += [(f"argument {name!r}", value) for name, value in kwargs.items()]
    for where, value in parts:
        found = serialize.find(value, (Future, Executor))
        if found is not None:
            what, advice = (
                ("a future", FUTURE_ADVICE) if isinstance(found, Future) else ("an executor", EXECUTOR_ADVICE)
            )
            verb = "is" if found is value else "holds"
            return f"{where} {verb} {what} ({type(found).__name__}). {advice}"
    return ""


def failed_call(future: Future[Any]) -> str:
    """Name the call that a failed future is of."""
    return getattr(future, "failed_call", "") or "an input"


def input_error(future: Future[Any]) -> BaseException | None:
    """The exception with which a future that is done fails a call that has it as input."""
    if future.cancelled():
        return CancelledError("an input of this call was cancelled")
    return future.failure() if isinstance(future, LeanFuture) else future.exception()


def _hand_on_failure(record: Any, future: Future[Any]) -> None:
    """Have a future fail for another one, whose failure somebody is still to ask for."""
    if record:
        record.share(future)


class DerivedFuture(LeanFuture[Any]):
    """A future that is made from others."""

    __reduce__ = refuse_future


class _Ours:
    """The first callback of another library's future: calls all of ours.

    Such a future stops at a callback that raises a `BaseException`, such as SystemExit, and the rest never hears of its
    end. So ours come first, and all of them are called before the first of their own exceptions is raised.
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
    """Have ``receiver(future)`` called when a future is done, whatever other callbacks of it raise."""
    # A LeanFuture calls all of its callbacks; of a class that has ways of its own nothing but the interface is known.
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

    Futures keep their callbacks for ever, so a plain reference would keep the one's result as long as the other.
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
                # The frames of its traceback, and those that called them, refer to the source and its result.
                error = caught.with_traceback(None)
            else:
                derived.set_result(value)
                return
        else:
            _hand_on_failure(getattr(source, "unasked", None), derived)
        derived.failed_call = failed_call(source)  # type: ignore[attr-defined]
        derived.set_exception(error)


def derived_future(source: Future[Any], compute: Callable[[Any], Any]) -> Future[Any]:
    """A future of something computed, cheaply, from another's result as soon as that is done."""
    derived: Future[Any] = DerivedFuture()
    when_done(source, _Derive(derived, compute))
    return derived


def get_item_from_future(future: Future[Any], key: Any) -> Future[Any]:
    """A future of ``future.result()[key]``.

    Args:
        future: A future whose result can be indexed.
        key: The key or index.

    Returns:
        A future that is done when ``future`` is; it can be an input of any call.
    """
    item = getattr(future, "item", None)
    if item is not None:  # a call that is only recorded, for the dependency graph
        recorded: Future[Any] = item(key)
        return recorded
    derived = derived_future(future, lambda result: result[key])
    source: Stored | None = getattr(future, "stored", None)
    if source is not None:
        derived.stored = Stored(source.call, (*source.keys, key))  # type: ignore[attr-defined]
    return derived


def split_future(future: Future[Any], n: int) -> list[Future[Any]]:
    """Futures of the first ``n`` elements of a result.

    Args:
        future: A future whose result is a sequence of at least ``n`` elements.
        n: How many; at least 1.

    Returns:
        ``n`` futures, in order.

    Raises:
        ValueError: ``n`` is below 1.
    """
    if n < 1:
        raise ValueError(f"split_future needs n of at least 1, got {n}.")
    return [get_item_from_future(future, index) for index in range(n)]


def batched(iterable: Iterable[Future[Any]], n: int) -> list[Future[list[Any]]]:
    """Group futures by ``n`` in the order in which they finish; failed ones come last.

    Args:
        iterable: The futures; anything else counts as a result that is there already.
        n: Size of a group; the last may be smaller.

    Returns:
        Futures of lists of results. A group that holds a failed input fails with its exception.

    Raises:
        ValueError: ``n`` is below 1.
    """
    if n < 1:
        raise ValueError(f"batched needs n of at least 1, got {n}.")
    futures = [item if isinstance(item, Future) else _done(item) for item in iterable]
    groups: list[Future[list[Any]]] = [DerivedFuture() for _ in range(-(-len(futures) // n))]
    collector = _Batches(groups, n, len(futures))
    for future in futures:
        when_done(future, collector.on_done)
    return groups


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = DerivedFuture()
    future.set_result(value)
    return future


class _Batches:
    """Collects results as they come and resolves one group after the other."""

    def __init__(self, groups: list[Future[list[Any]]], n: int, total: int) -> None:
        self._lock = RLock()
        self._groups = deque(groups)  # not resolved yet; the callbacks keep them, and would keep their results
        self._n = n
        self._missing = total
        self._results: list[Any] = []
        self._errors: list[tuple[BaseException, Any]] = []  # with what is told if nobody asks for them

    def on_done(self, future: Future[Any]) -> None:
        ready: list[tuple[Future[list[Any]], list[Any], BaseException | None, Any]] = []
        with self._lock:
            error = input_error(future)
            if error is None:
                self._results.append(future.result())
            else:
                self._errors.append((error, getattr(future, "unasked", None)))
            self._missing -= 1
            while self._groups and (len(self._results) >= self._n or not self._missing):
                values = self._results[: self._n]
                del self._results[: self._n]
                group_error, record = None, None
                if len(values) < self._n and self._errors:
                    group_error, record = self._errors[0]
                    del self._errors[: self._n - len(values)]
                ready.append((self._groups.popleft(), values, group_error, record))
        # Outside the lock: callbacks of a group may finish further inputs. All groups, whatever callbacks raise.
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
