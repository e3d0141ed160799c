"""Settings of the user's process, put in force in a worker; `launchers.session` describes them.

Nothing is imported that is not wanted: a filter for warnings of a module that is not loaded here waits for it.
Settings are a help to the calls, not a need: one that cannot be put in force here is left out.
"""

from __future__ import annotations

import contextlib
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import logging
    import re
    from collections.abc import Callable
    from typing import Any

# What was changed here before: by the agent, from which this process was forked.
_loggers: dict[str, list[Any]] = {}


def apply(settings: dict[str, Any]) -> None:
    """Put settings in force.

    Args:
        settings: Those that are to change.
    """
    if "recursion_limit" in settings:
        with contextlib.suppress(Exception):  # lower than this very call is deep
            sys.setrecursionlimit(settings["recursion_limit"])
    if "int_digits" in settings:
        with contextlib.suppress(Exception):  # of a Python that has no such limit
            sys.set_int_max_str_digits(settings["int_digits"])
    if "umask" in settings:
        os.umask(settings["umask"])
    if "warnings" in settings:
        with contextlib.suppress(Exception):
            _filter_warnings(settings["warnings"])
    if "logging" in settings and (settings["logging"] or _loggers):
        with contextlib.suppress(Exception):
            _set_up_logging(settings["logging"])


def divert(handler: logging.Handler) -> Callable[[], None]:
    """Have a handler get what the handlers of the user's session would get, in the place of those that stand for them.

    Returns:
        Undoes it.
    """
    import logging

    changed: dict[str, logging.Logger] = {"": logging.root}
    for name in _loggers:
        logger = logging.getLogger(name or None)
        if not logger.propagate:
            changed[name] = logger
        for each in _loggers[name]:
            logger.removeHandler(each)
    for logger in changed.values():
        logger.addHandler(handler)

    def undo() -> None:
        for logger in changed.values():
            logger.removeHandler(handler)
        for name, handlers in _loggers.items():
            for each in handlers:
                logging.getLogger(name or None).addHandler(each)

    return undo


def _filter_warnings(filters: list[Any]) -> None:
    import warnings

    warnings.resetwarnings()
    warnings.filters.extend(  # type: ignore[attr-defined]
        (action, _pattern(message), _category(module_of_category, name), _pattern(module), line)
        for action, message, module_of_category, name, module, line in filters
    )


def _pattern(described: Any) -> Any:
    return _Pattern(*described) if isinstance(described, list) else described


class _Pattern:
    """Stands for a compiled pattern. Most are for warnings that never come, and compiling them takes a while."""

    def __init__(self, pattern: str, flags: int) -> None:
        self.pattern = pattern
        self.flags = flags
        self._compiled: re.Pattern[str] | None = None

    def match(self, text: str) -> Any:
        """See `re.Pattern.match`."""
        if self._compiled is None:
            import re

            self._compiled = re.compile(self.pattern, self.flags)
        return self._compiled.match(text)


class _ByName(type):
    """Class of classes that stand for another one, which is not loaded here yet, or is the program's own."""

    def __subclasscheck__(cls, subclass: type) -> bool:
        return any(
            (each.__module__, each.__qualname__) == (cls.__module__, cls.__qualname__) for each in subclass.__mro__
        )


def _category(module: str, name: str) -> Any:
    found: Any = sys.modules.get(module) if module != "__main__" else None
    for part in name.split("."):
        found = getattr(found, part, None)
    if isinstance(found, type) and issubclass(found, Warning):
        return found
    return _ByName(name, (Warning,), {"__module__": module, "__qualname__": name})


def _set_up_logging(described: dict[str, Any]) -> None:
    import logging

    for name, handlers in _loggers.items():
        logger = logging.getLogger(name or None)
        logger.setLevel(logging.NOTSET if name else logging.WARNING)
        logger.propagate = True
        for handler in handlers:
            logger.removeHandler(handler)
    _loggers.clear()
    logging.disable(described.get("disabled", logging.NOTSET))
    for name, (level, propagates, handlers) in described.get("loggers", {}).items():
        with contextlib.suppress(Exception):  # of a class of the program's own
            logger = logging.getLogger(name or None)
            _loggers[name] = []
            logger.setLevel(level)
            logger.propagate = propagates
            for stream, handler_level, text, date, style in handlers:
                handler = logging.StreamHandler(getattr(sys, stream))
                handler.setLevel(handler_level)
                if text is not None:
                    handler.setFormatter(logging.Formatter(text, date, style, validate=False))
                logger.addHandler(handler)
                _loggers[name].append(handler)
