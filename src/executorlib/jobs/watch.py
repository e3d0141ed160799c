"""Asks a system for the states of jobs, all at once and seldom: of calls, and of workers that have not connected."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Generic, Protocol, TypeVar

from executorlib.jobs.queue import JobState, shown_id
from executorlib.jobs.system import BatchSystem, JobKey, States
from executorlib.launchers.contract import Events, Timer

logger = logging.getLogger("executorlib")

# Seconds to wait for further changes after the system has reported one by itself.
_GATHER_SECONDS = 0.05


class Watched(Protocol):
    """The record of a job, as far as a `Watch` knows it."""

    @property
    def who(self) -> str:
        """The call or worker that waits for the job."""
        ...

    @property
    def key(self) -> JobKey:
        """Its id and index in the system."""
        ...

    @property
    def is_watched(self) -> bool:
        """True while it is in the system, and its state matters."""
        ...


Record = TypeVar("Record", bound=Watched)


class Watch(Generic[Record]):
    """Asks for the states of jobs: soon after a change, and then less and less often.

    Args:
        events: The loop.
        system: The system that has the jobs.
        records: Returns those who may be watched, each time before the system is asked; None to stop asking until
            `soon` is called.
        on_state: Called with a job that was asked for, and its state; None if the system does not have it.
            It is not called if the system does not answer.
    """

    def __init__(
        self,
        events: Events,
        system: BatchSystem,
        records: Callable[[], Iterable[Record] | None],
        on_state: Callable[[Record, JobState | None], None],
    ) -> None:
        self._system = system
        self._records = records
        self._on_state = on_state
        self._timer = Timer(events, self._ask)
        self._pause = system.first_query
        self._asking = False
        self._told_held: set[str] = set()
        system.listen(lambda: self._timer.within(_GATHER_SECONDS))

    def soon(self) -> None:
        """Ask about new jobs soon."""
        self._pause = self._system.first_query
        self._timer.within(self._pause)

    def _ask(self) -> None:
        if self._asking:
            return
        records = self._records()
        if records is None:
            return
        asked = [(each, each.key) for each in records if each.is_watched]
        if not asked:
            self._timer.within(self._pause)
            return
        self._asking = True
        self._system.query(sorted({key[0] for _, key in asked}), lambda states: self._on_states(asked, states))

    def _on_states(self, asked: list[tuple[Record, JobKey]], states: States | None) -> None:
        self._asking = False
        if states is not None:  # without an answer, nothing is known
            for each, key in asked:
                if each.is_watched and each.key == key:  # it may have become another job meanwhile
                    self._tell(each, key, states)
        self._pause = min(1.5 * self._pause, self._system.last_query)
        self._timer.within(self._pause)

    def _tell(self, record: Record, key: JobKey, states: States) -> None:
        job_id, index = key
        # A plain job has the index 0. A system that gives a job array only one state has it at None.
        state = states.get((job_id, index or 0)) or states.get((job_id, None))
        if state is not None and state.held:
            self._warn_of_hold(record, state)
        self._on_state(record, state)

    def _warn_of_hold(self, record: Record, state: JobState) -> None:
        """Tell the user, once for each job or job array, that an administrator holds it."""
        job_id, index = record.key
        if job_id not in self._told_held:
            self._told_held.add(job_id)
            logger.warning(
                "%s waits: an administrator holds its job %s (%s). It starts when they release it; ask them why they "
                "hold it.",
                record.who,
                shown_id(job_id, index),
                state.reason,
            )
