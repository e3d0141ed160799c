"""Settings of this process that its workers are to have, too.

They are the interpreter's options, recursion limit, limit of digits, warning filters and logging, and the umask.

The options are those that `multiprocessing` hands on to processes that it spawns. The others may change while the
program runs. They are taken when a worker is set up: in the default mode as its call starts, in block mode as the
worker does, for jobs when they are submitted. `worker.settings` is the other end.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import subprocess
import sys
import warnings
from typing import Any

_STYLES = {logging.PercentStyle: "%", logging.StrFormatStyle: "{", logging.StringTemplateStyle: "$"}

# What the filters were described from last, and their description: they seldom change.
_described: tuple[list[Any], list[Any]] = ([], [])


def interpreter() -> list[str]:
    """The command that starts an interpreter with the options of this one, such as ``-O``, ``-W`` and ``-X``."""
    return [sys.executable, *subprocess._args_from_interpreter_flags()]  # type: ignore[attr-defined]


def settings() -> dict[str, Any]:
    """The settings as they are now, as plain data: of no subclass, so that it can be written as Python source.

    They are a help to the calls, not a need: what cannot be described, because the program has put something of its own
    in its place, stays with this process.
    """
    found: dict[str, Any] = {"recursion_limit": sys.getrecursionlimit()}
    if hasattr(sys, "get_int_max_str_digits"):  # Python 3.10 has it from 3.10.7 on
        found["int_digits"] = sys.get_int_max_str_digits()
    for name, describe in (("umask", _umask), ("warnings", _filters), ("logging", _logging)):
        with contextlib.suppress(Exception):
            found[name] = describe()
    return found


def _umask() -> int:
    """The umask, as Linux tells it: the system call sets it, which other threads' files would come to feel."""
    fd = os.open("/proc/self/status", os.O_RDONLY)
    try:
        head = os.read(fd, 256)  # it is in the second line; what comes later takes long to gather
    finally:
        os.close(fd)
    return int(head.partition(b"\nUmask:")[2].split()[0], 8)


def _filters() -> list[Any]:
    global _described
    filters: Any = warnings.filters
    if _described[0] != filters:
        _described = list(filters), [described for each in filters if (described := _filter(each)) is not None]
    return _described[1]


def _filter(each: Any) -> list[Any] | None:
    try:
        action, message, category, module, line = each
        kind = [_text(category.__module__), _text(category.__qualname__)]
        return [_text(action), _pattern(message), *kind, _pattern(module), int(line)]
    except Exception:  # of something that only looks like a filter
        return None


def _text(value: str) -> str:
    return str.__str__(value)  # also of an enumeration


def _pattern(pattern: Any) -> str | list[Any] | None:
    """A text to be equal to stays one; a pattern to match becomes a list."""
    if pattern is None:
        return None
    return _text(pattern) if isinstance(pattern, str) else [_text(pattern.pattern), int(pattern.flags)]


def _logging() -> dict[str, Any]:
    """By the name of each logger that is not as it was made: level, whether it propagates, and its handlers."""
    found: dict[str, Any] = {}
    root = _logger(logging.root)
    if root != [logging.WARNING, True, []]:
        found[""] = root
    # For each fresh call, and large libraries have hundreds of loggers: those that are as they were made cost no call.
    placeholder, unset = logging.PlaceHolder, logging.NOTSET
    for name, each in logging.root.manager.loggerDict.copy().items():
        try:
            if type(each) is placeholder or (each.level == unset and each.propagate and not each.handlers):  # type: ignore[union-attr]
                continue
            described = _logger(each)  # type: ignore[arg-type]
            if described != [unset, True, []]:
                found[_text(name)] = described
        except Exception:  # of a class of the program's own
            continue
    disabled = int(logging.root.manager.disable)
    return {"disabled": disabled, "loggers": found} if found or disabled else {}


def _logger(logger: logging.Logger) -> list[Any]:
    handlers = [described for handler in logger.handlers if (described := _handler(handler)) is not None]
    return [int(logger.level), bool(logger.propagate), handlers]


def _handler(handler: logging.Handler) -> list[Any] | None:
    """Stream, level and format of a handler that writes to a standard stream; others stay with this process."""
    try:
        if not isinstance(handler, logging.StreamHandler):
            return None
        stream = handler.stream
        if stream is None:
            return None
        if stream is sys.stdout or stream is sys.__stdout__:
            name = "stdout"
        elif stream is sys.stderr or stream is sys.__stderr__:
            name = "stderr"
        else:
            return None
        return [name, int(handler.level), *_format(handler.formatter)]
    except Exception:  # of a class of the program's own
        return None


def _format(formatter: Any) -> tuple[str | None, str | None, str]:
    """Format, format of times, and style of a formatter; a record's message only where a plain formatter cannot do it.

    Fields that the program's own formatter, filter or class of records adds are not there in a worker.
    """
    with contextlib.suppress(Exception):
        date = None if formatter.datefmt is None else _text(formatter.datefmt)
        described = _text(formatter._fmt), date, _STYLES[type(formatter._style)]
        if _is_plain(*described):
            return described
    return None, None, "%"


@functools.lru_cache(maxsize=64)
def _is_plain(text: str, date: str | None, style: Any) -> bool:
    """Whether a plain formatter can format a plain record by a format."""
    record = logging.LogRecord("", logging.INFO, "", 0, "", (), None)
    try:
        logging.Formatter(text, date, style, validate=False).format(record)
    except Exception:
        return False
    return True
