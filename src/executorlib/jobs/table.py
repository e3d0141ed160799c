"""The jobs that a session waits for: finds them, ends them, and does something for many of them in small portions."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator

from executorlib.cache import trust
from executorlib.errors import ExecutorlibSocketError
from executorlib.jobs.batch import Batch
from executorlib.jobs.job import Job
from executorlib.launchers.contract import Events, Exit

# The largest share of the loop's time for looking at files, and most seconds at once, because everything else waits
# meanwhile.
_WAIT_SHARE = 0.1
_AT_ONCE_SECONDS = 0.05


class JobTable:
    """The jobs that are not over, or whose results are not passed on.

    Args:
        events: The loop.
        on_over: Called with each job that is over.

    Attributes:
        leaving: Whether the session ends, so that the files of its jobs stay for others.
    """

    def __init__(self, events: Events, on_over: Callable[[Job], None]) -> None:
        self._events = events
        self._on_over = on_over
        self._jobs: dict[int, Job] = {}  # by the worker's number
        self._same: dict[str, dict[int, Job]] = {}  # the same jobs by their output, then by the worker's number
        self._first: dict[str, Job] = {}  # by output: of several equal calls, the one that was first
        self._followed: dict[str, Batch] = {}  # batches of other sessions, by directory
        self.leaving = False

    def __iter__(self) -> Iterator[Job]:
        return iter(self._jobs.values())

    def __len__(self) -> int:
        return len(self._jobs)

    def __contains__(self, job: object) -> bool:
        return isinstance(job, Job) and self._jobs.get(job.number) is job

    def of(self, number: int) -> Job | None:
        """Return the job of a worker."""
        return self._jobs.get(number)

    def same(self, output: str) -> list[Job]:
        """Return the jobs of equal calls."""
        return list(self._same.get(output, {}).values())

    def first(self, output: str) -> Job | None:
        """Return the job whose batch, if any, runs the equal calls with this output."""
        return self._first.get(output)

    def batch_of_others(self, directory: str) -> Batch:
        """Return the record of another session's batch."""
        return self._followed.setdefault(directory, Batch(directory, ours=False))

    # -- the life of a job ----------------------------------------------------------------------------------------

    def add(self, job: Job) -> None:
        """Wait for a job."""
        self._jobs[job.number] = job
        self._same.setdefault(job.output, {})[job.number] = job

    def make_first(self, job: Job) -> None:
        """Have equal calls follow this one."""
        self._first[job.output] = job

    def trade_places(self, job: Job, other: Job) -> None:
        """Swap the calls of two jobs with the same output."""
        job.trade_places(other)
        self.add(job)
        self.add(other)

    def free(self, job: Job) -> None:
        """Wait for a job as if nothing were known about it."""
        self._remove(job)
        job.free()
        self.add(job)

    def leave(self, job: Job) -> None:
        """Wait no longer for a job, which goes on."""
        self._remove(job)
        job.leave()

    def end(self, job: Job, end: Exit) -> None:
        """Note that a job is over, and tell the loop."""
        job.end()
        self._on_over(job)
        self._remove(job)
        self._events.on_exit(job.process, end)

    def _remove(self, job: Job) -> None:
        self._jobs.pop(job.number, None)
        same = self._same.get(job.output, {})
        same.pop(job.number, None)
        if not same:
            self._same.pop(job.output, None)
        if self._first.get(job.output) is job:
            del self._first[job.output]
        batch = job.batch
        if batch is None or batch.jobs.get(job.index) is not job:
            return
        del batch.jobs[job.index]
        if batch.jobs:
            return
        if not batch.ours:
            self._followed.pop(batch.directory, None)
        if not self.leaving and (batch.ids or not batch.ours):
            batch.remove_files()

    def clear(self) -> None:
        """Forget all jobs."""
        self._jobs.clear()
        self._same.clear()
        self._first.clear()

    # -- steps ----------------------------------------------------------------------------------------------------

    def attempt(self, job: Job, step: Callable[[Job], None]) -> None:
        """Do something for a job, so that damaged files of one job do not affect the others.

        All steps that look into files, or at the system's answers, go through here. An error that is raised after a
        call is over is not about its files, and passes through.
        """
        try:
            step(job)
        except Exception as error:
            if job not in self:
                raise
            if isinstance(error, OSError) and not isinstance(error, trust.UntrustedFile):
                text = f"its entry {job.path} cannot be read or written: {error}"
                call = f"Call {job.task.number} of {job.task.name}"
                self.end(job, Exit(None, text, ExecutorlibSocketError(f"{call} was not run: {text}")))
            else:
                self.end(job, Exit(None, "", error))

    def attempt_some(self, jobs: deque[Job], step: Callable[[Job], None]) -> float:
        """Take jobs from a queue, at least one and as many as a moment allows, and do something for each.

        Jobs that are over by then are left out.

        Returns:
            The seconds for which the loop should do other things now.
        """
        began = time.monotonic()
        while jobs:
            job = jobs.popleft()
            if job in self:
                self.attempt(job, step)
                if time.monotonic() >= began + _AT_ONCE_SECONDS:
                    break
        return (time.monotonic() - began) / _WAIT_SHARE
