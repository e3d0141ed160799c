"""The record of a job: the states that it may pass through, and what the system has said about it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from executorlib.core.task import Task
from executorlib.jobs.batch import Batch
from executorlib.jobs.job import (
    CLAIMED,
    ENDED,
    FOLLOWING,
    FOUND,
    FREE,
    LEFT,
    LEGAL_MOVES,
    UNCLAIMED,
    Job,
    Known,
    Presence,
    State,
)
from executorlib.jobs.queue import JobState, Phase
from executorlib.resources import Resources

# Written out a second time: who changes the table must want to.
MOVES = {
    (UNCLAIMED, FOLLOWING),
    (UNCLAIMED, CLAIMED),
    (UNCLAIMED, ENDED),
    (UNCLAIMED, LEFT),
    (FREE, FOLLOWING),
    (FREE, CLAIMED),
    (FREE, ENDED),
    (FREE, LEFT),
    (FOLLOWING, FOLLOWING),
    (FOLLOWING, FREE),
    (FOLLOWING, CLAIMED),
    (FOLLOWING, FOUND),
    (FOLLOWING, ENDED),
    (FOLLOWING, LEFT),
    (CLAIMED, FOLLOWING),
    (CLAIMED, FREE),
    (CLAIMED, FOUND),
    (CLAIMED, ENDED),
    (CLAIMED, LEFT),
    (FOUND, ENDED),
    (FOUND, LEFT),
}
BATCHES = [Batch("/store/.executorlib/ours", ours=True), Batch("/store/.executorlib/theirs", ours=False)]
ENDING: Any = object()
STEPS: dict[str, tuple[State, Callable[[Job], None]]] = {
    "claim": (CLAIMED, lambda job: job.claim(BATCHES[0], 0)),
    "follow ours": (FOLLOWING, lambda job: job.follow(BATCHES[0], 0)),
    "follow theirs": (FOLLOWING, lambda job: job.follow(BATCHES[1], 3)),
    "follow": (FOLLOWING, lambda job: job.follow(None, 0)),
    "free": (FREE, Job.free),
    "find": (FOUND, lambda job: job.find(ENDING)),
    "end": (ENDED, Job.end),
    "leave": (LEFT, Job.leave),
}
THERE = [JobState(Phase.PENDING, "PENDING"), JobState(Phase.RUNNING, "RUNNING")]
DIED = JobState(Phase.ENDED, "FAILED")


def make() -> Job:
    resources = Resources(cache_directory="/store")
    task = Task(7, abs, (), {}, Future(), resources, resources.demand)
    return Job(cast("Any", None), task, "/store/a_i.h5")


def test_table_of_moves() -> None:
    assert set(LEGAL_MOVES) == set(State)
    assert {(before, after) for before, moves in LEGAL_MOVES.items() for after in moves} == MOVES


@pytest.mark.parametrize(("before", "name"), list(itertools.product(State, STEPS)), ids=str)
def test_step(before: State, name: str) -> None:
    """Legal steps change the state; all others raise, and change nothing."""
    job = make()
    job.state = before
    facts = dict(vars(job))
    after, step = STEPS[name]
    if (before, after) in MOVES:
        step(job)
        assert job.state is after
    else:
        with pytest.raises(RuntimeError, match=f"call 7: illegal move from {before.name} to {after.name}"):
            step(job)
        assert vars(job) == facts


EVENTS: dict[str, Callable[[Job], Any]] = {
    **{name: step for name, (_, step) in STEPS.items()},
    **{f"hear {index}": lambda job, state=state: job.presence.hear(state, 5.0) for index, state in enumerate(THERE)},
    "hear of its end": lambda job: job.presence.hear(DIED, 5.0),
    "hear nothing": lambda job: job.presence.hear(None, 5.0),
    "ask": lambda job: job.presence.ask(),
    "are told nothing": lambda job: job.presence.tell(None),
    "are told its end": lambda job: job.presence.tell(DIED),
    "are told that it runs": lambda job: job.presence.tell(THERE[1]),
}


@given(st.lists(st.sampled_from(sorted(EVENTS)), max_size=30))
def test_whatever_happens_a_record_makes_sense(names: list[str]) -> None:
    job = make()
    for name in names:
        after = STEPS[name][0] if name in STEPS else None
        if after is not None and (job.state, after) not in MOVES:
            continue
        before, presence, known = job.state, job.presence, job.presence.known
        outcome = EVENTS[name](job)
        assert (job.ending is not None) is (job.state is FOUND)
        assert job.over is (job.state in (FOUND, ENDED))
        if job.state in (UNCLAIMED, FREE):
            assert job.batch is None
        if job.state is CLAIMED:
            assert job.batch is not None
            assert job.batch.ours
        if before is ENDED:
            assert job.state is ENDED
        if outcome is True:
            assert (known, job.presence.known) == (Known.GONE, Known.ASKED), "it is asked once"
        if job.presence.known is Known.TOLD:
            assert known in (Known.ASKED, Known.TOLD)
        if job.presence.known is Known.ALIVE:
            last = job.presence.last
            assert last is not None
            assert last.phase is not Phase.ENDED
        if job.presence is not presence:
            assert job.presence.known is Known.NOTHING
        if job.presence.is_gone:
            assert job.presence.since == 5.0
        assert not job.is_watched, "it is not submitted"


def test_a_job_that_is_there_again_is_not_gone() -> None:
    """It was put back into the queue, or the query missed it. If it goes again, that is another end."""
    presence = Presence()
    for now in (1.0, 2.0):
        presence.hear(None, now)
        assert presence.is_gone
        assert presence.ask()
        presence.tell(None)
        presence.hear(None, now + 0.5)
        assert presence.since == now, "it is gone since it was first missed"
        assert not presence.ask()
        presence.hear(THERE[0], now)
        assert not presence.is_gone


def test_an_answer_that_comes_too_late_is_about_an_earlier_end() -> None:
    job = make()
    job.follow(BATCHES[1], 0)
    job.presence.hear(None, 1.0)
    assert job.presence.ask()
    tell = job.presence.tell
    job.presence.hear(THERE[1], 2.0)
    tell(DIED)
    assert job.presence.last is THERE[1]
    job.free()
    tell(DIED)
    assert job.presence.known is Known.NOTHING
    assert job.presence.last is None


def test_the_system_is_not_asked_about_an_end_that_is_known() -> None:
    presence = Presence()
    presence.hear(DIED, 1.0)
    assert presence.is_gone
    assert not presence.ask()
