"""Gathers calls into batches and submits them: as few requests to the system as there can be."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from executorlib import batches, entries, machine
from executorlib.launchers.base import Events, Timer, boot_file
from executorlib.launchers.job import Job, JobBatch
from executorlib.launchers.queue import Batch, Dependency
from executorlib.launchers.systems import JobSystem, Refused
from executorlib.resources import Resources

logger = logging.getLogger("executorlib")

# A batch is submitted when no call was added for so long, in seconds: a loop of `submit` is far quicker ...
_LINGER = 0.02
# ... or when it is so old. Doubles with every batch of one burst, so that requests grow with its logarithm only.
_FIRST_WINDOW, _LAST_WINDOW = 0.5, 16.0
# How long submissions that fail for the moment are repeated, and how long to wait first, in seconds.
_RETRY_SECONDS, _FIRST_RETRY = 300.0, 1.0
# The same for a session that has left, whose process may be about to end.
_LEAVING_SECONDS = 30.0
# How often other machines are told that a batch which waits to be submitted is not forgotten, in seconds.
_HEARTBEAT_SECONDS = 60.0
# More dependencies than these make no command line: such a batch waits here for its inputs.
_MOST_DEPENDENCIES = 100


class _Retry(NamedTuple):
    """A submission that was refused for the moment: since when it is, when to try again, and how long to wait then."""

    since: float
    due: float
    wait: float


class Submitter:
    """Puts jobs into batches and batches into the system.

    Args:
        events: The loop.
        system: Takes batches.
        command: Makes the argument list of a job from the resources of its call and the program that runs it.
        on_submitted: Called when a batch has its job id.
        on_refused: Called when the system does not take a batch.
    """

    def __init__(
        self,
        events: Events,
        system: JobSystem,
        command: Callable[[Resources, list[str]], list[str]],
        on_submitted: Callable[[JobBatch], None],
        on_refused: Callable[[JobBatch, Refused], None],
    ) -> None:
        self._system = system
        self._command = command
        self._on_submitted = on_submitted
        self._on_refused = on_refused
        self._timer = Timer(events, self._submit)
        self._beats = Timer(events, self._beat)
        self._open: dict[Any, JobBatch] = {}  # calls are still added to these, by what the calls have in common
        self._waiting: dict[JobBatch, None] = {}  # not submitted; each is in one of the three that follow as well
        self._pending: dict[JobBatch, None] = {}  # to be looked at when the timer fires
        self._held: dict[Job, dict[JobBatch, None]] = {}  # by jobs of which one has to change before that is of use
        self._submitting: set[JobBatch] = set()
        self._retries: dict[JobBatch, _Retry] = {}
        self._window = _FIRST_WINDOW
        self._last_call = 0.0
        self._number = 0
        self._leaving = False
        self._left_at = 0.0

    @property
    def busy(self) -> bool:
        """Whether any batch is not submitted."""
        return bool(self._waiting)

    def place(self, job: Job, after: list[Job]) -> tuple[JobBatch, int]:
        """Choose the batch that a call is to join, and its index there; `add` is to follow once it can.

        Args:
            job: The call.
            after: Jobs whose results are its inputs and that are not over.

        Raises:
            OSError: The batch's directory cannot be made.
        """
        resources = job.task.resources
        folder = resources.cache_directory
        assert folder is not None
        needs = replace(resources, cache_key=None)
        source = after[0].batch if len(after) == 1 else None
        if source is not None and source.ours:
            # Elements of an array can wait for those of the same index of another.
            first, common = after[0].index, [source.directory]
        else:
            first, common, source = 0, sorted(other.output for other in after), None
        key = (needs, *common)
        batch = self._open.get(key)
        if batch is not None:
            index = batch.first + batch.size
            if index < self._system.array_limit and (source is None or index == first):
                return batch, index
            del self._open[key]
        self._number += 1
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{self._number}-{os.urandom(3).hex()}"
        # Before any entry names it: who finds one wants to know whether the session that is to submit it is there.
        batch = JobBatch(batches.make(folder, name), True, key, first)
        batch.corresponds = source
        batch.after = after
        pid = os.getpid()
        owner = {"system": self._system.name, "host": socket.gethostname(), "pid": pid}
        owner.update(self._system.about())
        owner["started"] = machine.process_start(pid)
        batches.write_text(os.path.join(batch.directory, batches.OWNER_FILE), json.dumps(owner))
        return batch, first

    def add(self, job: Job, batch: JobBatch, index: int) -> None:
        """Add a call to the batch that `place` chose."""
        if not batch.size:
            self._open[batch.key] = batch
            batch.name = job.task.name  # now, as calls are forgotten when the session leaves
            self._waiting[batch] = self._pending[batch] = None
            self._beats.within(_HEARTBEAT_SECONDS)
        elif batch.corresponds is not None:
            source = batch.corresponds.jobs.get(index)
            if source is not None:
                batch.after.append(source)
        job.batch, job.index = batch, index
        batch.jobs[index] = job
        batch.size += 1
        self._last_call = batch.touched = time.monotonic()
        self._timer.within(_LINGER)

    def leave(self) -> None:
        """Submit all that can be, now, and give up what only this session could bring about."""
        self._leaving = True
        self._left_at = time.monotonic()
        self._open.clear()
        self._held.clear()
        self._pending = {batch: None for batch in self._waiting if batch not in self._submitting}
        self._submit()

    def changed(self, job: Job) -> None:
        """A job is over, or the system's number of it has become known: batches may have waited for that."""
        held = self._held.pop(job, {})
        if job.over and job.batch in self._waiting:
            held[job.batch] = None  # it may have been the last of its batch
        if held:
            self._pending.update(held)
            self._timer.within(0.0)

    def _submit(self) -> None:
        """Submit batches that are complete and whose inputs have been submitted."""
        now = time.monotonic()
        if now - self._last_call > _LAST_WINDOW:
            self._window = _FIRST_WINDOW
        for batch in list(self._pending):
            retry = self._retries.get(batch)
            if retry is not None and now < retry.due:
                self._timer.within(retry.due - now)
                continue
            if self._open.get(batch.key) is batch:
                if not self._is_complete(batch, now):
                    self._timer.within(_LINGER)
                    continue
                del self._open[batch.key]
            self._pending.pop(batch, None)
            if batch in self._waiting and batch not in self._submitting:
                self._submit_one(batch)

    def _beat(self) -> None:
        """Sessions on other machines take a batch that nobody submits for one of a session that has died."""
        for batch in self._waiting:
            with contextlib.suppress(OSError):
                os.utime(batch.directory)
        if self._waiting:
            self._beats.within(_HEARTBEAT_SECONDS)

    def _is_complete(self, batch: JobBatch, now: float) -> bool:
        if now - batch.touched >= _LINGER:
            return True
        if now - batch.made < self._window:
            return False
        self._window = min(2 * self._window, _LAST_WINDOW)
        return True

    def _submit_one(self, batch: JobBatch) -> None:
        if not batch.jobs:  # all were cancelled
            del self._waiting[batch]
            shutil.rmtree(batch.directory, ignore_errors=True)
            return
        dependencies, missing = self._dependencies(batch)
        if missing and self._leaving:
            missing = [job for job in batch.after if not job.over and job.batch in self._waiting]
            if not missing:
                del self._waiting[batch]
                for job in batch.jobs.values():
                    with contextlib.suppress(OSError):
                        entries.remove_input(job.path)
                    self.changed(job)
                return
        if missing:
            for job in missing:
                self._held.setdefault(job, {})[batch] = None
            return
        try:
            submission = self._made_ready(batch, tuple(dependencies))
        except Exception as error:  # of the file system, mostly
            self._answered(batch, Refused(f"its batch directory {batch.directory} cannot be written: {error}"))
            return
        self._submitting.add(batch)
        self._system.submit(submission, lambda answer: self._answered(batch, answer))

    def _made_ready(self, batch: JobBatch, dependencies: tuple[Dependency, ...]) -> Batch:
        """Write a batch's files and describe it to the system."""
        batch.is_array = batch.size > 1 or batch.first > 0
        task = next(iter(batch.jobs.values())).task
        resources = task.resources
        program = self._write_files(batch, resources)
        name = batch.name if batch.size == 1 else f"{batch.name} and {batch.size - 1} more"
        return Batch(
            name=name,
            directory=batch.directory,
            command=shlex.join(self._command(resources, program)),
            count=batch.size,
            first=batch.first,
            resources=resources,
            template_values=resources.template_values,
            cwd=resources.cwd or os.path.expanduser("~"),
            dependencies=dependencies,
        )

    def _dependencies(self, batch: JobBatch) -> tuple[list[Dependency], list[Job]]:
        """What a batch has to wait for in the system; and jobs of which one has to change before it can be submitted.

        The latter are empty where it can be submitted now.
        """
        pending = [job for job in batch.after if not job.over]
        if not pending:
            return [], []
        for job in pending:
            if job.batch is None or job.batch.job_id is None or not self._system.can_wait_for(job.batch.job_id):
                return [], [job]
        source = batch.corresponds
        if source is not None and source.job_id is not None and source.is_array:
            if batch.size == 1:
                return [Dependency(source.job_id, batch.first)], []
            return [Dependency(source.job_id, corresponding=True)], []
        dependencies: list[Dependency] = []
        for other in dict.fromkeys(job.batch for job in pending if job.batch is not None):
            its = [job for job in batch.after if job.batch is other]
            if other.is_array and other.job_id is not None and len(its) == other.size:
                dependencies.append(Dependency(other.job_id))  # all of an array is named by its id alone
            else:
                dependencies += [Dependency(*job.key) for job in its if not job.over]
        return dependencies, ([] if len(dependencies) <= _MOST_DEPENDENCIES else pending)

    def _write_files(self, batch: JobBatch, resources: Resources) -> list[str]:
        """Fill the batch's directory; returns the program that runs one of its jobs."""
        program = os.path.join(batch.directory, "run.py")
        setup = {**self._system.setup(), "threads": resources.threads_per_core, "ranks": resources.cores}
        setup["gpus_per_rank"] = resources.gpus_per_core
        if resources.cwd is not None:
            setup["cwd"] = resources.cwd
        with open(os.path.join(batch.directory, batches.SETUP_FILE), "wb") as setup_file:
            pickle.dump(setup, setup_file)
        for name, text in (
            (batches.ENTRIES_FILE, "".join(f"{index} {job.path}\n" for index, job in batch.jobs.items())),
            ("run.py", boot_file("executorlib.worker.job", f"({batch.directory!r})")),
        ):
            with open(os.path.join(batch.directory, name), "w", encoding="utf-8") as file:
                file.write(text)
        return [sys.executable, program]

    def _answered(self, batch: JobBatch, answer: str | Refused) -> None:
        self._submitting.discard(batch)
        now = time.monotonic()
        if batch in self._retries:
            # A system that did not answer in time may have taken the batch all the same, and its jobs may have begun.
            noted = None
            with contextlib.suppress(OSError, ValueError):
                noted = batches.read_text(batch.directory, batches.JOB_ID_FILE)
            if noted is not None and noted != answer:
                if not isinstance(answer, Refused):
                    self._system.cancel([(answer, None)])
                answer = noted
        if isinstance(answer, Refused):
            retry = self._retries.get(batch) or _Retry(now, now, _FIRST_RETRY)
            limit = _LEAVING_SECONDS if self._leaving else _RETRY_SECONDS
            if answer.transient and now + retry.wait - max(retry.since, self._left_at) < limit:
                if retry.since == now:
                    logger.warning("%s; trying again for %g s", answer, limit)
                self._retries[batch] = _Retry(retry.since, now + retry.wait, 2 * retry.wait)
                self._pending[batch] = None
                self._timer.within(retry.wait)
                return
        del self._waiting[batch]
        self._retries.pop(batch, None)
        if isinstance(answer, Refused):
            shutil.rmtree(batch.directory, ignore_errors=True)
            self._on_refused(batch, answer)
            return
        batch.job_id = answer
        try:
            batches.write_text(os.path.join(batch.directory, batches.JOB_ID_FILE), answer)
        except Exception as error:  # its jobs run all the same
            logger.warning("the id of job %s cannot be noted in %s: %s", answer, batch.directory, error)
        if batch.cancelled:
            self._system.cancel([(answer, index if batch.is_array else None) for index in sorted(batch.cancelled)])
        # Of no use any more, and a chain of calls would be kept by its last one.
        batch.after.clear()
        batch.corresponds = None
        if not batch.jobs:  # all were cancelled meanwhile
            batch.remove_files()
        for job in batch.jobs.values():
            self.changed(job)
        self._on_submitted(batch)
