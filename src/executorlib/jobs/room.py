"""Decides when to submit again what a system has refused, and how much of it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from executorlib.jobs.system import Refused

logger = logging.getLogger("executorlib")

# How long temporarily refused submissions are repeated, and the pauses, in seconds.
_RETRY_SECONDS, _FIRST_RETRY, _LAST_RETRY = 300.0, 1.0, 30.0

# Seconds to wait for room: after the end of one of our jobs, which the system needs a moment to notice, and if none
# ends, because other jobs may count, too. The second wait doubles each time.
_SETTLE = 0.5
_FIRST_PAUSE, _LAST_PAUSE = 1.0, 30.0
# Seconds before giving up if no job is known whose end would make room.
_PATIENCE = 300.0


class Retry:
    """Repeats submissions that a system has refused only for the moment, with pauses that become longer.

    Attributes:
        due: The time of the next try.
    """

    def __init__(self) -> None:
        self._since: float | None = None
        self._pause = _FIRST_RETRY
        self.due = 0.0

    def again(self, refusal: Refused, now: float, since: float = 0.0, seconds: float = _RETRY_SECONDS) -> bool:
        """Note a refusal; returns whether to try again.

        Args:
            refusal: The refusal.
            now: The time.
            since: The time from which the seconds are counted, if it is later than that of the first refusal.
            seconds: How long to try.
        """
        first = now if self._since is None else self._since
        if not refusal.transient or now + self._pause - max(first, since) >= seconds:
            return False
        if now < self.due:  # it was submitted together with one that was refused already
            return True
        if self._since is None:
            logger.warning("%s; trying again for %g s", refusal, seconds)
        self._since, self.due = first, now + self._pause
        self._pause = min(2 * self._pause, _LAST_RETRY)
        return True


class Room:
    """Tells how many jobs to submit next to a system that has refused some because there would be too many.

    Nobody tells the limit of a site, so it is learnt from refusals.

    After a refusal, half as many are tried, until some fit. Once none fit, submissions wait until jobs have ended, and
    then as many are tried as have ended. Now and then a single one is tried, in case that other jobs have ended.
    """

    def __init__(self) -> None:
        self._most: int | None = None  # no more than these fit; None if that is not known
        self._size = 1  # to be tried next
        self._freed = 0  # jobs that have ended since no more fitted
        self._pause = _FIRST_PAUSE
        self._hopeless_since: float | None = None
        self.due = 0.0

    @property
    def is_full(self) -> bool:
        """True if no job fits before others have ended."""
        return self._most == 0

    def size(self, now: float) -> int:
        """The number of jobs to try now; 0 means none before `due`."""
        if self._most == 0:
            if now < self.due:
                return 0
            self._most, self._size, self._freed = self._freed or None, self._freed or 1, 0
        return self._size

    def taken(self, count: int, now: float) -> None:
        """Note that this many jobs were accepted."""
        self._pause, self._hopeless_since = _FIRST_PAUSE, None
        if self._most is None:
            self._size = 2 * count
        else:
            self._fits(max(0, self._most - count), now)

    def refused(self, count: int, now: float) -> None:
        """Note that this many jobs were too many."""
        self._fits(count - 1 if self._most is None else min(self._most, count - 1), now)
        if self._most == 0:
            self._pause = min(2 * self._pause, _LAST_PAUSE)

    def _fits(self, most: int, now: float) -> None:
        self._most, self._size = most, (most + 1) // 2
        if not most:
            self.due = now + self._pause

    def ended(self, now: float) -> None:
        """Note that one of our jobs has ended."""
        if self._most == 0:
            self._freed += 1
            self.due = min(self.due, now + _SETTLE)
        elif self._most is not None:
            self._most += 1

    def is_hopeless(self, now: float, may_end: bool) -> bool:
        """Return whether to give up waiting, after even a single job was refused.

        Args:
            now: The time.
            may_end: Whether there are jobs that may count under the limit and that will end.
        """
        if may_end or self._most != 0:
            self._hopeless_since = None
            return False
        if self._hopeless_since is None:
            self._hopeless_since = now
        return now - self._hopeless_since >= _PATIENCE
