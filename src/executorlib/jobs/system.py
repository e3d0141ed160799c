"""What runs jobs, as `jobs.launcher` sees it: it takes batches, says how its jobs are, and cancels them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

from executorlib.jobs.queue import Batch, Cause, Dependency, JobState, Limit, Phase, shown_id
from executorlib.launchers.contract import Events

logger = logging.getLogger("executorlib")

# A job: its id, and its index in the job array; None for a plain job, or for the whole array.
JobKey: TypeAlias = tuple[str, int | None]
# Plain jobs are at index 0. A state at None is that of all elements that have none of their own.
States: TypeAlias = Mapping[JobKey, JobState]


class Refused(Exception):
    """A batch was not taken.

    Args:
        text: What the system said.
        transient: Whether the same may be taken a little later.
        limit: Whose jobs fill the limit, where there would be more than the system lets in at once.
    """

    def __init__(self, text: str, transient: bool = False, limit: Limit = Limit.NONE) -> None:
        super().__init__(text)
        self.transient = transient
        self.limit = limit


class JobSystem(Protocol):
    """Takes batches of calls. All answers come by callbacks, in the loop's thread, and nothing blocks.

    Attributes:
        name: Which system it is, for error texts and for those who meet its jobs in a cache directory. Of the systems
            that may share one, each has its own; known from `prepare` on.
        first_query: Seconds between a change and the next query for states, which then takes longer and longer.
        last_query: Most seconds between two queries.
    """

    name: str
    first_query: float
    last_query: float

    @property
    def array_limit(self) -> int:
        """Most calls in one batch."""
        ...

    @property
    def element_variables(self) -> tuple[str, ...]:
        """See `Queue.element_variables`."""
        ...

    def can_wait_for(self, dependency: Dependency) -> bool:
        """Whether a batch may have this dependency; where not, it waits in this session for the job's result."""
        ...

    def about(self) -> dict[str, str]:
        """What `is_gone` wants to know of this system, in another session."""
        ...

    def is_gone(self, owner: Mapping[str, Any]) -> bool:
        """Whether another system of this kind is known to be gone, and all of its jobs with it.

        Args:
            owner: What a session noted of itself and that system: ``host``, and what `about` said.
        """
        ...

    def resume(self) -> None:
        """Continue what runs the jobs, where that is a process which may have been suspended."""
        ...

    @property
    def busy(self) -> bool:
        """Whether it waits for an answer."""
        ...

    def listen(self, on_change: Callable[[], None]) -> None:
        """Call back whenever the states of jobs have changed, where the system tells of that by itself."""
        ...

    def prepare(self, on_ready: Callable[[], None]) -> None:
        """Find out what there is to know of the system; the attributes hold from ``on_ready`` on."""
        ...

    def setup(self) -> dict[str, Any]:
        """What jobs have to set up to see this process as it is now, beyond what the system does; see `set_up`.

        Also ``id_variables`` and ``local_rank_variables``; see the attributes of `Queue` of these names.
        """
        ...

    def submit(self, batch: Batch, on_done: Callable[[str | Refused], None]) -> None:
        """Submit a batch whose directory is complete but for the script; answers with the job's id."""
        ...

    def query(self, job_ids: Sequence[str], on_states: Callable[[States | None], None]) -> None:
        """Ask for the states of these jobs; absent ones are gone. Answers with None where there is no answer now.

        The answer may tell of other jobs of the user's, too.
        """
        ...

    def detail(self, job: JobKey, on_state: Callable[[JobState | None], None]) -> None:
        """Ask what became of a job that is gone."""
        ...

    def cause_in(self, output: str) -> Cause:
        """Why a job ended, by what the system wrote at the end of its output; see `Queue.cause_in`."""
        ...

    def cancel(self, jobs: Sequence[JobKey]) -> None:
        """Cancel jobs; those that are gone already do not matter."""
        ...

    def close(self) -> None:
        """Let go of everything; jobs go on."""
        ...


def ask_whether_more_may_end(system: JobSystem, refusal: Refused, own: bool, on_known: Callable[[bool], None]) -> None:
    """Find out whether there are jobs whose end would make room under a limit that a submission has met.

    Args:
        system: The system.
        refusal: What it said.
        own: Whether it has jobs of this session.
        on_known: Is told. Where the system does not answer, there may be some.
    """
    if own or refusal.limit is Limit.SHARED:
        on_known(True)
    else:
        # Of this user's other sessions and programs.
        system.query(
            [],
            lambda states: on_known(states is None or any(state.phase is not Phase.ENDED for state in states.values())),
        )


class Cancellations:
    """Gathers jobs that are to be cancelled, so that those of one turn of the loop are one request.

    Args:
        events: The loop.
        system: Has the jobs.
    """

    def __init__(self, events: Events, system: JobSystem) -> None:
        self._events = events
        self._system = system
        self._jobs: list[JobKey] = []

    @property
    def pending(self) -> bool:
        """Whether any have not been asked for yet."""
        return bool(self._jobs)

    def add(self, job: JobKey) -> None:
        """Cancel a job, in a moment."""
        self._jobs.append(job)
        if len(self._jobs) == 1:
            self._events.call_later(0.0, self._send)

    def _send(self) -> None:
        jobs, self._jobs = self._jobs, []
        self._system.cancel(jobs)


class Holds:
    """Tells the user, once for each job, that an administrator holds it."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def note(self, who: str, job: JobKey, state: JobState) -> None:
        """What the system says of a job.

        Args:
            who: What waits for it.
            job: The job; of an array, one is named for all.
            state: Its state.
        """
        job_id, index = job
        if state.held and job_id not in self._told:
            self._told.add(job_id)
            logger.warning(
                "%s waits: an administrator holds its job %s (%s). It starts when they release it; they know why they "
                "hold it.",
                who,
                shown_id(job_id, index),
                state.reason,
            )
