"""Futures as inputs of calls: they are found at any depth, and replaced by their results."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, Executor, Future
from typing import Any, NamedTuple

from executorlib import serialize
from executorlib.errors import EXECUTOR_ADVICE, FUTURE_ADVICE
from executorlib.futures.lean import LeanFuture

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
