"""What runs jobs, as `launchers.jobs` sees it: it takes batches, says how its jobs are, and cancels them."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

from executorlib.launchers.contract import Events
from executorlib.launchers.queue import Batch, Cause, JobState, Limit, Phase, Queue
from executorlib.launchers.subprocesses import Answer, Commands
from executorlib.launchers.templates import warn_of_unused

logger = logging.getLogger("executorlib")

# How long a system may not answer before the user is told, in seconds. Controllers are restarted now and then.
_SILENT_SECONDS = 30.0
# Seconds between two questions to a history that does not know of a job's end yet.
_HISTORY_SECONDS = 2.0

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

    def can_wait_for(self, job_id: str) -> bool:
        """Whether a batch may depend on this job; where not, it waits in this session for the job's result."""
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

        Also ``id_variables``, where jobs are told their ids; see `Queue.id_variables`.
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
                job_id if index is None else f"{job_id}_{index}",
                state.reason,
            )


class Silence:
    """Tells the user, once, that a system does not answer, and once that it does again.

    Args:
        name: The system.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._since: float | None = None
        self._told = False

    def failed(self, asked: float, now: float, said: str) -> None:
        """A query was not answered.

        Args:
            asked: When it was asked.
            now: When that was known.
            said: What came instead of an answer.
        """
        if self._since is None:
            self._since = asked
        if not self._told and now - self._since >= _SILENT_SECONDS:
            self._told = True
            logger.warning(
                "%s has not said for %.0f s how its jobs are: %s. Jobs go on, and their results are found; only those "
                "that end without one are not noticed until it answers. It is asked again and again.",
                self._name,
                now - self._since,
                said,
            )

    def answered(self) -> None:
        """A query was answered."""
        if self._told:
            logger.warning("%s answers again", self._name)
        self._since, self._told = None, False


class CommandSystem:
    """A batch queue that is driven by its commands.

    Args:
        events: The loop.
        name: What it is called until its queue is known, which has a name.
        make_queue: Makes the queue's language, given what `settings_command` said.
        settings_command: Asks once what there is to know of the system; empty for nothing.
        environment: Makes the environment of the commands from this process's.
    """

    # Results need no query, and errors are to be known within 15 s.
    first_query = 2.0
    last_query = 10.0

    def __init__(
        self,
        events: Events,
        name: str,
        make_queue: Callable[[str], Queue],
        settings_command: list[str],
        environment: Callable[[Mapping[str, str]], dict[str, str]] = dict,
    ) -> None:
        self.name = name
        self._events = events
        self._commands = Commands(events)
        self._environment = environment
        self._make_queue = make_queue
        self._settings_command = settings_command
        self._queue: Queue | None = None
        if not settings_command:
            self._use(make_queue(""))
        self._waiting: list[Callable[[], None]] = []
        self._warned: set[str] = set()
        self._problem = ""
        self._silence = Silence(name)

    def _use(self, queue: Queue) -> None:
        self._queue, self.name = queue, queue.name

    @property
    def array_limit(self) -> int:
        """See `JobSystem`; known from the first answer on."""
        return self._queue.array_limit if self._queue is not None else 1

    def can_wait_for(self, job_id: str) -> bool:
        """See `JobSystem.can_wait_for`."""
        return self._queue is not None and self._queue.has_dependencies

    def resume(self) -> None:
        """See `JobSystem.resume`; the system is none of ours."""

    @property
    def busy(self) -> bool:
        """See `JobSystem.busy`."""
        return self._commands.busy

    def about(self) -> dict[str, str]:
        """See `JobSystem.about`."""
        return {}

    def is_gone(self, owner: Mapping[str, Any]) -> bool:
        """See `JobSystem.is_gone`; clusters stay."""
        return False

    def listen(self, on_change: Callable[[], None]) -> None:
        """See `JobSystem.listen`; queues tell nothing by themselves."""

    def prepare(self, on_ready: Callable[[], None]) -> None:
        """Ask for the settings; `on_ready` is called once `array_limit` is known."""
        if self._queue is not None:
            on_ready()
            return
        self._waiting.append(on_ready)
        if len(self._waiting) > 1:
            return

        def know(answer: Answer) -> None:
            # Without an answer the system's defaults are assumed; the submission will say what is wrong.
            try:
                self._use(self._make_queue(answer.output if answer.ok else ""))
            except Exception as error:  # pysqa's, or of what it loads
                self._problem = f"{type(error).__name__}: {error}"
            waiting, self._waiting = self._waiting, []
            for callback in waiting:
                callback()

        self._run(self._settings_command, know)

    def setup(self) -> dict[str, Any]:
        """See `JobSystem.setup`; queues hand on the environment themselves."""
        return {} if self._queue is None else {"id_variables": self._queue.id_variables}

    def _run(self, argv: list[str], on_answer: Callable[[Answer], None], cwd: str | None = None) -> None:
        self._commands.run(argv, on_answer, cwd=cwd, env=self._environment(os.environ))

    def submit(self, batch: Batch, on_done: Callable[[str | Refused], None]) -> None:
        """See `JobSystem.submit`."""
        queue = self._queue
        if queue is None:
            on_done(Refused(self._problem))
            return
        path = os.path.join(batch.directory, "job.sh")
        try:
            with open(path, "w", encoding="utf-8") as file:
                file.write(queue.script(batch))
            warn_of_unused(queue.unused(batch), self._warned)
            argv = queue.submit_command(batch, path)
        except (OSError, ValueError, ImportError) as error:
            on_done(Refused(str(error)))
            return
        except Exception as error:  # pysqa's, or of a template's
            on_done(Refused(f"{type(error).__name__}: {error}"))
            return

        def answered(answer: Answer) -> None:
            if not answer.ok:
                transient = answer.code is None or queue.is_transient(answer.text)
                limit = queue.limit_in(answer.text)
                on_done(Refused(f"{argv[0]} refused it: {answer.text}", transient, limit))
                return
            self._tell(argv[0], batch.name, answer.error)
            taken: str | Refused
            try:
                taken = queue.parse_job_id(answer.output)
            except Exception as error:  # whatever it stumbles over, that is no job id
                taken = Refused(f"{argv[0]} was not understood: {error}")
            on_done(taken)

        # Some queues start a job where it was submitted.
        self._run(argv, answered, batch.cwd)

    def _tell(self, program: str, name: str, said: str) -> None:
        """Tell the user, once, what the system said of a job that it took all the same."""
        for line in filter(None, map(str.strip, said.splitlines())):
            words = re.sub(r"\d{3,}", "", line)  # the same, but for a job's number
            if words not in self._warned:
                self._warned.add(words)
                logger.warning("%s took the job of %s and said: %s", program, name, line)

    def query(self, job_ids: Sequence[str], on_states: Callable[[States | None], None]) -> None:
        """See `JobSystem.query`."""
        queue = self._queue
        if queue is None:  # other sessions' jobs, in a system that cannot be used here
            self._events.call_later(0.0, lambda: on_states(None))
            return

        asked = time.monotonic()

        def answered(answer: Answer) -> None:
            states: States | None = None
            said = answer.text
            if answer.ok:
                try:
                    states = queue.parse_status(answer.output, job_ids)
                except Exception as error:  # whatever it stumbles over, that is no answer
                    said = str(error)
            if states is None:
                self._silence.failed(asked, time.monotonic(), said)
            else:
                self._silence.answered()
            on_states(states)

        self._run(queue.status_command(job_ids), answered)

    def detail(self, job: JobKey, on_state: Callable[[JobState | None], None]) -> None:
        """See `JobSystem.detail`."""
        queue = self._queue
        argv = [] if queue is None else queue.detail_command(*job)
        if queue is None or not argv:
            self._events.call_later(0.0, lambda: on_state(None))
            return
        give_up = time.monotonic() + queue.history_delay

        def answered(answer: Answer) -> None:
            state = None
            if answer.ok:
                with contextlib.suppress(Exception):
                    state = queue.parse_detail(answer.output)
            if state is None and time.monotonic() < give_up:
                self._events.call_later(_HISTORY_SECONDS, lambda: self._run(argv, answered))
            else:
                on_state(state)

        self._run(argv, answered)

    def cause_in(self, output: str) -> Cause:
        """See `JobSystem.cause_in`."""
        return Cause.NONE if self._queue is None else self._queue.cause_in(output)

    def cancel(self, jobs: Sequence[JobKey]) -> None:
        """See `JobSystem.cancel`."""
        if self._queue is not None:
            self._run(self._queue.cancel_command(jobs), lambda answer: None)

    def close(self) -> None:
        """See `JobSystem.close`."""
        self._commands.close()
