"""Puts settings of the user's process in force in a worker. `launchers.session` describes them.

Nothing is imported that is not needed: a warning filter for a module that is not loaded here waits for the module.
Settings help calls but are not essential, so one that cannot be put in force here is left out.
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

# Loggers that were changed here earlier, perhaps by the agent from which this process was forked, and their handlers.
_loggers: dict[str, list[Any]] = {}


def apply(settings: dict[str, Any]) -> None:
    """Put settings in force.

    Args:
        settings: The settings that are to change.
    """
    if "recursion_limit" in settings:
        with contextlib.suppress(Exception):  # this very call is deeper than that
            sys.setrecursionlimit(settings["recursion_limit"])
    if "int_digits" in settings:
        with contextlib.suppress(Exception):  # this Python has no such limit
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
    """Let a handler get what the handlers of the user's session would get, instead of those that represent them here.

    Returns:
        A function that undoes this.
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
    """Takes the place of a compiled pattern. Compiling is slow, and most filters are for warnings that never come."""

    def __init__(self, pattern: str, flags: int) -> None:
        self.pattern = pattern
        self.flags = flags
        self._compiled: re.Pattern[str] | None = None

    def match(self, text: str) -> Any:
        """Match the start of a text, and compile the pattern first if needed."""
        if self._compiled is None:
            import re

            self._compiled = re.compile(self.pattern, self.flags)
        return self._compiled.match(text)


class _ByName(type):
    """The class of classes that represent another one, which is not loaded here yet, or is the program's own."""

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
        with contextlib.suppress(Exception):  # a logger of the program's own class may raise
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
