"""Calls as jobs of a queuing system, by way of the cache directory.

    call ─▶ entry `_i.h5` ─▶ batch ─▶ job array ─▶ worker.job ─▶ entry `_o.h5` ─▶ call
             (claimed: only one session submits it)

- *Entry*: the call, claimed for its batch. Where another session has claimed it, that session's job is followed.
- *Batch*: calls with the same needs that arrive together are one job array, so that the system is asked once.
- *Inputs* that are jobs themselves become dependencies of the system, so that the session may end.
- *Results* are noticed by looking for their files. The system is asked, seldom, only for what leaves none.

Files of a batch, in ``<cache directory>/.executorlib/<batch>/``: ``entries`` (index and entry of each call),
``setup.json`` (what jobs set up), ``owner`` (who submits it), ``job.sh``, ``job_id``, and ``output.<index>``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from executorlib import cache
from executorlib.errors import ExecutorlibSocketError, advise_unpicklable
from executorlib.launchers.base import Events, Exit, Process, boot_code, tail_text
from executorlib.launchers.queue import Batch, Dependency, JobState, Phase
from executorlib.launchers.systems import JobSystem, Refused, States
from executorlib.resources import Resources
from executorlib.worker.job import RAISED, RESULT

if TYPE_CHECKING:
    from executorlib.serialize import Frame
    from executorlib.task import Task

logger = logging.getLogger("executorlib")

# A batch is submitted when no call was added for so long, in seconds: a loop of `submit` is far quicker ...
_LINGER = 0.02
# ... or when it is so old. Doubles with every batch of one burst, so that requests grow with its logarithm only.
_FIRST_WINDOW, _LAST_WINDOW = 0.5, 16.0
# Looking for results takes at most this share of a core, and is done at most so often (seconds).
_LOOK_SHARE, _LOOK_SECONDS = 0.01, 0.05
# How long a result may take to show on a slow file system after its job has ended, in seconds: when the exit code says
# that there is one (NFS shows others' files after up to a minute), and otherwise.
_RESULT_GRACE, _GRACE = 75.0, 3.0
# How long submissions that fail for the moment are repeated, and how long to wait first, in seconds.
_RETRY_SECONDS, _FIRST_RETRY = 300.0, 1.0
# More dependencies than these make no command line: such a batch waits here for its inputs.
_MOST_DEPENDENCIES = 100
# How long an entry of another machine's session may lack a job id, in seconds, before that session counts as dead.
_SUBMIT_SECONDS = 120.0
_OUTPUT_TAIL_BYTES = 4096
_SIGALRM = 14


class _Job:
    """A call on its way through the system.

    Attributes:
        process: The worker that the job is.
        task: The call.
        path: The entry's file while it waits or runs.
        batch: The batch that runs it; may be another session's.
        index: Its place in the batch.
        begun: Whether it is known to run.
        gone_since: When the system was first seen without it, or with it ended.
        last: What the system said of it last.
        asked: Whether the system was asked what became of it.
        ending: Its result.
    """

    def __init__(self, process: Process, task: Task, path: str) -> None:
        self.process = process
        self.task = task
        self.path = path
        self.output = cache.output_of(path)
        self.batch: _Batch | None = None
        self.index = 0
        self.begun = False
        self.gone_since: float | None = None
        self.last: JobState | None = None
        self.asked = False
        self.ending: cache.Ending | None = None

    @property
    def key(self) -> tuple[str, int | None]:
        """What the system calls it."""
        assert self.batch is not None
        assert self.batch.job_id is not None
        return self.batch.job_id, self.index if self.batch.is_array else None

    @property
    def name(self) -> str:
        """The same as text."""
        job_id, index = self.key
        return job_id if index is None else f"{job_id}_{index}"


class _Batch:
    """Calls that are submitted together, by this session or another.

    Attributes:
        directory: Its files.
        ours: Whether this session submits it.
        needs: What its calls have in common.
        jobs: Its calls by index.
        job_id: What the system calls it, once submitted.
        open: Whether calls are still added.
    """

    def __init__(self, directory: str, ours: bool, needs: Any = None) -> None:
        self.directory = directory
        self.ours = ours
        self.needs = needs
        self.jobs: dict[int, _Job] = {}
        self.size = 0
        self.job_id: str | None = None
        self.open = ours
        self.submitting = False
        self.made = self.touched = time.monotonic()
        self.retry_at = 0.0
        self.retry_after = _FIRST_RETRY
        self.is_array = False
        self.after: dict[tuple[int, int], _Job] = {}
        self.corresponds: _Batch | None = None
        self.cancelled: set[int] = set()


class JobTransport:
    """Stands for the connection to a job: the call is in its file, and the result is handed over when asked for."""

    def __init__(self, launcher: JobLauncher, job: _Job) -> None:
        self._launcher = launcher
        self._job = job

    def put(self, header: Any, frames: Any = ()) -> int:
        """See `Transport.put`; the entry holds all that a job needs to know."""
        return 0

    def flush(self) -> None:
        """See `Transport.flush`."""
        if self._job.ending is not None:
            self._launcher.deliver(self._job)

    def close(self) -> None:
        """See `Transport.close`."""


class JobLauncher:
    """Starts a job for each call.

    Args:
        events: The loop.
        system: What runs jobs.
        command: Makes the argument list of a job from the resources of its call and the Python source that it runs.
        log_sizes: Whether to log the size of each call.
    """

    def __init__(
        self, events: Events, system: JobSystem, command: Callable[[Resources, list[str]], list[str]], log_sizes: bool
    ) -> None:
        self._events = events
        self._system = system
        self._command = command
        self._log_sizes = log_sizes
        self._jobs: dict[int, _Job] = {}  # by the worker's number, until they are over
        self._by_output: dict[str, _Job] = {}
        self._open: dict[Any, _Batch] = {}
        self._unsubmitted: list[_Batch] = []  # in the order in which they were begun
        self._followed: dict[str, _Batch] = {}  # other sessions', by directory
        self._window = _FIRST_WINDOW
        self._last_call = 0.0
        self._batch_number = 0
        self._armed = {"submit": False, "look": False, "query": False}
        self._query_after = system.first_query
        self._query_due = 0.0
        self._querying = False
        self._to_cancel: list[tuple[str, int | None]] = []
        self._prepared = False
        self._early: list[Callable[[], None]] = []  # what has to wait until the system is known
        self._leaving = False

    # -- Launcher -------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """See `Launcher.prepare`."""
        self._system.prepare(self._on_prepared)

    def _on_prepared(self) -> None:
        self._prepared = True
        early, self._early = self._early, []
        for step in early:
            step()

    def launch(self, process: Process) -> None:
        """See `Launcher.launch`: claim the call's entry, or follow who has."""
        if not self._prepared:
            self._early.append(lambda: self.launch(process))
            return
        (task,) = process.worker.calls
        if task.over:  # cancelled meanwhile
            self._events.on_exit(process, Exit(None, "it was cancelled"))
            return
        assert task.cache_path is not None
        job = _Job(process, task, cache.input_of(task.cache_path))
        process.host = self._system.name
        self._jobs[process.worker.number] = job
        twin = self._by_output.get(job.output)
        if twin is not None and twin.batch is not None:
            # The same call again in this session; both resolve with the one job.
            self._follow(job, twin.batch, twin.index)
            return
        self._claim(job)

    def setup(self, process: Process) -> dict[str, Any]:
        """See `Launcher.setup`; the batch directory has it."""
        return {}

    def kill(self, process: Process, signal_number: int) -> None:
        """See `Launcher.kill`: cancel the job."""
        job = self._jobs.get(process.worker.number)
        if job is None:
            return
        batch = job.batch
        if batch is not None and batch.ours and self._is_last_of(job):
            if batch.job_id is not None:
                if not self._to_cancel:
                    self._events.call_later(0.0, self._cancel)
                self._to_cancel.append(job.key)
            else:
                batch.cancelled.add(job.index)  # it may be on its way to the system already
            cache.remove_input(job.path)
        self._end(job, Exit(None, "its job was cancelled"))

    @property
    def busy(self) -> bool:
        """See `Launcher.busy`."""
        return bool(self._early or self._unsubmitted or self._to_cancel or self._system.busy)

    def detach(self, on_taken: Callable[[], None]) -> None:
        """See `Launcher.detach`: submit what waits to be submitted, and let all jobs go on."""
        if not self._prepared:
            self._early.append(lambda: self.detach(on_taken))
            return
        self._leaving = True
        for batch in self._unsubmitted:
            batch.open = False
        self._open.clear()
        for job in list(self._jobs.values()):
            if job.batch is None or not job.batch.ours or job.batch.job_id is not None:
                self._forget(job)
        on_taken()
        self._submit()

    def close(self) -> None:
        """See `Launcher.close`."""
        self._jobs.clear()
        self._by_output.clear()
        self._system.close()

    # -- entries --------------------------------------------------------------------------------------------------

    def _claim(self, job: _Job) -> None:
        """Put the call's entry in place; where another session has, follow that."""
        task = job.task
        try:
            batch, index = self._batch_for(job)
            values = {
                "function": task.fn,
                "input_args": list(task.args),
                "input_kwargs": task.kwargs,
                "resource_dict": task.resources.as_dict(),
                "batch": batch.directory,
            }
            # Two tries: the entry may be finished, or removed, between the first one and the look at who has it.
            for _ in range(2):
                if cache.write_input(job.path, values):
                    if self._log_sizes:
                        size = os.path.getsize(job.path)
                        logger.warning("call %d of %s: sent %d bytes", task.number, task.name, size)
                    self._add(job, batch, index)
                    return
                if self._follow_owner(job):
                    return
        except OSError as error:
            text = f"its entry {job.path} cannot be written: {error.strerror or error}"
            self._end(job, Exit(None, text))
            return
        except BaseException as error:  # whatever the user's objects raise while they are pickled
            self._end(job, Exit(None, "", advise_unpicklable(error, task.number, task.name)))
            return
        self._end(job, Exit(None, f"its entry {job.path} is claimed and given up again and again"))

    def _follow_owner(self, job: _Job) -> bool:
        """Follow the session that has claimed the call; False where the entry is ours to try again."""
        entry = cache.read_input(job.path)
        if entry is None:
            if os.path.exists(job.output):
                self._follow(job, None, 0)
                return True
            # Being written, or damaged. What nobody has finished for so long, nobody will.
            if os.path.exists(job.path) and not cache.is_older(job.path, _SUBMIT_SECONDS):
                self._follow(job, None, 0)
                return True
            with contextlib.suppress(FileNotFoundError):
                cache.take_over(job.path, f"damaged-{os.stat(job.path).st_mtime_ns}-{os.path.basename(job.path)}")
            return False
        directory = entry["batch"]
        if directory is None:
            self._follow(job, None, 0)
            return True
        batch = self._followed.get(directory)
        if batch is None:
            batch = self._followed[directory] = _Batch(directory, ours=False)
        try:
            indices = {path: index for index, path in cache.batch_entries(directory).items()}
        except OSError:
            indices = {}
        index = indices.get(job.path, 0)
        batch.is_array = len(indices) > 1
        batch.size = len(indices)
        self._follow(job, batch, index)
        return True

    def _follow(self, job: _Job, batch: _Batch | None, index: int) -> None:
        job.batch, job.index = batch, index
        if batch is not None and not batch.ours:
            batch.jobs.setdefault(index, job)
        self._by_output.setdefault(job.output, job)
        self._arm_look()
        self._arm_query(soon=True)

    def _is_last_of(self, job: _Job) -> bool:
        """Whether no other call of this session waits for the same job."""
        return not any(other is not job and other.output == job.output for other in self._jobs.values())

    # -- batches --------------------------------------------------------------------------------------------------

    def _batch_for(self, job: _Job) -> tuple[_Batch, int]:
        """The batch that a call joins, and its index there."""
        resources = job.task.resources
        folder = resources.cache_directory
        assert folder is not None
        after = [self._by_output[path] for path in job.task.after if path in self._by_output]
        after = [other for other in after if other.ending is None and other.batch is not None]
        needs = replace(resources, cache_key=None)
        corresponds = None
        if len(after) == 1 and after[0].batch is not None and after[0].batch.ours:
            corresponds = after[0].batch
        if corresponds is not None:
            key: Any = (needs, "corresponding", corresponds.directory)
        else:
            key = (needs, frozenset(other.output for other in after))
        batch = self._open.get(key)
        if batch is not None and (
            batch.size >= self._system.array_limit or (corresponds is not None and batch.size != after[0].index)
        ):
            batch.open = False
            batch = None
        if batch is None and corresponds is not None and after[0].index != 0:
            # Elements can correspond only with the same index.
            corresponds, key = None, (needs, frozenset([after[0].output]))
            batch = self._open.get(key)
        if batch is None:
            self._batch_number += 1
            name = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{self._batch_number}-{os.urandom(3).hex()}"
            batch = _Batch(os.path.join(folder, cache.BATCHES_FOLDER, name), ours=True, needs=key)
            batch.after = {(id(other.batch), other.index): other for other in after}
            batch.corresponds = corresponds
        return batch, batch.size

    def _add(self, job: _Job, batch: _Batch, index: int) -> None:
        if not batch.size:
            self._open[batch.needs] = batch
            self._unsubmitted.append(batch)
        job.batch, job.index = batch, index
        batch.jobs[index] = job
        batch.size += 1
        batch.touched = time.monotonic()
        self._last_call = batch.touched
        self._by_output[job.output] = job
        self._arm("submit", _LINGER, self._submit)

    def _submit(self) -> None:
        """Submit batches that are complete and whose inputs have been submitted."""
        self._armed["submit"] = False
        now = time.monotonic()
        for batch in list(self._unsubmitted):
            if batch.open and not self._is_complete(batch, now):
                continue
            if batch.open:
                batch.open = False
                if self._open.get(batch.needs) is batch:
                    del self._open[batch.needs]
            if not batch.submitting and now >= batch.retry_at:
                self._submit_one(batch)
        if self._unsubmitted:
            self._arm("submit", _LINGER, self._submit)
        if now - self._last_call > _LAST_WINDOW:
            self._window = _FIRST_WINDOW

    def _is_complete(self, batch: _Batch, now: float) -> bool:
        if now - batch.touched >= _LINGER:
            return True
        if now - batch.made < self._window:
            return False
        self._window = min(2 * self._window, _LAST_WINDOW)
        return True

    def _submit_one(self, batch: _Batch) -> None:
        alive = {index: job for index, job in batch.jobs.items() if index not in batch.cancelled}
        if not alive:
            self._unsubmitted.remove(batch)
            return
        dependencies = self._dependencies(batch)
        if dependencies is None:
            if self._leaving and all(
                job.batch is None or job.batch not in self._unsubmitted for job in batch.after.values()
            ):
                # Only this session could wait for the inputs, and it leaves.
                self._unsubmitted.remove(batch)
                for job in batch.jobs.values():
                    cache.remove_input(job.path)
            return
        first = next(iter(alive.values()))
        batch.submitting = True
        batch.is_array = batch.size > 1
        resources = first.task.resources
        try:
            self._write_files(batch, resources)
        except OSError as error:
            self._refused(batch, Refused(f"its batch directory {batch.directory} cannot be written: {error}"))
            return
        code = boot_code("executorlib.worker.job", f"({batch.directory!r})")
        argv = self._command(resources, [sys.executable, "-c", code])
        name = first.task.name if batch.size == 1 else f"{first.task.name} and {batch.size - 1} more"
        submitted = Batch(
            name=name,
            directory=batch.directory,
            command=shlex.join(argv),
            count=batch.size,
            resources=resources,
            template_values=resources.template_values,
            cwd=resources.cwd or os.getcwd(),
            dependencies=tuple(dependencies),
        )
        self._system.submit(submitted, lambda answer: self._on_submitted(batch, answer))

    def _dependencies(self, batch: _Batch) -> list[Dependency] | None:
        """What a batch has to wait for in the system; None where it cannot be submitted yet."""
        pending = [
            job for job in batch.after.values() if job.ending is None and job.process.worker.number in self._jobs
        ]
        if not pending:
            return []
        if not self._system.has_dependencies or len(pending) > _MOST_DEPENDENCIES:
            return None
        if any(job.batch is None or job.batch.job_id is None for job in pending):
            return None
        source = batch.corresponds
        if source is not None and source.job_id is not None and source.is_array and batch.size > 1:
            return [Dependency(source.job_id, corresponding=True)]
        return [Dependency(*job.key) for job in pending]

    def _write_files(self, batch: _Batch, resources: Resources) -> None:
        os.makedirs(batch.directory, exist_ok=True)
        entries = "".join(f"{index} {job.path}\n" for index, job in batch.jobs.items())
        owner = {"system": self._system.name, "host": socket.gethostname(), "pid": os.getpid()}
        setup = {**self._system.setup(), "threads": resources.threads_per_core, "ranks": resources.cores}
        if resources.cwd is not None:
            setup["cwd"] = resources.cwd
        for name, text in (
            (cache.ENTRIES_FILE, entries),
            (cache.OWNER_FILE, json.dumps(owner)),
            (cache.SETUP_FILE, json.dumps(setup)),
        ):
            with open(os.path.join(batch.directory, name), "w", encoding="utf-8") as file:
                file.write(text)

    def _on_submitted(self, batch: _Batch, answer: str | Refused) -> None:
        if isinstance(answer, Refused):
            self._refused(batch, answer)
            return
        self._unsubmitted.remove(batch)
        batch.job_id = answer
        try:
            cache.write_text(os.path.join(batch.directory, cache.JOB_ID_FILE), answer)
        except OSError as error:
            logger.warning("job %s: %s cannot be noted: %s", answer, batch.directory, error)
        late = [index for index in batch.cancelled if index < batch.size]
        if late:
            self._system.cancel([(answer, index if batch.is_array else None) for index in late])
        if self._leaving:
            for job in list(batch.jobs.values()):
                self._forget(job)
        self._arm_look()
        self._arm_query(soon=True)
        if self._unsubmitted:
            self._arm("submit", 0.0, self._submit)

    def _refused(self, batch: _Batch, refusal: Refused) -> None:
        batch.submitting = False
        now = time.monotonic()
        if refusal.transient and now - batch.touched + batch.retry_after < _RETRY_SECONDS and not self._leaving:
            if batch.retry_after == _FIRST_RETRY:
                logger.warning("%s; trying again for %g s", refusal, _RETRY_SECONDS)
            batch.retry_at = now + batch.retry_after
            batch.retry_after *= 2
            self._arm("submit", _LINGER, self._submit)
            return
        self._unsubmitted.remove(batch)
        for job in list(batch.jobs.values()):
            cache.remove_input(job.path)
            self._end(job, Exit(None, f"{self._system.name} did not take its job: {refusal}"))
        shutil.rmtree(batch.directory, ignore_errors=True)

    # -- results --------------------------------------------------------------------------------------------------

    def _arm(self, what: str, seconds: float, callback: Callable[[], None]) -> None:
        if not self._armed[what]:
            self._armed[what] = True
            self._events.call_later(seconds, callback)

    def _arm_look(self, seconds: float = _LOOK_SECONDS) -> None:
        self._arm("look", seconds, self._look)

    def _look(self) -> None:
        """Look for results."""
        self._armed["look"] = False
        began = time.thread_time()
        now = time.monotonic()
        for job in list(self._jobs.values()):
            if job.ending is not None:
                continue
            if os.path.exists(job.output):
                job.ending = cache.read_ending(job.output)
                if job.ending is not None:
                    self._on_ending(job)
                    continue
            if job.gone_since is not None:
                self._on_gone(job, now)
        if self._jobs:
            self._arm_look(max(_LOOK_SECONDS, (time.thread_time() - began) / _LOOK_SHARE))

    def _on_ending(self, job: _Job) -> None:
        if job.begun:
            self.deliver(job)
        else:
            self._begin(job)

    def _begin(self, job: _Job) -> None:
        job.begun = True
        job.process.transport = JobTransport(self, job)
        self._events.on_connected(job.process)

    def deliver(self, job: _Job) -> None:
        """Hand a result over; the call was told that it runs."""
        ending = job.ending
        assert ending is not None
        kind, text = ("error", ending.traceback) if ending.failed else ("result", "")
        frames: list[Frame] = [ending.data]
        header = [kind, job.task.number, ending.runtime, text, {"leaving": True}]
        self._events.on_message(job.process, header, frames)
        self._end(job, Exit(0, "it ended"))

    def _forget(self, job: _Job) -> None:
        """Nothing more is to be known of a job."""
        self._jobs.pop(job.process.worker.number, None)
        if self._by_output.get(job.output) is job:
            del self._by_output[job.output]
        batch = job.batch
        if batch is None or batch.jobs.get(job.index) is not job:
            return
        del batch.jobs[job.index]
        if not batch.jobs and not batch.ours:
            self._followed.pop(batch.directory, None)
        elif not batch.jobs and batch.job_id is not None and not self._leaving:
            _remove_batch(batch.directory)

    def _end(self, job: _Job, end: Exit) -> None:
        self._forget(job)
        self._events.on_exit(job.process, end)

    # -- the system's word ----------------------------------------------------------------------------------------

    def _arm_query(self, soon: bool = False) -> None:
        if soon:
            self._query_after = self._system.first_query
            due = time.monotonic() + self._query_after
            if self._armed["query"] and self._query_due > due:
                self._query_due = due
                self._events.call_later(self._query_after, self._query)
        if not self._armed["query"] and not self._querying:
            self._query_due = time.monotonic() + self._query_after
        self._arm("query", self._query_after, self._query)

    def _query(self) -> None:
        """Ask the system for the states of all jobs at once."""
        if self._querying or time.monotonic() < self._query_due - 0.001 or self._leaving:
            return
        self._armed["query"] = False
        self._find_job_ids()
        ids = {job.batch.job_id for job in self._jobs.values() if job.batch is not None and job.batch.job_id}
        if not ids:
            if self._jobs:
                self._query_due = time.monotonic() + self._query_after
                self._arm("query", self._query_after, self._query)
            return
        self._querying = True
        asked = [job for job in self._jobs.values() if job.batch is not None and job.batch.job_id is not None]
        self._system.query(sorted(filter(None, ids)), lambda states: self._on_states(asked, states))

    def _on_states(self, asked: list[_Job], states: States | None) -> None:
        self._querying = False
        changed = False
        now = time.monotonic()
        # Without an answer nothing is known, and nothing has changed.
        states, asked = ({}, []) if states is None else (states, asked)
        for job in asked:
            if job.process.worker.number not in self._jobs or job.ending is not None or job.batch is None:
                continue
            job_id = job.batch.job_id or ""
            state = states.get((job_id, job.index)) or states.get((job_id, None))
            if state is not None:
                changed = changed or job.last is None or job.last.phase is not state.phase
                job.last = state
            if state is None or state.phase is Phase.ENDED:
                if job.gone_since is None:
                    job.gone_since = now
                    changed = True
            elif state.phase is Phase.RUNNING:
                job.gone_since = None
                if not job.begun:
                    self._begin(job)
            elif state.hopeless and job.batch.ours:
                self._system.cancel([job.key])
                self._give_up(job)
        limit = self._system.last_query
        self._query_after = self._system.first_query if changed else min(1.5 * self._query_after, limit)
        self._query_due = now + self._query_after
        if self._jobs:
            self._arm("query", self._query_after, self._query)

    def _on_gone(self, job: _Job, now: float) -> None:
        """The system no longer has the job, and there is no result."""
        assert job.gone_since is not None
        if not job.asked and (job.last is None or job.last.phase is not Phase.ENDED):
            job.asked = True

            def know(state: JobState | None) -> None:
                if state is not None:
                    job.last = state
                    if state.phase is not Phase.ENDED:
                        job.gone_since, job.asked = None, False  # the query came too early, or too late

            self._system.detail(job.key, know)
            return
        ended_well = job.last is not None and _exit_code(job.last.exit_code) in ((RESULT, 0), (RAISED, 0))
        if now - job.gone_since > (_RESULT_GRACE if ended_well else _GRACE):
            self._give_up(job)

    def _give_up(self, job: _Job) -> None:
        """The job has ended without a result."""
        if job.batch is None or not job.batch.ours:
            # Nobody was there to see it end. The call is free again, for one of all sessions that see it now.
            batch, number = job.batch, job.process.worker.number
            self._forget(job)
            self._jobs[number] = job
            job.batch, job.gone_since, job.asked, job.last = None, None, False, None
            if batch is not None:
                cache.take_over(job.path, f"{os.path.basename(batch.directory)}.{job.index}")
            self._claim(job)
            return
        cache.remove_input(job.path)
        self._end(job, Exit(None, "", self._error(job)))

    def _error(self, job: _Job) -> BaseException:
        state, task, batch = job.last, job.task, job.batch
        assert batch is not None
        limit = task.resources.run_time_max
        code, signal_number = _exit_code(state.exit_code) if state is not None else (0, 0)
        alarmed = _SIGALRM in (signal_number, code - 128)
        subject = f"Call {task.number} of {task.name} has no result: job {job.name}"
        tail = tail_text(_read_tail(os.path.join(batch.directory, f"output.{job.index}")))
        said = f" Its output ended with:\n{tail}" if tail else " It wrote no output."
        if state is None:
            text = f"{subject} is not known to {self._system.name} any more, and left no result in {job.output}."
        else:
            facts = [
                f"{name} {value}"
                for name, value in (("reason", state.reason), ("exit code", state.exit_code), ("node", state.node))
                if value and value != "None"
            ]
            text = f"{subject} ended as {state.state}{' (' + ', '.join(facts) + ')' if facts else ''}."
        if limit is not None and (alarmed or (state is not None and state.state == "TIMEOUT")):
            return TimeoutError(f"{text} It ran longer than its run_time_max of {limit:g} s; give it more time.{said}")
        advice = _ADVICE.get(
            state.state if state is not None else "", "Only this call fails; it can be submitted again."
        )
        return ExecutorlibSocketError(f"{text} {advice}{said}")

    def _find_job_ids(self) -> None:
        """Read which jobs the batches of other sessions became."""
        for batch in list(self._followed.values()):
            if batch.job_id is None:
                batch.job_id = cache.read_text(os.path.join(batch.directory, cache.JOB_ID_FILE))
            if batch.job_id is None and _is_abandoned(batch.directory):
                for job in list(self._jobs.values()):
                    if job.batch is batch:
                        self._give_up(job)

    def _cancel(self) -> None:
        jobs, self._to_cancel = self._to_cancel, []
        self._system.cancel(jobs)


_ADVICE = {
    "OUT_OF_MEMORY": "Give it more memory with resource_dict={'memory_max': GB}; only this call fails.",
    "TIMEOUT": "Give it more time with resource_dict={'run_time_max': seconds}; only this call fails.",
    "NODE_FAIL": "The node failed, not the call: submit it again.",
    "PREEMPTED": "Other jobs had priority: submit it again.",
    "CANCELLED": "Somebody cancelled it, or an input of it failed; it can be submitted again.",
}


def _exit_code(text: str) -> tuple[int, int]:
    """Exit code and signal from what a queue writes as ``code:signal``."""
    code, _, signal_number = text.partition(":")
    return (int(code) if code.isdigit() else -1, int(signal_number) if signal_number.isdigit() else 0)


def _read_tail(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _OUTPUT_TAIL_BYTES))
            return file.read()
    except OSError:
        return b""


def _remove_batch(directory: str) -> None:
    """Remove a batch's files, unless its jobs have written something that somebody may want to read."""
    try:
        outputs = [entry for entry in os.scandir(directory) if entry.name.startswith("output.")]
        if not any(entry.stat().st_size for entry in outputs):
            shutil.rmtree(directory, ignore_errors=True)
    except OSError:
        return


def _is_abandoned(directory: str) -> bool:
    """Whether the session that made a batch ended before submitting it; a job that runs all the same will notice."""
    try:
        owner = json.loads(cache.read_text(os.path.join(directory, cache.OWNER_FILE)) or "{}")
    except ValueError:
        owner = {}
    if owner.get("host") == socket.gethostname():
        try:
            os.kill(owner["pid"], 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False
        return False
    return cache.is_older(directory, _SUBMIT_SECONDS)
