"""Settings of this interpreter that its workers are to have, too: options, recursion limit, warning filters, logging.

The options are those that `multiprocessing` hands on to processes that it spawns. The others may change while the
program runs. They are taken when a worker is set up: in the default mode as its call starts, in block mode as the
worker does, for jobs when they are submitted. `worker.settings` is the other end.
"""

from __future__ import annotations

import logging
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
    """The settings as they are now, as plain data."""
    return {"recursion_limit": sys.getrecursionlimit(), "warnings": _filters(), "logging": _logging()}


def _filters() -> list[Any]:
    global _described
    filters: Any = warnings.filters
    if _described[0] != filters:
        _described = (
            list(filters),
            [
                [action, _pattern(message), category.__module__, category.__qualname__, _pattern(module), line]
                for action, message, category, module, line in filters
            ],
        )
    return _described[1]


def _pattern(pattern: Any) -> str | list[Any] | None:
    """A text to be equal to stays one; a pattern to match becomes a list."""
    return pattern if pattern is None or isinstance(pattern, str) else [pattern.pattern, int(pattern.flags)]


def _logging() -> dict[str, Any]:
    """By the name of each logger that is not as it was made: level, whether it propagates, and its handlers."""
    found: dict[str, Any] = {}
    for name, each in [("", logging.root), *list(logging.root.manager.loggerDict.items())]:
        if isinstance(each, logging.PlaceHolder):
            continue
        handlers = [described for handler in each.handlers if (described := _handler(handler)) is not None]
        level = logging.NOTSET if name else logging.WARNING
        if handlers or each.level != level or not each.propagate:
            found[name] = [each.level, each.propagate, handlers]
    disabled = logging.root.manager.disable
    return {"disabled": disabled, "loggers": found} if found or disabled else {}


def _handler(handler: logging.Handler) -> list[Any] | None:
    """Stream, level and format of a handler that writes to a standard stream; others stay with this process."""
    stream = getattr(handler, "stream", None)
    if stream is None or not isinstance(handler, logging.StreamHandler):
        return None
    if stream in (sys.stdout, sys.__stdout__):
        name = "stdout"
    elif stream in (sys.stderr, sys.__stderr__):
        name = "stderr"
    else:
        return None
    formatter = handler.formatter
    if formatter is None:
        return [name, handler.level, None, None, "%"]
    return [name, handler.level, formatter._fmt, formatter.datefmt, _STYLES.get(type(formatter._style), "%")]
