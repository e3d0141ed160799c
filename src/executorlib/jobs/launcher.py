"""Runs calls as jobs of a queuing system, through files in the cache directory.

    call ─▶ entry `_i.h5` ─▶ batch ─▶ job array ─▶ worker.job ─▶ entry `_o.h5` ─▶ call
             (claimed: only one session submits it)

- *Entry*: the call, claimed for its batch. If another session has claimed it, that session's job is followed.
- *Batch*: calls with the same needs that arrive together become one job array, so that one request submits them.
- *Inputs* that are jobs themselves become dependencies in the system, so that the session may end.
- *Results* are found by looking for their files. The system is asked, seldom, only about jobs that leave none.

Files of a batch, in ``<cache directory>/.executorlib/<batch>/``: ``entries`` (index and entry of each call),
``setup`` (settings for the jobs), ``owner`` (the session that submits it), ``run.py``, ``job.sh`` if the system takes a
script, ``job_id``, and ``output.<index>``. If the system takes a batch in parts, each part has its own files, such as
``run.5-9.py`` and ``job_id.5-9``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

from executorlib.core.task import Task
from executorlib.errors import ExecutorlibSocketError
from executorlib.jobs.batch import Batch
from executorlib.jobs.claims import Claims
from executorlib.jobs.delivery import Entries
from executorlib.jobs.job import FOUND, Job
from executorlib.jobs.queue import JobState, Phase
from executorlib.jobs.results import Results
from executorlib.jobs.submitter import Submitter
from executorlib.jobs.system import BatchSystem, Cancellations, Refused
from executorlib.jobs.table import JobTable
from executorlib.jobs.watch import Watch
from executorlib.launchers.contract import Events, Exit, Launcher, Process
from executorlib.resources import Resources

logger = logging.getLogger("executorlib")


class JobLauncher(Launcher):
    """Starts a job for each call.

    Args:
        events: The loop.
        delivery: Names calls and their inputs.
        system: The system that runs the jobs.
        command: Makes the argument list of a job from the resources of its call and the program that runs it.
        log_sizes: Whether to log the size of each call.
    """

    def __init__(
        self,
        events: Events,
        delivery: Entries,
        system: BatchSystem,
        command: Callable[[Resources, list[str]], list[str]],
        log_sizes: bool,
    ) -> None:
        self._events = events
        self._system = system
        self._submitter = Submitter(events, system, command, self._on_submitted, self._on_refused)
        self._jobs = JobTable(events, self._submitter.changed)
        self._claims = Claims(events, delivery, system, self._submitter, self._jobs, self._look_and_ask, log_sizes)
        self._results = Results(events, system, self._jobs, self._claims, self._submitter.changed)
        self._watch = Watch(events, system, self._to_watch, self._on_state)
        self._cancellations = Cancellations(events, system)
        self._prepared = False
        self._early: list[Callable[[], None]] = []  # steps that wait until the system is known

    # -- Launcher -------------------------------------------------------------------------------------------------

    def _on_prepared(self) -> None:
        self._prepared = True
        early, self._early = self._early, []
        for step in early:
            step()

    def launch(self, process: Process) -> None:
        """Claim the call's entry, or follow the session that has claimed it."""
        if not self._prepared:
            # Not earlier: a session that finds all its results need not know the system at all.
            self._early.append(lambda: self.launch(process))
            if len(self._early) == 1:
                self._system.prepare(self._on_prepared)
            return
        (task,) = process.calls
        assert isinstance(task, Task)
        if task.over:  # cancelled meanwhile
            self._events.on_exit(process, Exit(None, "it was cancelled"))
            return
        process.host = self._system.name
        self._claims.start(process, task)

    def kill(self, process: Process, signal_number: int) -> None:
        """Cancel the job, unless an equal call needs it."""
        job = self._jobs.of(process.number)
        if job is None:
            return
        batch = job.batch
        twin = next((other for other in self._jobs.same(job.output) if other is not job), None)
        if twin is not None:
            # If the result is there, the other call finds it by itself.
            if job.state is not FOUND and self._jobs.first(job.output) is job:
                # The batch and the dependents know this record, so it goes on for the other call.
                self._jobs.trade_places(job, twin)
                job = twin
        elif batch is not None and batch.ours:
            if job.submitted is not None:
                self._cancellations.add(job.key)
            else:
                batch.cancelled.add(job.index)  # it may be on its way to the system already
            job.remove_input()
        self._jobs.end(job, Exit(None, "its job was cancelled"))

    def resume(self) -> None:
        """Continue the system's process, if it has one."""
        self._system.resume()

    @property
    def busy(self) -> bool:
        """True while submissions, cancellations or other requests are on their way."""
        return bool(self._early or self._submitter.busy or self._cancellations.pending or self._system.busy)

    def detach(self, on_taken: Callable[[], None]) -> None:
        """Submit the calls that wait for submission, and let all jobs go on."""
        if self._early:
            self._early.append(lambda: self.detach(on_taken))
            return
        self._jobs.leaving = True
        for job in list(self._jobs):
            if job.batch is None or not job.batch.ours or job.submitted is not None:
                self._jobs.leave(job)
        on_taken()
        self._submitter.leave()

    def close(self) -> None:
        """Close the system, and remove folders that are empty now."""
        self._jobs.clear()
        self._system.close()
        self._claims.close()

    # -- answers to submissions -----------------------------------------------------------------------------------

    def _on_submitted(self, batch: Batch) -> None:
        if self._jobs.leaving:
            for job in [job for job in batch.jobs.values() if job.submitted is not None]:
                self._jobs.leave(job)
        self._look_and_ask()

    def _on_refused(self, batch: Batch, refusal: Refused) -> None:
        if self._jobs.leaving:
            logger.error("%s did not accept jobs of this session, which has left: %s", self._system.name, refusal)
        same = [twin for job in batch.jobs.values() for twin in self._jobs.same(job.output)]
        for job in [job for job in same if job.batch is batch and job.submitted is None]:
            job.remove_input()
            text = (
                f"Call {job.task.number} of {job.task.name} was not run: {self._system.name} did not accept its job: "
            )
            self._jobs.end(job, Exit(None, "", ExecutorlibSocketError(f"{text}{refusal}")))

    def _look_and_ask(self) -> None:
        self._results.soon()
        self._watch.soon()

    # -- states in the system -------------------------------------------------------------------------------------

    def _to_watch(self) -> Iterable[Job] | None:
        if self._jobs.leaving or not self._jobs:
            return None
        self._claims.renew_views()
        self._claims.find_job_ids()
        return self._jobs

    def _on_state(self, job: Job, state: JobState | None) -> None:
        self._jobs.attempt(job, lambda job: self._use_state(job, state))

    def _use_state(self, job: Job, state: JobState | None) -> None:
        job.presence.hear(state, time.monotonic())
        if state is None or state.phase is Phase.ENDED:
            return  # the next look for its result decides
        if state.phase is Phase.RUNNING:
            if job.process.transport is None:
                self._results.begin(job)
        elif state.hopeless and not self._results.waits_for_inputs_end(job):
            # This applies to another session's job, too, because that session may have left. With this session's
            # resources the call may be able to start. If not, the new job is ours, and its error says why.
            self._system.cancel([job.key])
            self._results.give_up(job)
