"""Decides who runs a call: this session, which claims the call's entry, or another one, whose job is then followed.

A call is claimed by putting its entry in place, which only one session can do. The entry names the batch directory of
that session, where others find who it is and which job runs the call. If that session or its job is dead, the entry is
taken over, and the call is claimed again.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
from collections import deque
from collections.abc import Callable

from executorlib.cache import batch_directory, entries, trust
from executorlib.core.task import CallFuture, Task
from executorlib.errors import ExecutorlibSocketError, advise_unpicklable
from executorlib.futures.inputs import misplaced
from executorlib.jobs.batch import SUBMIT_SECONDS, Batch, owner_of
from executorlib.jobs.delivery import Entries
from executorlib.jobs.job import FOLLOWING, UNCLAIMED, Identity, Job, identity_of
from executorlib.jobs.queue import same_system
from executorlib.jobs.submitter import Submitter
from executorlib.jobs.system import BatchSystem
from executorlib.jobs.table import JobTable
from executorlib.launchers.contract import Events, Exit, Process, Timer

logger = logging.getLogger("executorlib")

# Seconds that an entry may exist without being readable. Entries are put in place whole, but on file systems without
# hard links an empty one precedes them for a moment.
_UNREADABLE_SECONDS = 5.0
# How often a call may become another one while it is pickled, because a thread keeps changing its inputs.
_MOST_CHANGES = 10


class Claims:
    """Claims calls, and follows those that other sessions have claimed.

    Args:
        events: The loop.
        delivery: Names calls and their inputs.
        system: The system that runs the jobs.
        submitter: Takes the calls that are claimed.
        jobs: The jobs of this session.
        on_followed: Called when another job is followed.
        log_sizes: Whether to log the size of each call.
    """

    def __init__(
        self,
        events: Events,
        delivery: Entries,
        system: BatchSystem,
        submitter: Submitter,
        jobs: JobTable,
        on_followed: Callable[[], None],
        log_sizes: bool,
    ) -> None:
        self._delivery = delivery
        self._system = system
        self._submitter = submitter
        self._jobs = jobs
        self._on_followed = on_followed
        self._log_sizes = log_sizes
        self._told: set[int] = set()  # calls that wait for another system, as the user has been told
        self._roots: set[str] = set()  # cache directories
        self._renewals = Timer(events, self._renew_views)
        self._to_renew: deque[Job] = deque()
        self._reruns = Timer(events, self._run_dead_again)
        self._to_run_again: deque[Job] = deque()
        self._dead: dict[Job, Batch] = {}  # the same calls, and their batches, whose sessions ended too early

    def start(self, process: Process, task: Task, changes: int = 0) -> None:
        """Follow the job that runs an equal call already, or have the call run.

        Args:
            process: The worker that its job will stand for.
            task: The call.
            changes: How often it has become another one while it was pickled.
        """
        assert task.cache_path is not None
        job = Job(process, task, entries.input_of(task.cache_path), changes)
        self._jobs.add(job)
        twin = self._jobs.first(job.output)
        if twin is not None and twin.batch is not None:
            # This session has the same call already. One job resolves both.
            self._follow_twin(job, twin)
        else:
            self._jobs.attempt(job, self._claim)

    def reclaim(self, job: Job, dead: str | None) -> None:
        """Run a call again after its job died, or ran something else.

        Args:
            job: The call.
            dead: The directory of that job's batch, for which the entry may still be claimed.
        """
        self._jobs.free(job)
        if dead is not None:
            entries.take_over(job.path, entries.job_name(job.path, dead), dead, job.root)
        self._jobs.attempt(job, self._claim)

    def run_again(self, job: Job) -> None:
        """Run a call again after another session's job left no result, unless the call was terminated.

        Nobody saw that job end. The call is free for one of the sessions that notice it now.
        """
        dead = None if job.batch is None else job.batch.directory
        if dead is not None and entries.is_terminated(job.path, dead, job.root):
            text = f"Call {job.task.number} of {job.task.name} was terminated (`terminate_task_in_cache`)"
            self._jobs.end(job, Exit(None, "", ExecutorlibSocketError(f"{text}; it can be submitted again.")))
        else:
            self.reclaim(job, dead)

    def close(self) -> None:
        """Remove folders that are empty now."""
        for root in self._roots:
            batch_directory.remove_folder(root)

    # -- claiming -------------------------------------------------------------------------------------------------

    def _claim(self, job: Job) -> None:
        """Put the call's entry in place, or follow the session that has done so."""
        task = job.task
        twin = self._own_job(job)
        if twin is not None:
            self._follow_twin(job, twin)
            return
        batch = None
        try:
            if os.path.exists(job.path) and self._follow_owner(job):
                return
            try:
                values = self._pickled(task)
            except BaseException as error:  # the user's objects may raise anything
                hidden = misplaced(task.fn, task.args, task.kwargs)
                self._jobs.end(job, Exit(None, "", advise_unpicklable(error, task.number, task.name, hidden)))
                return
            # The job runs what was pickled just now, so the entry has to be named by the key of that.
            if self._delivery.is_changed(task):
                self._start_as_another(job)
                return
            inputs = [first for path in task.after if (first := self._jobs.first(path)) is not None]
            batch, index = self._submitter.place(job, [other for other in inputs if not other.over])
            self._roots.add(batch_directory.root_of(batch.directory))
            values["batch"] = entries.Snapshot.of(batch.directory)
            # Two tries: after the first one the entry may be finished, or removed, before its owner is looked up.
            for _ in range(2):
                if self._put_in_place(job, values, batch, index) or self._follow_owner(job):
                    return
        finally:
            if batch is not None and not batch.size:
                batch.remove_files()
        text = (
            f"another session keeps claiming its entry {job.path} and giving it up. Look for other programs that use "
            f"the cache directory {job.root}, and submit the call again"
        )
        self._jobs.end(job, Exit(None, text))

    def _pickled(self, task: Task) -> dict[str, entries.Snapshot]:
        """Pickle a call for its entry.

        Raises:
            BaseException: Whatever the pickling raises.
        """
        args, kwargs = self._delivery.inputs_of(task)
        values = {
            "function": task.fn,
            "input_args": list(args),
            "input_kwargs": kwargs,
            "resource_dict": task.resources.as_dict(),
            **({} if task.key is None else {"key": list(task.key)}),
        }
        return {name: entries.Snapshot.of(value) for name, value in values.items()}

    def _start_as_another(self, job: Job) -> None:
        """Start again with a call that became another one, with another key, between its look-up and its pickling."""
        task = job.task
        if job.state is not UNCLAIMED:  # it was followed, so its dependents know it by its key
            raise ExecutorlibSocketError(
                f"Call {task.number} of {task.name} was not run: the job that it waited for left no result, and its "
                "own function or inputs were changed since it was submitted. Submit it again, with copies of objects "
                "that you go on changing."
            )
        if job.changes == _MOST_CHANGES:
            raise ExecutorlibSocketError(
                f"Call {task.number} of {task.name} was not run: its inputs changed {job.changes} times while they "
                "were being submitted. Submit copies of objects that another thread goes on changing (array.copy())."
            )
        self._jobs.leave(job)
        self.start(job.process, task, job.changes + 1)

    def _put_in_place(self, job: Job, values: dict[str, entries.Snapshot], batch: Batch, index: int) -> bool:
        """Claim the call and submit it; False if it has an entry already."""
        if not entries.write_input(job.path, values, job.root):
            return False
        try:
            self._on_claimed(job, batch, index)
        except BaseException:
            # Other sessions would wait for ever: the entry names a batch that never has it.
            with contextlib.suppress(OSError):
                entries.remove_input(job.path, job.root)
            raise
        return True

    def _on_claimed(self, job: Job, batch: Batch, index: int) -> None:
        """Submit the call, whose entry is in place, unless its result is there after all."""
        task = job.task
        if self._log_sizes:
            size = os.path.getsize(job.path)
            logger.warning("call %d of %s: sent %d bytes", task.number, task.name, size)
        # A network file system may have answered the look-up from its memory.
        is_done = job.is_on_local_disk or trust.is_there(job.output)
        seen = identity_of(job.output) if is_done else None
        ending = None if seen is None else entries.read_ending(job.output, job.root)
        job.passed_over = None if ending is not None and ending.kept else seen
        if ending is not None and not ending.kept:
            trust.remove(job.output, job.root)  # others who waited for it have had enough time
        elif ending is not None:
            # Another session's job has ended, and removed its entry, since the call was looked up.
            entries.remove_input(job.path, job.root)
            self._follow(job, None, 0)
            return
        self._submitter.add(job, batch, index)
        self._jobs.make_first(job)
        if isinstance(task.future, CallFuture) and task.future._stored is not None:
            task.future._stored.call.batch = batch.directory

    # -- following ------------------------------------------------------------------------------------------------

    def _follow_owner(self, job: Job) -> bool:
        """Follow the session that has claimed the call; False if this session can try again to claim it."""
        entry = entries.read_input(job.path, job.root)
        if entry is None and not os.path.exists(job.path) and trust.is_there(job.path):
            entry = entries.read_input(job.path, job.root)
        if entry is None:
            if job.may_be_done():
                self._look_again_at_entry(job, identity_of(job.path))
                return True
            return trust.is_there(job.path) and self._wait_until_readable(job)
        job.unreadable = None
        directory = entry["batch"]
        own = self._system.name
        owner = {} if directory is None else owner_of(directory)
        if directory is None or not same_system(owner.get("system", own), own):
            if directory is not None and self._system.is_gone(owner):
                return self._take_over(job, entries.job_name(job.path, directory), directory)
            # Nothing is known here about a job of another system, except for its result.
            if job.task.number not in self._told:
                self._told.add(job.task.number)
                logger.warning(
                    "call %d of %s waits for a job of another system (%s). If that job has ended, remove the entry: "
                    "executorlib cache rm --force",
                    job.task.number,
                    job.task.name,
                    owner.get("system", "of an unknown name"),
                )
            self._follow(job, None, 0)
            return True
        batch = self._jobs.batch_of_others(directory)
        index = batch.index_of(job.path) if batch.has_entries else 0
        if index is None:
            self._follow(job, None, 0)
        else:
            self._follow(job, batch, index)
        return True

    def _wait_until_readable(self, job: Job) -> bool:
        """Wait for an entry that is being written, or is damaged; False if it has been damaged for long."""
        seen, now = identity_of(job.path), time.monotonic()
        if seen is None:
            return False
        # This session's clock decides, because others may be wrong.
        if job.unreadable is None or job.unreadable[0] != seen:
            job.unreadable = seen, now
        if now - job.unreadable[1] < _UNREADABLE_SECONDS:
            self._follow(job, None, 0)
            return True
        logger.warning("the entry %s is damaged; call %d claims it anew", job.path, job.task.number)
        return self._take_over(job, f"damaged-{seen}-{os.path.basename(job.path)}")

    def _take_over(self, job: Job, name: str, batch: str | None = None) -> bool:
        """Free a dead entry; returns True to wait, because another session has begun to free it and is not done."""
        seen = identity_of(job.path)
        entries.take_over(job.path, name, batch, job.root)
        if seen is None or seen != identity_of(job.path):
            return False
        self._look_again_at_entry(job, seen)
        return True

    def _look_again_at_entry(self, job: Job, seen: Identity | None) -> None:
        """Follow whoever has the entry, if anybody has, until it is clear whether it stays."""
        if seen is not None:
            job.unreadable = job.unreadable or (seen, time.monotonic())
        self._follow(job, None, 0)

    def _follow(self, job: Job, batch: Batch | None, index: int) -> None:
        job.follow(batch, index)
        if batch is not None and not batch.ours:
            self._roots.add(batch_directory.root_of(batch.directory))
            batch.jobs.setdefault(index, job)
        if self._jobs.first(job.output) is None:
            self._jobs.make_first(job)
        self._submitter.changed(job)
        self._on_followed()

    def _own_job(self, job: Job) -> Job | None:
        """Return the job of this session that runs an equal call."""
        first = self._jobs.first(job.output)
        return None if first is None or first.over or first.batch is None or not first.batch.ours else first

    def _follow_twin(self, job: Job, twin: Job) -> None:
        """Follow the job that an equal call of this session waits for."""
        job.passed_over = twin.passed_over
        self._follow(job, twin.batch, twin.index)

    def find_job_ids(self) -> None:
        """Find out which jobs the calls that other sessions have claimed became."""
        self._dead.clear()
        # Each batch is looked at once, however many of its calls are followed.
        read_ids, is_abandoned = functools.cache(Batch.read_ids), functools.cache(Batch.is_abandoned)
        # Listed first: a job whose place in its batch is not known seems to have an id as soon as others have one.
        unknown = [job for job in self._jobs if job.state is FOLLOWING and job.submitted is None]
        for job in unknown:
            if job.batch is not None and not job.batch.ours:
                self._jobs.attempt(job, lambda job: self._find_job_id(job, read_ids, is_abandoned))
        self._to_run_again = deque(self._dead)
        self._run_dead_again()

    def _find_job_id(self, job: Job, read_ids: Callable[[Batch], bool], is_abandoned: Callable[[Batch], bool]) -> None:
        batch = job.batch
        assert batch is not None
        known = batch.has_entries
        is_submitted = read_ids(batch)
        if batch.has_entries and not known:
            batch.jobs.clear()
        if not is_submitted:
            if is_abandoned(batch):
                self._dead[job] = batch
            return
        # If the list of its calls does not appear, its jobs cannot read it either.
        if not batch.has_entries:
            if trust.is_older(job.path, SUBMIT_SECONDS):
                self._dead[job] = batch
            return
        index = batch.index_of(job.path)
        if index is None:
            job.follow(None, 0)
            return
        job.follow(batch, index)
        batch.jobs.setdefault(index, job)
        if job.submitted is not None:
            self._submitter.changed(job)
        elif is_abandoned(batch):
            self._dead[job] = batch  # it is in a part that has not been submitted

    def _run_dead_again(self) -> None:
        pause = self._jobs.attempt_some(self._to_run_again, self._run_dead_one_again)
        if self._to_run_again:
            self._reruns.within(pause)
        else:
            self._dead.clear()

    def _run_dead_one_again(self, job: Job) -> None:
        if job.state is FOLLOWING and job.batch is self._dead[job]:  # nothing has happened to it meanwhile
            self.run_again(job)

    def renew_views(self) -> None:
        """Make the work of other sessions' jobs visible here, even if the file system remembers an older state."""
        if not self._to_renew:
            self._to_renew.extend(job for job in self._jobs if job.batch is None or not job.batch.ours)
            self._renew_views()

    def _renew_views(self) -> None:
        pause = self._jobs.attempt_some(self._to_renew, self._renew_view)
        if self._to_renew:
            self._renewals.within(pause)

    def _renew_view(self, job: Job) -> None:
        if job.state is FOLLOWING and job.batch is None:
            # Nobody tells whether a job has the entry. If it is removed, or cannot be read, it is free again.
            if self._own_job(job) or job.unreadable is not None or not trust.is_there(job.path):
                self._claim(job)
        # A job removes its entry once its result is there, which the file system may not have heard of yet.
        elif job.state is FOLLOWING and not trust.is_there(job.path) and not job.may_be_done():
            # Its session has seen the job end, or has cancelled it. The local queue, which only knows the jobs of its
            # own session, would not tell.
            self.run_again(job)
