"""Gathers calls into batches and submits them, with as few requests to the system as possible."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import shlex
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from executorlib import machine
from executorlib.cache import batch_directory, trust
from executorlib.jobs.batch import Batch
from executorlib.jobs.job import Job
from executorlib.jobs.queue import Dependency, Limit, Submission
from executorlib.jobs.room import Retry, Room
from executorlib.jobs.system import BatchSystem, Refused, ask_whether_more_may_end
from executorlib.launchers.boot import boot_file
from executorlib.launchers.contract import Events, Timer
from executorlib.launchers.session import interpreter, settings
from executorlib.resources import Resources

logger = logging.getLogger("executorlib")

# A batch is submitted if no call has been added for this long, in seconds (a loop of `submit` is far quicker) ...
_LINGER = 0.02
# ... or if the batch is this old. It doubles with every batch of a burst, so that the number of requests grows only
# with the logarithm of the number of calls.
_FIRST_WINDOW, _LAST_WINDOW = 0.5, 16.0
# How long a session that has left repeats submissions, in seconds: its process may be about to end.
_LEAVING_SECONDS = 30.0
# Seconds between signs of life that keep sessions on other machines from taking over a waiting batch.
_HEARTBEAT_SECONDS = 60.0
# More dependencies would make the command line too long, so such a batch waits here for its inputs.
_MOST_DEPENDENCIES = 100


class _Part(NamedTuple):
    """Calls of a batch that are submitted together: the whole batch, unless something limits their number.

    Attributes:
        first: The index of the first one.
        last: The index of the last one.
        name: The part's name in the names of its files; empty if it is the whole batch.
    """

    first: int
    last: int
    name: str

    @property
    def size(self) -> int:
        return self.last - self.first + 1


class Submitter:
    """Puts jobs into batches and batches into the system.

    Args:
        events: The loop.
        system: The system that takes batches.
        command: Makes the argument list of a job from the resources of its call and the program that runs it.
        on_submitted: Called when a batch has its job id.
        on_refused: Called when the system does not take a batch.
    """

    def __init__(
        self,
        events: Events,
        system: BatchSystem,
        command: Callable[[Resources, list[str]], list[str]],
        on_submitted: Callable[[Batch], None],
        on_refused: Callable[[Batch, Refused], None],
    ) -> None:
        self._system = system
        self._command = command
        self._on_submitted = on_submitted
        self._on_refused = on_refused
        self._timer = Timer(events, self._submit)
        self._beats = Timer(events, self._beat)
        self._open: dict[Any, Batch] = {}  # batches that still take calls, by `Batch.key`
        self._waiting: dict[Batch, None] = {}  # not submitted; each is also in one of the next three
        self._pending: dict[Batch, None] = {}  # to be looked at when the timer fires
        self._held: dict[Job, dict[Batch, None]] = {}  # by the jobs of which one has to change first
        self._submitting: set[Batch] = set()
        self._retries: dict[Batch, Retry] = {}
        self._rooms: dict[Any, Room] = {}  # by `_limited_by`
        self._in_system: set[Job] = set()  # submitted and not over
        self._window = _FIRST_WINDOW
        self._last_call = 0.0
        self._leaving = False
        self._left_at = 0.0

    @property
    def busy(self) -> bool:
        """True while any batch has not been submitted."""
        return bool(self._waiting)

    def place(self, job: Job, after: list[Job]) -> tuple[Batch, int]:
        """Choose the batch that a call is to join, and its index there; `add` follows once the call has its entry.

        Args:
            job: The call.
            after: The jobs that are not over and whose results are its inputs.

        Raises:
            OSError: The batch's directory cannot be made.
        """
        resources = job.task.resources
        folder = resources.cache_directory
        assert folder is not None
        needs = replace(resources, cache_key=None)
        source = after[0].batch if len(after) == 1 else None
        if source is not None and source.ours:
            # Elements of an array can wait for the elements of the same index of another array.
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
        # Made before any entry names it, so that whoever finds an entry can look up the session that will submit it.
        batch = Batch(batch_directory.make(folder, batch_directory.new_name()), True, key, first)
        batch.corresponds = source
        batch.after = after
        pid = os.getpid()
        owner = {"system": self._system.name, "host": socket.gethostname(), "pid": pid}
        owner.update(self._system.about())
        owner["started"] = machine.process_start(pid)
        batch_directory.write_text(batch.directory, batch_directory.OWNER_FILE, json.dumps(owner))
        return batch, first

    def add(self, job: Job, batch: Batch, index: int) -> None:
        """Add a call to the batch that `place` chose."""
        if not batch.size:
            self._open[batch.key] = batch
            batch.name = job.task.name  # now, because calls are forgotten when the session leaves
            self._waiting[batch] = self._pending[batch] = None
            self._beats.within(_HEARTBEAT_SECONDS)
        elif batch.corresponds is not None:
            source = batch.corresponds.jobs.get(index)
            if source is not None:
                batch.after.append(source)
        job.claim(batch, index)
        batch.jobs[index] = job
        batch.size += 1
        self._last_call = batch.touched = time.monotonic()
        self._timer.within(_LINGER)

    def leave(self) -> None:
        """Submit all calls that can be submitted, and give up those that would need this session later."""
        self._leaving = True
        self._left_at = time.monotonic()
        self._open.clear()
        self._held.clear()
        self._in_system.clear()
        self._pending = {batch: None for batch in self._waiting if batch not in self._submitting}
        self._submit()

    def changed(self, job: Job) -> None:
        """Look again at batches that waited for a job, which is over now, or whose id in the system is known now."""
        held = self._held.pop(job, {})
        if job.over and job in self._in_system:
            self._in_system.discard(job)
            now = time.monotonic()
            for room in self._rooms.values():
                room.ended(now)
                if self._pending:
                    self._timer.within(max(0.0, room.due - now))
        if job.over and job.batch in self._waiting:
            held[job.batch] = None  # it may have been the last call of its batch
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
            room = self._rooms.get(_limited_by(batch))
            size = self._system.array_limit
            if room is not None and batch.jobs:
                if any(self._rooms.get(_limited_by(other)) is room for other in self._submitting):
                    continue  # the answer will tell how much fits
                size = room.size(now)
                if not size:
                    self._timer.within(room.due - now)
                    continue
            self._pending.pop(batch, None)
            if batch in self._waiting and batch not in self._submitting:
                self._submit_one(batch, size)

    def _beat(self) -> None:
        """Give a sign of life: without one, sessions on other machines believe that this session has died."""
        for batch in self._waiting:
            with contextlib.suppress(OSError):
                os.utime(batch.directory)
        if self._waiting:
            self._beats.within(_HEARTBEAT_SECONDS)

    def _is_complete(self, batch: Batch, now: float) -> bool:
        if now - batch.touched >= _LINGER:
            return True
        if now - batch.made < self._window:
            return False
        self._window = min(2 * self._window, _LAST_WINDOW)
        return True

    def _submit_one(self, batch: Batch, most: int) -> None:
        """Submit a batch, or its next part, with at most this many calls."""
        first = next((index for index, job in batch.jobs.items() if job.submitted is None), None)
        if first is None:  # all calls were cancelled
            self._complete(batch)
            return
        last = min(batch.last, first + most - 1)
        last, dependencies, missing = self._dependencies(batch, first, last)
        if missing and self._leaving:
            missing = [job for job in missing if job.batch in self._waiting]
            if not missing:
                given_up = [job for job in batch.jobs.values() if job.submitted is None]
                for job in given_up:
                    job.remove_input()
                self._complete(batch)
                for job in given_up:
                    self.changed(job)
                return
        part = _Part(first, last, "" if last - first + 1 == batch.size else f"{first}-{last}")
        if missing:
            for job in missing:
                self._held.setdefault(job, {})[batch] = None
            return
        try:
            submission = self._made_ready(batch, part, tuple(dependencies))
        except Exception as error:  # mostly from the file system
            refusal = Refused(f"its batch directory {batch.directory} cannot be written: {error}")
            self._answered(batch, part, refusal)
            return
        self._submitting.add(batch)
        self._system.submit(submission, lambda answer: self._answered(batch, part, answer))

    def _complete(self, batch: Batch) -> None:
        """Note that nothing of a batch remains to be submitted."""
        del self._waiting[batch]
        self._retries.pop(batch, None)
        # Not needed any more. They would keep a whole chain of calls alive through its last one.
        batch.after.clear()
        batch.corresponds = None
        if not batch.ids or not batch.jobs:  # it was refused, or all calls were cancelled meanwhile
            batch.remove_files()

    def _made_ready(self, batch: Batch, part: _Part, dependencies: tuple[Dependency, ...]) -> Submission:
        """Write the files of a part of a batch, and describe the part for the system."""
        resources = batch.jobs[part.first].task.resources
        program = self._write_files(batch, part, resources)
        name = batch.name if part.size == 1 else f"{batch.name} and {part.size - 1} more"
        return Submission(
            name=name,
            directory=batch.directory,
            command=shlex.join(self._command(resources, program)),
            count=part.size,
            first=part.first,
            resources=resources,
            template_values=resources.template_values,
            cwd=resources.cwd or os.path.expanduser("~"),
            dependencies=dependencies,
        )

    def _dependencies(self, batch: Batch, first: int, last: int) -> tuple[int, list[Dependency], list[Job]]:
        """Find the jobs that calls of a batch have to wait for in the system.

        Returns:
            The last call that can be submitted with the first; the dependencies; and the jobs of which one has to
            change before a submission is possible, empty if it is possible now.
        """
        pending = [job for job in batch.after if not job.over]
        if batch.corresponds is not None:
            waits = {job.index: job for job in pending}
            last, dependencies, missing = self._corresponding(batch.corresponds, waits, first, last)
            pending = [job for job in pending if first <= job.index <= last]
        else:
            dependencies, missing = self._on_jobs(batch, pending)
        if not missing and not all(map(self._system.can_wait_for, dependencies)):
            return last, [], pending[:1]
        return last, dependencies, missing

    @staticmethod
    def _on_jobs(batch: Batch, pending: list[Job]) -> tuple[list[Dependency], list[Job]]:
        """The second and third value of `_dependencies` if all calls wait for the same jobs."""
        for job in pending:
            if job.submitted is None:
                return [], [job]
        dependencies: list[Dependency] = []
        parts: dict[tuple[Batch, int, int], list[Job]] = {}
        for job in batch.after:
            part = None if job.batch is None else job.batch.ids.part(job.index)
            if job.batch is not None and part is not None:
                parts.setdefault((job.batch, part[0], part[1]), []).append(job)
        for (_, start, end), its in parts.items():
            waits = [job for job in its if not job.over]
            if waits and end and len(its) == end - start + 1:
                dependencies.append(Dependency(waits[0].key[0]))  # the id alone stands for the whole array
            else:
                dependencies += [Dependency(*job.key) for job in waits]
        return dependencies, ([] if len(dependencies) <= _MOST_DEPENDENCIES else pending)

    @staticmethod
    def _corresponding(
        source: Batch, pending: dict[int, Job], first: int, last: int
    ) -> tuple[int, list[Dependency], list[Job]]:
        """The result of `_dependencies` if each call waits for the call of the same index of another batch."""
        part = source.ids.part(first)
        if part is None:
            # Its input has ended without being submitted, or has not been submitted yet.
            last = next((index - 1 for index in range(first + 1, last + 1) if index in pending), last)
            return last, [], ([pending[first]] if first in pending else [])
        last = min(last, part[1])
        if not any(index in pending for index in range(first, last + 1)):
            return last, [], []
        if first == last:
            return last, [Dependency(part[2], first if part[1] else None)], []
        return last, [Dependency(part[2], corresponding=True)], []

    def _write_files(self, batch: Batch, part: _Part, resources: Resources) -> list[str]:
        """Write the files that the jobs of a part need; returns the program that runs one of them."""
        program = f"run.{part.name}.py" if part.name else "run.py"
        text = boot_file("executorlib.worker.job", f"({batch.directory!r}, {part.name!r})")
        batch_directory.write_text(batch.directory, program, text)
        if not batch.ids:  # otherwise jobs may be reading them
            setup = {**self._system.setup(), "threads": resources.threads_per_core, "ranks": resources.cores}
            setup["gpus_per_rank"] = resources.gpus_per_core
            setup["element_variables"] = self._system.element_variables
            setup["settings"] = settings()
            if resources.cwd is not None:
                setup["cwd"] = resources.cwd
            # The file holds the user's environment, which may contain secrets.
            setup_file = os.path.join(batch.directory, batch_directory.SETUP_FILE)
            root = batch_directory.root_of(batch.directory)
            trust.write(setup_file, pickle.dumps(setup), root, mode=trust.PRIVATE_MODE)
            batch_directory.write_entries(batch.directory, {index: job.path for index, job in batch.jobs.items()})
        return [*interpreter(), os.path.join(batch.directory, program)]

    def _settle(self, batch: Batch) -> None:
        """Note that what the system was asked about a batch is answered, for which others may have waited."""
        self._submitting.discard(batch)
        if self._pending and _limited_by(batch) in self._rooms:
            self._timer.within(0.0)

    def _answered(self, batch: Batch, part: _Part, answer: str | Refused) -> None:
        self._settle(batch)
        now = time.monotonic()
        room = self._rooms.get(_limited_by(batch))
        if batch in self._retries or room is not None:
            # A system that did not answer in time may have taken the batch nevertheless, and its jobs may have begun.
            noted = None
            with contextlib.suppress(OSError, ValueError):
                noted = batch_directory.JobIds.read(batch.directory, batch.last).of(part.first)
            if noted is not None and noted[0] != answer:
                if not isinstance(answer, Refused):
                    self._system.cancel([(answer, None)])
                answer = noted[0]
        if not isinstance(answer, Refused):
            if room is not None:
                room.taken(part.size, now)
            self._taken(batch, part, answer)
        elif answer.limit is not Limit.NONE:
            self._over_limit(batch, part, answer, now)
        else:
            self._refused(batch, answer, now)

    def _taken(self, batch: Batch, part: _Part, job_id: str) -> None:
        """Note that a part of a batch is in the system."""
        self._retries.pop(batch, None)
        batch.ids.add(part.first, part.last, job_id)
        try:
            batch_directory.write_text(batch.directory, batch_directory.JobIds.file(part.name), job_id)
        except Exception as error:  # its jobs run nevertheless
            logger.warning("the id of job %s cannot be written to %s: %s", job_id, batch.directory, error)
        jobs = [job for index, job in batch.jobs.items() if part.first <= index <= part.last]
        self._in_system.update(jobs)
        cancelled = [index for index in sorted(batch.cancelled) if part.first <= index <= part.last]
        if cancelled:
            self._system.cancel([(job_id, index if part.last else None) for index in cancelled])
        if part.last < batch.last:
            self._pending[batch] = None
            self._timer.within(0.0)
        else:
            self._complete(batch)
        for job in jobs:
            self.changed(job)
        self._on_submitted(batch)

    def _over_limit(self, batch: Batch, part: _Part, refusal: Refused, now: float) -> None:
        """There would be too many jobs, so try fewer, and then wait until some have ended."""
        key = _limited_by(batch)
        if key not in self._rooms:
            self._rooms[key] = Room()
            calls = sum(job.submitted is None for each in self._waiting for job in each.jobs.values())
            logger.warning(
                "%d calls, the first of %s, are more jobs than %s accepts now. They wait in this session and become "
                "jobs as others end. Calls that still wait when the session ends are not run. %s",
                calls,
                batch.name,
                self._system.name,
                refusal,
            )
        room = self._rooms[key]
        room.refused(part.size, now)

        def decide(may_end: bool) -> None:
            self._settle(batch)
            later = time.monotonic()
            given_up = later - self._left_at >= _LEAVING_SECONDS if self._leaving else room.is_hopeless(later, may_end)
            if given_up:
                self._give_up(batch, refusal)
            else:
                self._pending[batch] = None
                self._timer.within(max(0.0, room.due - later))

        self._submitting.add(batch)
        ask_whether_more_may_end(self._system, refusal, not room.is_full or bool(self._in_system), decide)

    def _refused(self, batch: Batch, refusal: Refused, now: float) -> None:
        """A part of a batch was refused, so try again later if that may help, or give up."""
        retry = self._retries.setdefault(batch, Retry())
        leaving = (self._left_at, _LEAVING_SECONDS) if self._leaving else ()
        if retry.again(refusal, now, *leaving):
            self._pending[batch] = None
            self._timer.within(retry.due - now)
        else:
            self._give_up(batch, refusal)

    def _give_up(self, batch: Batch, refusal: Refused) -> None:
        """Give up the calls of a batch that have not been submitted."""
        self._complete(batch)
        self._on_refused(batch, refusal)


def _limited_by(batch: Batch) -> Any:
    """The values of which a limit on the number of jobs may depend, such as accounts and partitions."""
    needs = batch.key[0]
    return needs.template_keys, needs.slurm_cmd_args, needs.submission_template
