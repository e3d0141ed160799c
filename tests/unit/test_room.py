"""The number of jobs to submit under an unknown limit."""

from __future__ import annotations

import pytest

from executorlib.jobs import room
from executorlib.jobs.room import Retry, Room
from executorlib.jobs.system import Refused


class Site:
    """A system with a limit, and a session that submits jobs to it as `Room` says.

    Args:
        limit: Most jobs at once.
        others: The number of jobs that are not the session's.
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
    """It is found by halving. From then on, one request replaces the ended jobs, and is not refused."""
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
    """It is noticed without the end of a job of ours, and all of it is used. The pauses get longer and longer."""
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


def test_waiting_for_room_ends_only_without_hope() -> None:
    """Waiting goes on while there are jobs that may end. If nothing can make room, it ends after some minutes."""
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


# Temporary refusals.

AWAY = Refused("the controller cannot be reached", transient=True)


def test_submissions_are_repeated_for_some_minutes(caplog: pytest.LogCaptureFixture) -> None:
    """The pauses become longer, the user is told once, and in the end it is an error."""
    retry = Retry()
    now = 1000.0
    pauses = []
    while retry.again(AWAY, now):
        pauses.append(retry.due - now)
        now = retry.due
    assert pauses[:6] == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0]
    assert set(pauses[6:]) == {30.0}
    assert 270.0 <= sum(pauses) < 300.0
    (record,) = caplog.records
    assert record.getMessage() == "the controller cannot be reached; trying again for 300 s"


def test_refusals_of_submissions_that_were_made_together_count_once() -> None:
    retry = Retry()
    assert [retry.again(AWAY, 5.0) for _ in range(10)] == [True] * 10
    assert retry.due == 6.0


def test_a_session_that_leaves_has_less_patience() -> None:
    """It is counted from when it left, however long the system has been away by then."""
    retry = Retry()
    assert retry.again(AWAY, 100.0)
    assert retry.again(AWAY, 380.0, since=370.0, seconds=30.0)
    assert not retry.again(AWAY, 399.0, since=370.0, seconds=30.0)


def test_other_refusals_are_final() -> None:
    assert not Retry().again(Refused("invalid partition"), 5.0)
