"""Failures of calls that nobody has asked for, told once: at the end of their executor, or of the program.

A future that is asked for its result or exception empties its record here. What is left is told as soon as nobody can
ask any more: when the executor ends, of futures that are gone by then, and at exit of all others.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable
from typing import Any

from executorlib.futures.locks import RLock

logger = logging.getLogger("executorlib")


class Record(list[str]):
    """The failure's text, until somebody asks for it; shared by all futures that have the failure.

    Args:
        text: It.
        future: The call's.
    """

    __slots__ = ("_holders",)

    def __init__(self, text: str, future: Any) -> None:
        super().__init__([text])
        self._holders = [weakref.ref(future)]

    def share(self, future: Any) -> None:
        """Have a future that was made from the failed one stand for it, too: to ask either of them is to ask."""
        self._holders.append(weakref.ref(future))
        future.unasked = self

    @property
    def can_be_asked(self) -> bool:
        """Whether there is still a future to ask."""
        return any(holder() is not None for holder in self._holders)


# Texts that are kept of each executor, and that are shown.
_MOST_KEPT, _MOST_SHOWN = 20, 5
_MOST_CHARACTERS = 200
_FIRST_ROOM = 100

# Of executors that have ended, whose futures have not. Several may end at once, each in its own thread.
_left: list[Record] = []
_lock = RLock()


class Failures:
    """Those of one executor."""

    def __init__(self) -> None:
        self._records: list[Record] = []
        self._room = _FIRST_ROOM

    def add(self, future: Any, call: str, error: BaseException) -> Record:
        """Make a future's record.

        Args:
            future: Of the call.
            call: The call, for the text.
            error: What it fails with.
        """
        if len(self._records) >= self._room:
            self._records = [each for each in self._records if each]
            self._room = max(_FIRST_ROOM, 2 * len(self._records))
        text = ""
        if len(self._records) < _MOST_KEPT:
            try:
                text = f"{call}: {type(error).__name__}: {error}"[:_MOST_CHARACTERS]
            except Exception:  # of the user's own class
                text = f"{call}: {type(error).__name__}"
        record = Record(text, future)
        self._records.append(record)
        return record

    def tell(self) -> None:
        """The executor has ended: tell of futures that are gone, and leave the others to the end of the program."""
        waiting = [record for record in self._records if record and record.can_be_asked]
        _tell(record for record in self._records if not record.can_be_asked)
        with _lock:
            _left[:] = [record for record in _left if record]
            _left.extend(waiting)
        self._records.clear()


def tell_the_rest() -> None:
    """The program ends: tell what was left."""
    _tell(_left)
    _left.clear()


def forget() -> None:
    """Leave everything to another process, of which this one is a copy."""
    global _lock
    _lock = RLock()
    _left.clear()


def _tell(records: Iterable[Record]) -> None:
    texts = [text for record in records for text in record[:1]]
    if not texts:
        return
    shown = [text for text in texts if text][:_MOST_SHOWN]
    if len(texts) > len(shown):
        shown.append(f"and {len(texts) - len(shown)} more")
    logger.warning(
        "%s failed, and nobody has asked for the result (future.result() or future.exception()): %s",
        "a call" if len(texts) == 1 else f"{len(texts)} calls",
        "; ".join(shown),
    )
