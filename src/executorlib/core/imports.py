"""Refuses executors and calls of a module that is still being imported.

Its functions and classes are pickled by name, so the executor's thread would wait for the import to end, while the
import may wait for the call. And the worker would import the module, too, open executors of its own, and so on forever.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from concurrent.futures import Future
from types import BuiltinFunctionType, FrameType, FunctionType, ModuleType
from typing import Any

from executorlib import serialize
from executorlib.core.task import function_name

# Locks of the modules that any thread is importing. Nearly always empty, which is a very cheap test.
_locks: dict[str, Any] | None = getattr(getattr(importlib, "_bootstrap", None), "_module_locks", None)

# How deeply executors opened by imports are nested; workers inherit this variable.
_DEPTH_VARIABLE = "EXECUTORLIB_IMPORT_DEPTH"
_MOST_DEPTH = 5
# The depth of the executor that this process works for. Read only once, since the variable is overwritten for workers.
_own_depth: int | None = None

_ADVICE = (
    "Open executors and submit calls in a function that is called after the import, or, in the script itself, below "
    "`if __name__ == '__main__':`."
)


def _module_here() -> str | None:
    """The module that this thread is in the middle of importing."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "<module>" and _is_initializing(frame.f_globals.get("__spec__")):
            return str(frame.f_globals["__name__"])
        frame = frame.f_back
    return None


def _is_initializing(spec: object) -> bool:
    return bool(getattr(spec, "_initializing", False))


def check_executor(name: str) -> None:
    """Make sure that executors opened while a module is imported are not nested forever.

    Args:
        name: The executor's class.

    Raises:
        RuntimeError: They are nested too deeply.
    """
    global _own_depth
    if _locks is not None and not _locks:
        return
    module = _module_here()
    if module is None:
        return
    if _own_depth is None:
        _own_depth = int(os.environ.get(_DEPTH_VARIABLE, "0"))
    depth = _own_depth + 1
    if depth > _MOST_DEPTH:
        raise RuntimeError(
            f"importing the module {module!r} opens {name} in a worker, whose executor was opened by an import in a "
            f"worker, and so on, {_MOST_DEPTH} times: importing {module!r} submits a call that imports it again. "
            f"{_ADVICE}"
        )
    os.environ[_DEPTH_VARIABLE] = str(depth)


def check_call(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Make sure that a call does not refer to a module that is being imported.

    Args:
        fn: The function.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Raises:
        RuntimeError: It does.
    """
    if _locks is not None and not _locks:
        return
    names = list(sys.modules) if _locks is None else list(_locks)
    unfinished = {each for each in names if _is_initializing(getattr(sys.modules.get(each), "__spec__", None))}
    if not unfinished:
        return
    # Modules that other threads import rarely concern the call, so they do not justify a search through its arguments.
    found = _module_of(fn, unfinished) or (_find(unfinished, (fn, args, kwargs)) if _module_here() else None)
    if found is not None:
        raise RuntimeError(
            f"call of {function_name(fn)}: it needs the module {found!r}, which was still being imported when it was "
            f"submitted. Its worker would import {found!r}, too, submit the same call, and so on without end. {_ADVICE}"
        )


def _module_of(obj: object, unfinished: set[str]) -> str | None:
    """The first of these modules that would be imported if the object were unpickled by its name."""
    if isinstance(obj, ModuleType):
        module = obj.__name__
    elif isinstance(obj, type | FunctionType | BuiltinFunctionType):
        module = obj.__module__ or ""
        if serialize.held(module, obj.__qualname__) is not obj:
            return None  # pickled by value
    else:
        return None
    # Importing a module imports the packages above it.
    parts = module.split(".")
    packages = (".".join(parts[: count + 1]) for count in range(len(parts)))
    return next((package for package in packages if package in unfinished), None)


class _Found(Exception):
    """Carries the name of a module out of a pickler."""


class _Nowhere:
    """A file that discards what is written to it."""

    def write(self, data: bytes) -> int:
        """Accept any data."""
        return len(data)


def _find(unfinished: set[str], obj: object) -> str | None:
    """The first of these modules that would be imported if the object, with all its parts, were unpickled."""

    class Scout(serialize._pickler()):  # type: ignore[misc]
        def persistent_id(self, obj: object) -> str | None:
            if isinstance(obj, Future):
                return "its result is looked at where it is pickled"
            module = _module_of(obj, unfinished)
            if module is not None:
                raise _Found(module)
            return None

    try:
        Scout(_Nowhere(), serialize.PROTOCOL, buffer_callback=lambda buffer: None).dump(obj)
    except _Found as found:
        return str(found)
    except Exception:  # it cannot be pickled, which the call itself reports
        return None
    return None
