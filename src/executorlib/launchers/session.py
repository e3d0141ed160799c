"""Settings of this process that its workers get, too.

They are the interpreter's options, the recursion limit, the limit of digits, warning filters, logging, and the umask.

The options are those that `multiprocessing` passes on to spawned processes. The others may change while the program
runs, and are read when a worker is set up: in the default mode when its call starts, in block mode when the worker
starts, for jobs when they are submitted. `worker.settings` applies them.
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

# The filters that were last described, and their description: they seldom change.
_described: tuple[list[Any], list[Any]] = ([], [])


def interpreter() -> list[str]:
    """The command that starts an interpreter with the options of this one, such as ``-O``, ``-W`` and ``-X``."""
    return [sys.executable, *subprocess._args_from_interpreter_flags()]  # type: ignore[attr-defined]


def settings() -> dict[str, Any]:
    """The present settings as plain data, with no subclasses, so that they can be written as Python source.

    They help calls but are not needed: a setting that cannot be described, because the program has put an object of its
    own in its place, is left out.
    """
    found: dict[str, Any] = {"recursion_limit": sys.getrecursionlimit()}
    if hasattr(sys, "get_int_max_str_digits"):  # Python 3.10 has it from 3.10.7 on
        found["int_digits"] = sys.get_int_max_str_digits()
    for name, describe in (("umask", _umask), ("warnings", _filters), ("logging", _logging)):
        with contextlib.suppress(Exception):
            found[name] = describe()
    return found


def _umask() -> int:
    """The umask, read from /proc because the system call changes it, which would affect other threads' files."""
    fd = os.open("/proc/self/status", os.O_RDONLY)
    try:
        head = os.read(fd, 256)  # it is in the second line; later lines take long to produce
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
    except Exception:  # something that only looks like a filter
        return None


def _text(value: str) -> str:
    return str.__str__(value)  # also for an enumeration


def _pattern(pattern: Any) -> str | list[Any] | None:
    """Describe a pattern: a text to be equal to stays a text, a regular expression becomes a list."""
    if pattern is None:
        return None
    return _text(pattern) if isinstance(pattern, str) else [_text(pattern.pattern), int(pattern.flags)]


def _logging() -> dict[str, Any]:
    """Level, propagation and handlers of each logger that was changed, by name."""
    found: dict[str, Any] = {}
    root = _logger(logging.root)
    if root != [logging.WARNING, True, []]:
        found[""] = root
    # This runs for each fresh call, and large libraries have hundreds of loggers: unchanged ones must not cost a call.
    placeholder, unset = logging.PlaceHolder, logging.NOTSET
    for name, each in logging.root.manager.loggerDict.copy().items():
        try:
            if type(each) is placeholder or (each.level == unset and each.propagate and not each.handlers):  # type: ignore[union-attr]
                continue
            described = _logger(each)  # type: ignore[arg-type]
            if described != [unset, True, []]:
                found[_text(name)] = described
        except Exception:  # an instance of the program's own class
            continue
    disabled = int(logging.root.manager.disable)
    return {"disabled": disabled, "loggers": found} if found or disabled else {}


def _logger(logger: logging.Logger) -> list[Any]:
    handlers = [described for handler in logger.handlers if (described := _handler(handler)) is not None]
    return [int(logger.level), bool(logger.propagate), handlers]


def _handler(handler: logging.Handler) -> list[Any] | None:
    """Stream, level and format of a handler that writes to a standard stream; None for other handlers."""
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
    except Exception:  # an instance of the program's own class
        return None


def _format(formatter: Any) -> tuple[str | None, str | None, str]:
    """Format, date format and style of a formatter; just the message if a plain formatter cannot produce the format.

    A worker does not have the fields that the program's own formatter, filter or record class adds.
    """
    with contextlib.suppress(Exception):
        date = None if formatter.datefmt is None else _text(formatter.datefmt)
        described = _text(formatter._fmt), date, _STYLES[type(formatter._style)]
        if _is_plain(*described):
            return described
    return None, None, "%"


@functools.lru_cache(maxsize=64)
def _is_plain(text: str, date: str | None, style: Any) -> bool:
    """Return whether a plain formatter can apply the format to a plain record."""
    record = logging.LogRecord("", logging.INFO, "", 0, "", (), None)
    try:
        logging.Formatter(text, date, style, validate=False).format(record)
    except Exception:
        return False
    return True
