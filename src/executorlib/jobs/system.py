"""The interface of a system, for calls and workers: it takes batches, tells the states of jobs, and cancels them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from executorlib.jobs.queue import Cause, Dependency, JobState, Limit, Phase, Submission
from executorlib.launchers.contract import Events

# A job: its id, and its index in the job array. The index is None for a plain job, or for the whole array.
JobKey: TypeAlias = tuple[str, int | None]
# Plain jobs have the index 0. A state at None is that of all elements without a state of their own.
States: TypeAlias = Mapping[JobKey, JobState]


class Refused(Exception):
    """The system did not take a submission.

    Args:
        text: The system's message.
        transient: Whether the system may take the same batch a little later.
        limit: Whose jobs count under the limit, if there would be more jobs than the system admits at once.
    """

    def __init__(self, text: str, transient: bool = False, limit: Limit = Limit.NONE) -> None:
        super().__init__(text)
        self.transient = transient
        self.limit = limit


class BatchSystem:
    """Takes batches of calls. All answers come through callbacks in the loop's thread, and nothing blocks.

    The defaults suit a cluster without job arrays and dependencies that reports only when asked.

    Attributes:
        name: The system's name, for error texts and for sessions that find its jobs in a cache directory. Systems that
            may share a directory have different names. It is known from `prepare` on.
        first_query: Seconds from a change to the next query for states. Further pauses become longer and longer.
        last_query: Most seconds between two queries.
    """

    name: str
    first_query: float
    last_query: float

    @property
    def array_limit(self) -> int:
        """Most calls in one submission."""
        return 1

    @property
    def element_variables(self) -> tuple[str, ...]:
        """The variables that hold a job's index in its array, as for `Dialect.element_variables`."""
        return ()

    def can_wait_for(self, dependency: Dependency) -> bool:
        """Return whether a batch may have this dependency; otherwise it waits in this session for the job's result."""
        return False

    def about(self) -> dict[str, str]:
        """The facts about this system that `is_gone` needs in another session."""
        return {}

    def is_gone(self, owner: Mapping[str, Any]) -> bool:
        """Return whether another system of this kind is known to be gone, with all of its jobs.

        Args:
            owner: A session's record of itself and that system: ``host``, and the facts from `about`.
        """
        return False

    def resume(self) -> None:
        """Continue the process that runs the jobs, if there is one that may have been suspended."""

    @property
    def busy(self) -> bool:
        """True while an answer is awaited."""
        return False

    def listen(self, on_change: Callable[[], None]) -> None:
        """Call back whenever the states of jobs have changed, if the system reports that by itself."""

    def prepare(self, on_ready: Callable[[], None]) -> None:
        """Find out the system's settings; the attributes hold from ``on_ready`` on."""
        on_ready()

    def setup(self) -> dict[str, Any]:
        """The settings, for `worker.call.set_up`, with which jobs see this process as it is now.

        Settings that the system hands on by itself are left out. ``id_variables`` and ``local_rank_variables`` are
        included, as in `Dialect`.
        """
        return {}

    def submit(self, submission: Submission, on_done: Callable[[str | Refused], None]) -> None:
        """Submit a batch whose directory is complete except for the script; the answer is the job's id."""
        raise NotImplementedError

    def query(self, job_ids: Sequence[str], on_states: Callable[[States | None], None]) -> None:
        """Ask for the states of these jobs; jobs absent from the answer are gone.

        The answer may include other jobs of the user. It is None if the system does not answer now.
        """
        raise NotImplementedError

    def detail(self, job: JobKey, on_state: Callable[[JobState | None], None]) -> None:
        """Ask for the end of a job that is gone."""
        raise NotImplementedError

    def cause_in(self, output: str) -> Cause:
        """Return why a job ended, if the system has written it at the end of the job's output."""
        return Cause.NONE

    def cancel(self, jobs: Sequence[JobKey]) -> None:
        """Cancel jobs; some may be gone already."""
        raise NotImplementedError

    def close(self) -> None:
        """Release all resources; jobs go on."""
        raise NotImplementedError


def ask_whether_more_may_end(
    system: BatchSystem, refusal: Refused, own: bool, on_known: Callable[[bool], None]
) -> None:
    """Find out whether there are jobs whose end would make room under a limit that a submission has met.

    Args:
        system: The system.
        refusal: The system's refusal.
        own: Whether the system has jobs of this session, or has room for fewer jobs.
        on_known: Called with the answer, which is true if the system does not answer.
    """
    if own or refusal.limit is Limit.SHARED:
        on_known(True)
    else:
        # The user's other sessions and programs may have jobs.
        system.query(
            [],
            lambda states: on_known(states is None or any(state.phase is not Phase.ENDED for state in states.values())),
        )


class Cancellations:
    """Gathers the jobs that are cancelled in one turn of the loop, so that they make one request.

    Args:
        events: The loop.
        system: The system that has the jobs.
    """

    def __init__(self, events: Events, system: BatchSystem) -> None:
        self._events = events
        self._system = system
        self._jobs: list[JobKey] = []

    @property
    def pending(self) -> bool:
        """True while any cancellation has not been requested."""
        return bool(self._jobs)

    def add(self, job: JobKey) -> None:
        """Cancel a job in a moment."""
        self._jobs.append(job)
        if len(self._jobs) == 1:
            self._events.call_later(0.0, self._send)

    def _send(self) -> None:
        jobs, self._jobs = self._jobs, []
        self._system.cancel(jobs)
