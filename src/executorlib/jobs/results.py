"""Finds the results of jobs by looking for their files, and decides which jobs will leave none."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from executorlib.cache import entries
from executorlib.core.task import RUNNING
from executorlib.jobs.claims import Claims
from executorlib.jobs.job import CLAIMED, FOUND, Job, Known, identity_of
from executorlib.jobs.system import BatchSystem
from executorlib.jobs.table import JobTable
from executorlib.launchers.contract import Events, Exit, Timer
from executorlib.worker.job import RAISED, RESULT

# The largest share of a core for looking for results, and the shortest pause between looks, in seconds.
_LOOK_SHARE, _LOOK_SECONDS = 0.01, 0.05
# Seconds that a result may take to appear on a slow file system after its job has ended: if there may well be a result
# (NFS shows files of other machines after up to a minute), and otherwise. There may be one
# - if the exit code says so;
# - if nothing says how the job ended, because the queue forgets jobs at once and keeps no history. This excludes jobs
#   that had ended before this session looked, which is mostly long ago. So with such a queue and a network file system,
#   the error about a job that died takes this long. Giving up a result too early would be worse, because its call would
#   run again.
# Not on local disks, where a missing file does not appear later.
_RESULT_GRACE, _GRACE = 75.0, 3.0


class JobTransport:
    """Takes the place of a connection to a job, whose call is in its file.

    Args:
        on_handed: Called when the call knows that it runs.
    """

    def __init__(self, on_handed: Callable[[], None]) -> None:
        self._on_handed = on_handed

    def put(self, header: Any, frames: Any = ()) -> int:
        """Does nothing: the entry holds everything that a job needs."""
        return 0

    def flush(self) -> None:
        """The call knows that it runs."""
        self._on_handed()


class Results:
    """Looks for results, and passes them on.

    Args:
        events: The loop.
        system: The system that runs the jobs.
        jobs: The jobs of this session.
        claims: Has calls run again whose jobs, of other sessions, leave no result.
        on_found: Called with each job whose result is there.
    """

    def __init__(
        self, events: Events, system: BatchSystem, jobs: JobTable, claims: Claims, on_found: Callable[[Job], None]
    ) -> None:
        self._events = events
        self._system = system
        self._jobs = jobs
        self._claims = claims
        self._on_found = on_found
        self._looks = Timer(events, self._look)
        self._to_look_at: deque[Job] = deque()
        self._ended_now: set[str] = set()  # outputs that will not come, which their dependents do not know yet

    def soon(self) -> None:
        """Look for results soon."""
        self._looks.within(_LOOK_SECONDS)

    def _look(self) -> None:
        if not self._to_look_at:
            self._ended_now.clear()
            self._to_look_at.extend(self._jobs)
        cpu = time.thread_time()
        pause = self._jobs.attempt_some(self._to_look_at, self._look_at)
        if self._jobs:
            # A slow file system makes the loop wait, which takes no processor time.
            self._looks.within(max(_LOOK_SECONDS, (time.thread_time() - cpu) / _LOOK_SHARE, pause))

    def _look_at(self, job: Job) -> None:
        if job.over:
            return
        seen = identity_of(job.output)
        if seen is not None and seen != job.passed_over:
            ending = entries.read_ending(job.output, job.root)
            if ending is not None and (not ending.ran or job.state is CLAIMED):
                self._on_ending(job, ending)
                return
            owner = self._jobs.first(job.output)
            if ending is not None and owner is not None and owner.state is CLAIMED and owner.batch is job.batch:
                return  # the call that ran has to find it first
            job.passed_over = seen  # it is not read again until another file takes its place
            job.damaged = ending is None
            if ending is not None:
                # The job of an equal call has run something else (see `worker.job`). It is over, even if it has not
                # removed its entry yet.
                self._claims.reclaim(job, ending.batch)
                return
        if job.presence.is_gone:
            self._on_gone(job)

    # -- a result -------------------------------------------------------------------------------------------------

    def _on_ending(self, job: Job, ending: entries.Ending) -> None:
        job.find(ending)
        if job.batch is not None:
            job.batch.kept[job.index] = ending.printed
        self._on_found(job)
        if job.process.transport is None:
            self.begin(job)
        elif job.task.state is RUNNING:
            self._deliver(job)
        # Otherwise it is delivered once the call knows that it runs.

    def begin(self, job: Job) -> None:
        """Tell the loop that a call runs."""
        number = job.number  # its record may become another one
        job.process.transport = JobTransport(lambda: self._on_handed(number))
        self._events.on_connected(job.process)

    def _on_handed(self, number: int) -> None:
        """The call knows that it runs, so its result can be passed on if it is there."""
        job = self._jobs.of(number)
        if job is not None and job.state is FOUND:
            # In the next turn, because nothing may come back while calls are being handed out.
            self._events.call_later(0.0, lambda: self._deliver(job))

    def _deliver(self, job: Job) -> None:
        """Pass on the result of a call that knows that it runs, if it is still of interest."""
        ending = job.ending
        if ending is None:
            return
        kind, text = ("error", ending.traceback) if ending.failed else ("result", "")
        more = {"leaving": True, "other": True} if ending.ran else {"leaving": True}
        header = [kind, job.task.number, ending.runtime, text, more]
        self._events.on_message(job.process, header, [ending.data])
        self._jobs.end(job, Exit(0, "it ended"))

    # -- no result ------------------------------------------------------------------------------------------------

    def _on_gone(self, job: Job) -> None:
        """Decide about a job without a result that the system no longer has."""
        presence = job.presence
        if presence.ask():
            self._system.detail(job.key, presence.tell)
        if presence.known is Known.ASKED or not presence.is_gone or self.waits_for_inputs_end(job):
            return
        if job.may_be_done():
            return  # the next look reads it
        if time.monotonic() - presence.since > self._grace(job):
            self.give_up(job)

    @staticmethod
    def _grace(job: Job) -> float:
        """Seconds that the result of a job that has ended may take to appear."""
        if job.damaged or job.is_on_local_disk:
            return _GRACE
        return _RESULT_GRACE if job.ended_well((RESULT, RAISED)) or job.ended_unseen() else _GRACE

    def waits_for_inputs_end(self, job: Job) -> bool:
        """Return whether the job of an input has ended, too, and its end is being looked into, for the error text."""
        inputs = [self._jobs.first(path) for path in job.task.after]
        is_looked_into = any(each is not None and each.presence.is_gone and not each.over for each in inputs)
        return is_looked_into or not self._ended_now.isdisjoint(job.task.after)

    def give_up(self, job: Job) -> None:
        """End the call of a job that leaves no result, or have it run again if another session submitted the job."""
        if job.batch is None or not job.batch.ours:
            self._claims.run_again(job)
            return
        last = job.presence.last
        if not (last is not None and last.hopeless) and job.is_taken_over():
            self._claims.reclaim(job, None)
            return
        job.remove_input()
        self._ended_now.add(job.output)
        self._jobs.end(job, Exit(None, "", job.error(self._system)))
