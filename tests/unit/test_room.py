"""How much to submit under a limit that nobody tells."""

from __future__ import annotations

import pytest

from executorlib.jobs import room
from executorlib.jobs.room import Room


class Site:
    """A system with a limit, and a session that submits jobs to it as `Room` says.

    Args:
        limit: Most jobs at once.
        others: So many of them are not the session's.
    """

    def __init__(self, limit: int, others: int = 0) -> None:
        self.limit = limit
        self.others = others
        self.own = 0
        self.taken = 0
        self.asked = 0
        self.refused = 0
        self.now = 100.0
        self.room = Room()

    def try_all(self, wanted: int) -> None:
        """Submit until nothing is wanted, or fits before jobs have ended."""
        while wanted and (size := min(wanted, self.room.size(self.now))):
            self.asked += 1
            if self.own + self.others + size > self.limit:
                self.refused += 1
                self.room.refused(size, self.now)
            else:
                self.own += size
                self.taken += size
                wanted -= size
                self.room.taken(size, self.now)

    def end(self, count: int) -> None:
        for _ in range(count):
            self.own -= 1
            self.room.ended(self.now)
        self.now += room._SETTLE


@pytest.mark.parametrize("limit", [1, 2, 5, 7, 1000])
def test_all_room_is_used(limit: int) -> None:
    """Found by halving; from then on, what ends is replaced by one request that is not refused."""
    site = Site(limit)
    site.room.refused(10_000, site.now)
    site.try_all(20_000)
    assert site.own == limit
    assert site.asked <= 2 * 14
    site.asked = site.refused = 0
    for ends in (1, min(3, limit), limit, 1):
        site.end(ends)
        site.try_all(20_000)
        assert site.own == limit
    assert (site.asked, site.refused) == (4, 0)


def test_room_that_others_leave() -> None:
    """It is noticed without an end of a job of ours, and all of it is used; it is asked less and less often."""
    site = Site(100, others=95)
    site.room.refused(500, site.now)
    site.try_all(500)
    assert site.own == 5
    site.asked, began, pauses = 0, site.now, []
    while site.now < began + 300:
        assert site.room.size(site.now) == 0
        pauses.append(site.room.due - site.now)
        site.now = site.room.due
        site.try_all(500)
    assert pauses == sorted(pauses)
    assert pauses[-1] == room._LAST_PAUSE
    assert site.asked < 20
    site.others = 0
    site.now += room._LAST_PAUSE
    site.try_all(500)
    assert site.own == 100


def test_a_room_that_gets_smaller() -> None:
    site = Site(100)
    site.room.refused(500, site.now)
    site.try_all(500)
    site.limit = 50
    site.end(60)
    site.try_all(500)
    assert site.own == 50


def test_patience() -> None:
    """It is without end while there are jobs that may end; where nothing can make room, some minutes."""
    site = Site(0)
    site.room.refused(4, site.now)
    for may_end in (True, False, True):
        for _ in range(100):
            site.try_all(4)
            assert site.room.is_full
            if may_end:
                assert not site.room.is_hopeless(site.now, may_end)
            site.now = site.room.due
        if not may_end:
            assert not site.room.is_hopeless(site.now, may_end)
            assert not site.room.is_hopeless(site.now + room._PATIENCE - 1.0, may_end)
            assert site.room.is_hopeless(site.now + room._PATIENCE, may_end)
