"""How much fits under a site's submit limit, which is not known: it is found out from what is refused."""

from __future__ import annotations

# How long to wait for room, in seconds: from the end of a job of ours, which the system takes a moment to see, and
# where none ends, as others' jobs may count, too. The latter doubles each time.
_SETTLE = 0.5
_FIRST_PAUSE, _LAST_PAUSE = 1.0, 30.0
# How long it is tried where nothing that could end is known to fill the limit, in seconds.
_PATIENCE = 300.0


class Room:
    """How many jobs to submit next, to a system that has refused some because there would be too many.

    What is refused is halved until something fits. When nothing does, it is waited until jobs have ended, and then as
    many are tried at once as have; now and then one is, in case that others' jobs have ended.
    """

    def __init__(self) -> None:
        self._most: int | None = None  # no more than these fit; None where that is not known
        self._size = 1  # to be tried next
        self._freed = 0  # jobs that have ended since nothing more fitted
        self._pause = _FIRST_PAUSE
        self._hopeless_since: float | None = None
        self.due = 0.0

    @property
    def is_full(self) -> bool:
        """Whether nothing fits before jobs have ended."""
        return self._most == 0

    def size(self, now: float) -> int:
        """How many to try now; 0 for none before `due`."""
        if self._most == 0:
            if now < self.due:
                return 0
            self._most, self._size, self._freed = self._freed or None, self._freed or 1, 0
        return self._size

    def taken(self, count: int, now: float) -> None:
        """So many were accepted."""
        self._pause, self._hopeless_since = _FIRST_PAUSE, None
        if self._most is None:
            self._size = 2 * count
        else:
            self._fits(max(0, self._most - count), now)

    def refused(self, count: int, now: float) -> None:
        """So many were too many."""
        self._fits(count - 1 if self._most is None else min(self._most, count - 1), now)
        if self._most == 0:
            self._pause = min(2 * self._pause, _LAST_PAUSE)

    def _fits(self, most: int, now: float) -> None:
        self._most, self._size = most, (most + 1) // 2
        if not most:
            self.due = now + self._pause

    def ended(self, now: float) -> None:
        """A job of ours has ended."""
        if self._most == 0:
            self._freed += 1
            self.due = min(self.due, now + _SETTLE)
        elif self._most is not None:
            self._most += 1

    def is_hopeless(self, now: float, may_end: bool) -> bool:
        """Whether waiting is given up, once not even one was accepted.

        Args:
            now: The time.
            may_end: Whether there are jobs that may count and that will end.
        """
        if may_end or self._most != 0:
            self._hopeless_since = None
            return False
        if self._hopeless_since is None:
            self._hopeless_since = now
        return now - self._hopeless_since >= _PATIENCE
