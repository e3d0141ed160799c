"""Failures of calls that nobody has asked for, reported once: when their executor or the program ends.

Asking a future for its result or exception empties its record here. A record that is left is reported as soon as nobody
can ask any more: when the executor ends if the future is gone by then, and otherwise at exit.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable
from typing import Any

from executorlib.futures.locks import RLock

logger = logging.getLogger("executorlib")


class Record(list[str]):
    """The text of a failure until somebody asks for it, shared by all futures that have the failure.

    Args:
        text: The text.
        future: The call's future.
    """

    __slots__ = ("_holders",)

    def __init__(self, text: str, future: Any) -> None:
        super().__init__([text])
        self._holders = [weakref.ref(future)]

    def share(self, future: Any) -> None:
        """Let a future made from the failed one share this record, so that asking either of them counts."""
        self._holders.append(weakref.ref(future))
        future._unasked = self

    @property
    def can_be_asked(self) -> bool:
        """True if there is still a future to ask."""
        return any(holder() is not None for holder in self._holders)


# How many texts are kept for each executor, and how many are shown.
_MOST_KEPT, _MOST_SHOWN = 20, 5
_MOST_CHARACTERS = 200
_FIRST_ROOM = 100

# Records of ended executors whose futures still exist. Several executors may end at once, each in its own thread.
_left: list[Record] = []
_lock = RLock()


class Failures:
    """The records of one executor."""

    def __init__(self) -> None:
        self._records: list[Record] = []
        self._room = _FIRST_ROOM

    def add(self, future: Any, call: str, error: BaseException) -> Record:
        """Make the record of a failed call.

        Args:
            future: The call's future.
            call: The call's name, for the text.
            error: The exception that it failed with.
        """
        if len(self._records) >= self._room:
            self._records = [each for each in self._records if each]
            self._room = max(_FIRST_ROOM, 2 * len(self._records))
        text = ""
        if len(self._records) < _MOST_KEPT:
            try:
                text = f"{call}: {type(error).__name__}: {error}"
                if len(text) > _MOST_CHARACTERS:
                    text = text[:_MOST_CHARACTERS].rstrip() + "…"
            except Exception:  # raised by the user's own exception class
                text = f"{call}: {type(error).__name__}"
        record = Record(text, future)
        self._records.append(record)
        return record

    def tell(self) -> None:
        """Report failures whose futures are gone when the executor ends, and leave the others to the program's end."""
        waiting = [record for record in self._records if record and record.can_be_asked]
        _tell(record for record in self._records if not record.can_be_asked)
        with _lock:
            _left[:] = [record for record in _left if record]
            _left.extend(waiting)
        self._records.clear()


def tell_the_rest() -> None:
    """Report what is left when the program ends."""
    _tell(_left)
    _left.clear()


def forget() -> None:
    """Leave all records to the process of which this one is a fork."""
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
