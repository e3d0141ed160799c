"""Futures as inputs of calls: finding them at any depth, and replacing them with their results."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, Executor, Future
from typing import Any, NamedTuple

from executorlib import serialize
from executorlib.errors import EXECUTOR_ADVICE, FUTURE_ADVICE
from executorlib.futures.lean import LeanFuture

# Common types of arguments that cannot hold a future and are skipped without a closer look.
_LEAVES = frozenset({int, float, complex, bool, str, bytes, bytearray, type(None)})


class StoredCall:
    """A call whose result goes to a file that is known before the file exists.

    Attributes:
        executor: The number of its executor, unique in this process.
        number: Its own number in the executor.
        key: Its cache key, once that is derived.
        path: The file.
        batch: The batch directory of the job that this session submitted for it.
    """

    __slots__ = ("batch", "executor", "key", "number", "path")

    def __init__(self, executor: int, number: int) -> None:
        self.executor = executor
        self.number = number
        self.key = ""
        self.path = ""
        self.batch: str | None = None


class Stored(NamedTuple):
    """The call whose result a future represents, or of which it represents ``result[keys[0]][keys[1]]...``."""

    call: StoredCall
    keys: tuple[Any, ...] = ()


class StoredFuture(Future[Any]):
    """A stand-in for another future that names what it represents and never has the result.

    Args:
        stored: What it represents.
    """

    def __init__(self, stored: Stored) -> None:
        # The base class is not initialized, because nobody may wait for this future.
        self._stored = stored


def stored(future: Future[Any]) -> Stored | None:
    """Return what a future represents in terms of files; None if its result is only in memory, or not known yet."""
    found: Stored | None = getattr(future, "_stored", None)
    return found if found is not None and found.call.path else None


def find_futures_in_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Future[Any]]:
    """Find the futures in all arguments of a call, as `find_futures` does."""
    for value in args:
        if type(value) not in _LEAVES:
            break
    else:
        if not kwargs:
            return []
    return find_futures((args, kwargs))


def find_futures(obj: object) -> list[Future[Any]]:
    """Find the futures in a value: itself, or at any depth in lists, tuples, sets, dicts and dataclasses.

    Returns:
        Each future once, in the order in which they are found.

    Raises:
        ValueError: A container that holds a future also holds itself, so it could never be rebuilt with results.
    """
    found: dict[int, Future[Any]] = {}
    _search(obj, found, {}, set())
    return list(found.values())


def _search(obj: object, found: dict[int, Future[Any]], seen: dict[int, bool], cyclic: set[int]) -> bool:
    """Collect futures below ``obj`` and return True if there are any; ``seen`` has the answers for known containers."""
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
        cyclic.add(key)  # possibly; if it is only shared, its answer is final already
        return seen[key]
    seen[key] = False  # until its search is over
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
    """Replace all futures with their values, by default their results. Containers without futures are kept."""
    return _fill(obj, value_of, {})


def _fill(obj: Any, value_of: Callable[[Future[Any]], Any], known: dict[int, Any]) -> Any:
    """Do what `fill_in` does. Shared containers stay shared, because ``known`` has what became of those met before."""
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
    known[key] = obj  # if it contains itself it has no futures, or find_futures would have raised
    before = list(children)
    after = [_fill(child, value_of, known) for child in before]
    if any(old is not new for old, new in zip(before, after, strict=True)):
        known[key] = _rebuilt(obj, after)
    return known[key]


def _rebuilt(obj: Any, children: list[Any]) -> Any:
    """Return a container like ``obj`` with other children, given in the order of `_children`."""
    if isinstance(obj, dict):
        result = copy.copy(obj)  # keeps the type and attributes such as a default factory
        result.clear()
        result.update(zip(children[: len(obj)], children[len(obj) :], strict=True))
        return result
    if isinstance(obj, tuple) and hasattr(obj, "_make"):  # a named tuple
        return obj._make(children)
    if isinstance(obj, (list, tuple, set, frozenset)):
        return type(obj)(children)
    # Not dataclasses.replace, because fields may be absent from __init__ and __post_init__ has already run.
    result = copy.copy(obj)
    for field, child in zip(dataclasses.fields(obj), children, strict=True):
        if hasattr(obj, field.name):
            object.__setattr__(result, field.name, child)
    return result


def misplaced(fn: object, args: Sequence[object], kwargs: Mapping[str, object]) -> str:
    """Explain where a call that cannot be pickled has a future or executor, and what to pass instead, or return ''."""
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
    """Name the call that a failed future belongs to."""
    return getattr(future, "_failed_call", "") or "an input"


def input_error(future: Future[Any]) -> BaseException | None:
    """Return the exception with which a finished future fails the calls that have it as input."""
    if future.cancelled():
        return CancelledError("an input of this call was cancelled")
    return future._failure() if isinstance(future, LeanFuture) else future.exception()
