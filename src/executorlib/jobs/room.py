"""Finds how many jobs fit under a site's limit. Nobody tells the limit, so it is learnt from refusals."""

from __future__ import annotations

# Seconds to wait for room: after the end of one of our jobs, which the system needs a moment to notice, and if none
# ends, because other jobs may count, too. The second wait doubles each time.
_SETTLE = 0.5
_FIRST_PAUSE, _LAST_PAUSE = 1.0, 30.0
# Seconds before giving up if no job is known whose end would make room.
_PATIENCE = 300.0


class Room:
    """Tells how many jobs to submit next to a system that has refused some because there would be too many.

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
