"""Runs calls as jobs of a queuing system, through files in the cache directory.

    call ─▶ entry `_i.h5` ─▶ batch ─▶ job array ─▶ worker.job ─▶ entry `_o.h5` ─▶ call
             (claimed: only one session submits it)

- *Entry*: the call, claimed for its batch. If another session has claimed it, that session's job is followed.
- *Batch*: calls with the same needs that arrive together become one job array, so that one request submits them.
- *Inputs* that are jobs themselves become dependencies in the system, so that the session may end.
- *Results* are found by looking for their files. The system is asked, seldom, only about jobs that leave none.

Files of a batch, in ``<cache directory>/.executorlib/<batch>/``: ``entries`` (index and entry of each call),
``setup`` (settings for the jobs), ``owner`` (the session that submits it), ``job.sh``, ``run.py`` if the system starts
that, ``job_id``, and ``output.<index>``. If the system takes a batch in parts, each part has its own files, such as
``run.5-9.py`` and ``job_id.5-9``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from executorlib import machine
from executorlib.cache import batch_directory, entries, trust
from executorlib.core.task import RUNNING, CallFuture, Task
from executorlib.errors import ExecutorlibSocketError, advise_unpicklable
from executorlib.futures.inputs import misplaced
from executorlib.jobs.delivery import Entries
from executorlib.jobs.job import SUBMIT_SECONDS, Batch, Identity, Job, owner_of
from executorlib.jobs.queue import JobState, Phase, same_system
from executorlib.jobs.submitter import Submitter
from executorlib.jobs.system import BatchSystem, Cancellations, Holds, Refused, States
from executorlib.launchers.contract import Events, Exit, Launcher, Process, Timer
from executorlib.resources import Resources
from executorlib.worker.job import RAISED, RESULT

if TYPE_CHECKING:
    from executorlib.serialize import Frame

logger = logging.getLogger("executorlib")

# The largest share of a core for looking for results, and the shortest pause between looks, in seconds ...
_LOOK_SHARE, _LOOK_SECONDS = 0.01, 0.05
# ... and the largest share of the loop's time, and most seconds at once, because everything else waits meanwhile.
_WAIT_SHARE = 0.1
_AT_ONCE_SECONDS = 0.05
# Seconds that a result may take to appear on a slow file system after its job has ended: if there may well be a result
# (NFS shows files of other machines after up to a minute), and otherwise. There may be one
# - if the exit code says so;
# - if nothing says how the job ended, because the queue forgets jobs at once and keeps no history. This excludes local
#   disks, where a missing file does not appear later, and jobs that had ended before this session looked, which is
#   mostly long ago. So with such a queue and a network file system, the error about a job that died takes this long.
#   Giving up a result too early would be worse, because its call would run again.
_RESULT_GRACE, _GRACE = 75.0, 3.0
# Seconds that an entry may exist without being readable. Entries are put in place whole, but on file systems without
# hard links an empty one precedes them for a moment.
_UNREADABLE_SECONDS = 5.0
# How often a call may become another one while it is pickled, because a thread keeps changing its inputs.
_MOST_CHANGES = 10


class JobTransport:
    """Takes the place of a connection to a job, whose call is in its file."""

    def __init__(self, launcher: JobLauncher, job: Job) -> None:
        self._launcher = launcher
        self._job = job

    def put(self, header: Any, frames: Any = ()) -> int:
        """Does nothing: the entry holds everything that a job needs."""
        return 0

    def flush(self) -> None:
        """The call knows that it runs."""
        self._launcher.on_handed(self._job)


class JobLauncher(Launcher):
    """Starts a job for each call.

    Args:
        events: The loop.
        delivery: Names calls and their inputs.
        system: The system that runs the jobs.
        command: Makes the argument list of a job from the resources of its call and the Python source that it runs.
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
        self._delivery = delivery
        self._system = system
        self._log_sizes = log_sizes
        self._submitter = Submitter(events, system, command, self._on_submitted, self._on_refused)
        self._jobs: dict[int, Job] = {}  # by the worker's number, until they are over
        self._same: dict[str, dict[int, Job]] = {}  # the same jobs by their output, then by the worker's number
        self._by_output: dict[str, Job] = {}  # the first of several equal calls
        self._followed: dict[str, Batch] = {}  # batches of other sessions, by directory
        self._cancellations = Cancellations(events, system)
        self._holds = Holds()
        self._ended_now: set[str] = set()  # outputs that will not come, which their dependents do not know yet
        self._told: set[int] = set()  # calls that wait for another system, as the user has been told
        self._roots: set[str] = set()  # cache directories
        self._prepared = False
        self._early: list[Callable[[], None]] = []  # steps that wait until the system is known
        self._leaving = False
        self._looks = Timer(events, self._look)
        self._to_look_at: deque[Job] = deque()
        self._renewals = Timer(events, self._renew_views)
        self._to_renew: deque[Job] = deque()
        self._questions = Timer(events, self._ask)
        self._ask_after = system.first_query
        self._asking = False
        system.listen(lambda: self._questions.within(_LOOK_SECONDS))

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
        (task,) = process.worker.calls
        if task.over:  # cancelled meanwhile
            self._events.on_exit(process, Exit(None, "it was cancelled"))
            return
        process.host = self._system.name
        self._follow_or_claim(process, task)

    def kill(self, process: Process, signal_number: int) -> None:
        """Cancel the job, unless an equal call needs it."""
        job = self._jobs.get(process.worker.number)
        if job is None:
            return
        batch = job.batch
        twin = next((other for other in self._same[job.output].values() if other is not job), None)
        if twin is not None:
            # If the result is there, the other call finds it by itself.
            if job.ending is None and self._by_output.get(job.output) is job:
                # The batch and the dependents know this record, so it goes on for the other call.
                job.trade_places(twin)
                for each in (job, twin):
                    self._keep(each)
                    each.process.transport = JobTransport(self, each) if each.begun else None
                job = twin
        elif batch is not None and batch.ours:
            if job.submitted is not None:
                self._cancellations.add(job.key)
            else:
                batch.cancelled.add(job.index)  # it may be on its way to the system already
            _remove_input(job)
        self._end(job, Exit(None, "its job was cancelled"))

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
        self._leaving = True
        for job in list(self._jobs.values()):
            if job.batch is None or not job.batch.ours or job.submitted is not None:
                self._forget(job)
        on_taken()
        self._submitter.leave()

    def close(self) -> None:
        """Close the system, and remove folders that are empty now."""
        self._jobs.clear()
        self._same.clear()
        self._by_output.clear()
        self._system.close()
        for root in self._roots:
            batch_directory.remove_folder(root)

    # -- entries --------------------------------------------------------------------------------------------------

    def _follow_or_claim(self, process: Process, task: Task, changes: int = 0) -> None:
        """Follow the job that runs an equal call already, or run the call.

        Args:
            process: The worker that its job will stand for.
            task: The call.
            changes: How often it has become another one while it was pickled.
        """
        assert task.cache_path is not None
        job = Job(process, task, entries.input_of(task.cache_path))
        job.changes = changes
        self._keep(job)
        twin = self._by_output.get(job.output)
        if twin is not None and twin.batch is not None:
            # This session has the same call already. One job resolves both.
            self._follow(job, twin.batch, twin.index)
            return
        self._claim(job)

    def _claim(self, job: Job) -> None:
        """Put the call's entry in place, or follow the session that has done so."""
        self._each([job], self._try_to_claim)

    def _pickled(self, job: Job) -> dict[str, entries.Snapshot]:
        """Pickle a call for its entry.

        Raises:
            BaseException: Whatever the pickling raises.
        """
        task = job.task
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
        if job.again:
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
        self._forget(job)
        self._follow_or_claim(job.process, task, job.changes + 1)

    def _try_to_claim(self, job: Job) -> None:
        task = job.task
        batch = None
        try:
            if os.path.exists(job.path) and self._follow_owner(job):
                return
            try:
                values = self._pickled(job)
            except BaseException as error:  # the user's objects may raise anything
                hidden = misplaced(task.fn, task.args, task.kwargs)
                self._end(job, Exit(None, "", advise_unpicklable(error, task.number, task.name, hidden)))
                return
            # The job runs what was pickled just now, so the entry has to be named by the key of that.
            if self._delivery.is_changed(task):
                self._start_as_another(job)
                return
            pending = [self._by_output[path] for path in task.after if path in self._by_output]
            after = [other for other in pending if not other.over]
            batch, index = self._submitter.place(job, after)
            self._roots.add(batch_directory.root_of(batch.directory))
            values["batch"] = entries.Snapshot.of(batch.directory)
            # Two tries: after the first one the entry may be finished, or removed, before its owner is looked up.
            for _ in range(2):
                if entries.write_input(job.path, values, job.root):
                    if self._log_sizes:
                        size = os.path.getsize(job.path)
                        logger.warning("call %d of %s: sent %d bytes", task.number, task.name, size)
                    # A network file system may have answered the look-up from its memory.
                    is_done = _is_on_local_disk(job) or trust.is_there(job.output)
                    ending = entries.read_ending(job.output, job.root) if is_done else None
                    if ending is not None and not ending.kept:
                        trust.remove(job.output, job.root)  # others who waited for it have had enough time
                    elif ending is not None:
                        # Another session's job has ended, and removed its entry, since the call was looked up.
                        entries.remove_input(job.path, job.root)
                        self._follow(job, None, 0)
                        return
                    self._submitter.add(job, batch, index)
                    self._by_output[job.output] = job
                    job.claimed = True
                    if isinstance(task.future, CallFuture) and task.future.stored is not None:
                        task.future.stored.call.batch = batch.directory
                    return
                if self._follow_owner(job):
                    return
        finally:
            if batch is not None and not batch.size:
                batch.remove_files()
        text = (
            f"another session keeps claiming its entry {job.path} and giving it up. Look for other programs that use "
            f"the cache directory {job.root}, and submit the call again"
        )
        self._end(job, Exit(None, text))

    def _follow_owner(self, job: Job) -> bool:
        """Follow the session that has claimed the call; False if this session can try again to claim it."""
        entry = entries.read_input(job.path, job.root)
        if entry is None and not os.path.exists(job.path) and trust.is_there(job.path):
            entry = entries.read_input(job.path, job.root)
        if entry is None:
            if trust.is_there(job.output):
                self._follow(job, None, 0)
                return True
            if not trust.is_there(job.path):
                return False
            seen, now = _identity(job.path), time.monotonic()
            if seen is None:
                return False
            # It is being written, or damaged. This session's clock decides, because others may be wrong.
            if job.unreadable is None or job.unreadable[0] != seen:
                job.unreadable = seen, now
            if now - job.unreadable[1] < _UNREADABLE_SECONDS:
                self._follow(job, None, 0)
                return True
            logger.warning("the entry %s is damaged; call %d claims it anew", job.path, job.task.number)
            entries.take_over(job.path, f"damaged-{seen}-{os.path.basename(job.path)}", root=job.root)
            return False
        job.unreadable = None
        directory = entry["batch"]
        own = self._system.name
        owner = {} if directory is None else owner_of(directory)
        if directory is None or not same_system(owner.get("system", own), own):
            if directory is not None and self._system.is_gone(owner):
                entries.take_over(job.path, entries.job_name(job.path, directory), directory, job.root)
                return False
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
        batch = self._followed.get(directory)
        if batch is None:
            batch = self._followed[directory] = Batch(directory, ours=False)
        index = 0
        if batch.has_entries:
            known = batch.index_of(job.path)
            if known is None:
                self._follow(job, None, 0)
                return True
            index = known
        self._follow(job, batch, index)
        return True

    def _follow(self, job: Job, batch: Batch | None, index: int) -> None:
        job.batch, job.index = batch, index
        job.again = True
        if batch is not None and not batch.ours:
            self._roots.add(batch_directory.root_of(batch.directory))
            batch.jobs.setdefault(index, job)
        self._by_output.setdefault(job.output, job)
        self._submitter.changed(job)
        self._looks.within(_LOOK_SECONDS)
        self._ask_soon()

    # -- answers to submissions -----------------------------------------------------------------------------------

    def _on_submitted(self, batch: Batch) -> None:
        if self._leaving:
            for job in [job for job in batch.jobs.values() if job.submitted is not None]:
                self._forget(job)
        self._looks.within(_LOOK_SECONDS)
        self._ask_soon()

    def _on_refused(self, batch: Batch, refusal: Refused) -> None:
        if self._leaving:
            logger.error("%s did not accept jobs of this session, which has left: %s", self._system.name, refusal)
        same = [twin for job in batch.jobs.values() for twin in self._same.get(job.output, {}).values()]
        for job in [job for job in same if job.batch is batch and job.submitted is None]:
            _remove_input(job)
            text = (
                f"Call {job.task.number} of {job.task.name} was not run: {self._system.name} did not accept its job: "
            )
            self._end(job, Exit(None, "", ExecutorlibSocketError(f"{text}{refusal}")))

    # -- results --------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Look for results."""
        if not self._to_look_at:
            self._ended_now.clear()
            self._to_look_at.extend(self._jobs.values())
        cpu, began = time.thread_time(), time.monotonic()
        self._each(self._some(self._to_look_at), lambda job: self._look_at(job, began))
        if self._jobs:
            # A slow file system makes the loop wait, which takes no processor time.
            pause = max((time.thread_time() - cpu) / _LOOK_SHARE, (time.monotonic() - began) / _WAIT_SHARE)
            self._looks.within(max(_LOOK_SECONDS, pause))

    def _some(self, jobs: deque[Job]) -> Iterator[Job]:
        """Take at least one job, and as many as a moment allows. Jobs that are over by then are left out."""
        end = time.monotonic() + _AT_ONCE_SECONDS
        while jobs:
            job = jobs.popleft()
            if self._jobs.get(job.process.worker.number) is job:
                yield job
                if time.monotonic() >= end:
                    return

    def _look_at(self, job: Job, now: float) -> None:
        if job.over:
            return
        seen = _identity(job.output)
        if seen is not None and seen != job.damaged:
            job.ending = entries.read_ending(job.output, job.root)
            job.damaged = seen  # it is not read again until another file takes its place
            if job.ending is not None and job.ending.ran and not job.claimed:
                self._run_itself(job, job.ending)
                return
            if job.ending is not None:
                job.over = True
                if job.batch is not None:
                    job.batch.kept[job.index] = job.ending.printed
                self._submitter.changed(job)
                if not job.begun:
                    self._begin(job)
                elif job.task.state is RUNNING:
                    self._deliver(job)
                # Otherwise it is delivered once the call knows that it runs.
                return
        if job.gone_since is not None:
            self._on_gone(job, now)

    def _run_itself(self, job: Job, ending: entries.Ending) -> None:
        """Run a call that waited for the job of an equal one, which has run something else (see `worker.job`)."""
        assert ending.batch is not None
        job.ending = None
        self._start_over(job)
        # That job is over, even if it has not removed its entry yet.
        entries.take_over(job.path, entries.job_name(job.path, ending.batch), ending.batch, job.root)
        self._claim(job)

    def _begin(self, job: Job) -> None:
        job.begun = True
        job.process.transport = JobTransport(self, job)
        self._events.on_connected(job.process)

    def on_handed(self, job: Job) -> None:
        """The call knows that it runs, so its result can be passed on if it is there."""
        if job.ending is not None:
            # In the next turn, because nothing may come back while calls are being handed out.
            self._events.call_later(0.0, lambda: self._deliver(job))

    def _deliver(self, job: Job) -> None:
        """Pass on the result, if it is there and still of interest, of a call that knows that it runs."""
        ending, job.ending = job.ending, None  # later jobs refer to this one longer than the result is needed
        if ending is None or self._jobs.get(job.process.worker.number) is not job:
            return
        kind, text = ("error", ending.traceback) if ending.failed else ("result", "")
        frames: list[Frame] = [ending.data]
        more = {"leaving": True, "other": True} if ending.ran else {"leaving": True}
        header = [kind, job.task.number, ending.runtime, text, more]
        self._events.on_message(job.process, header, frames)
        self._end(job, Exit(0, "it ended"))

    def _keep(self, job: Job) -> None:
        number = job.process.worker.number
        self._jobs[number] = job
        self._same.setdefault(job.output, {})[number] = job

    def _forget(self, job: Job) -> None:
        """Forget a job, whose result or end is no longer of interest."""
        number = job.process.worker.number
        self._jobs.pop(number, None)
        same = self._same.get(job.output, {})
        same.pop(number, None)
        if not same:
            self._same.pop(job.output, None)
        if self._by_output.get(job.output) is job:
            del self._by_output[job.output]
        batch = job.batch
        if batch is None or batch.jobs.get(job.index) is not job:
            return
        del batch.jobs[job.index]
        if not batch.jobs and not batch.ours:
            self._followed.pop(batch.directory, None)
            if not self._leaving:
                batch.remove_files()
        elif not batch.jobs and batch.ids and not self._leaving:
            batch.remove_files()

    def _each(self, jobs: Iterable[Job], step: Callable[[Job], None]) -> None:
        """Do something for each job, so that damaged files of one job do not affect the others.

        All steps that look into files, or at the system's answers, go through here. An error that is raised after a
        call is over is not about its files, and passes through.
        """
        for job in jobs:
            try:
                step(job)
            except Exception as error:
                if self._jobs.get(job.process.worker.number) is not job:
                    raise
                if isinstance(error, OSError) and not isinstance(error, trust.UntrustedFile):
                    text = f"its entry {job.path} cannot be read or written: {error}"
                    call = f"Call {job.task.number} of {job.task.name}"
                    self._end(job, Exit(None, text, ExecutorlibSocketError(f"{call} was not run: {text}")))
                else:
                    self._end(job, Exit(None, "", error))

    def _end(self, job: Job, end: Exit) -> None:
        job.over = True
        self._submitter.changed(job)
        self._forget(job)
        self._events.on_exit(job.process, end)

    # -- states in the system -------------------------------------------------------------------------------------

    def _ask_soon(self) -> None:
        """Ask about new jobs soon, and then less and less often."""
        self._ask_after = self._system.first_query
        self._questions.within(self._ask_after)

    def _ask(self) -> None:
        """Ask the system for the states of all jobs at once."""
        if self._asking or self._leaving or not self._jobs:
            return
        if not self._to_renew:
            self._to_renew.extend(job for job in self._jobs.values() if job.batch is None or not job.batch.ours)
            self._renew_views()
        self._find_job_ids()
        asked = [job for job in self._jobs.values() if job.submitted is not None]
        if not asked:
            self._questions.within(self._ask_after)
            return
        self._asking = True
        ids = {job.key[0] for job in asked}
        self._system.query(sorted(ids), lambda states: self._on_states(asked, states))

    def _on_states(self, asked: list[Job], states: States | None) -> None:
        self._asking = False
        now = time.monotonic()
        if states is not None:  # without an answer, nothing is known
            self._each(asked, lambda job: self._on_state(job, states, now))
        self._ask_after = min(1.5 * self._ask_after, self._system.last_query)
        if self._jobs:
            self._questions.within(self._ask_after)

    def _on_state(self, job: Job, states: States, now: float) -> None:
        if job.over or job.submitted is None:
            return
        if self._jobs.get(job.process.worker.number) is not job:
            return  # it was forgotten while the system was asked
        job_id = job.submitted[0]
        state = states.get((job_id, job.index)) or states.get((job_id, None))
        if state is not None:
            job.last, job.seen = state, True
            self._holds.note(f"call {job.task.number} of {job.task.name}", job.key, state)
        if state is None or state.phase is Phase.ENDED:
            if job.gone_since is None:
                job.gone_since = now
        elif state.phase is Phase.RUNNING:
            job.gone_since = None
            if not job.begun:
                self._begin(job)
        elif state.hopeless and not self._waits_for_inputs_end(job):
            # This applies to another session's job, too, because that session may have left. With this session's
            # resources the call may be able to start. If not, the new job is ours, and its error says why.
            self._system.cancel([job.key])
            self._give_up(job)

    def _on_gone(self, job: Job, now: float) -> None:
        """Decide about a job without a result that the system no longer has."""
        assert job.gone_since is not None
        if not job.asked and (job.last is None or job.last.phase is not Phase.ENDED):
            job.asked, job.answered = True, False

            def know(state: JobState | None) -> None:
                job.answered = True
                if state is not None:
                    job.last = state
                    if state.phase is not Phase.ENDED:
                        job.gone_since, job.asked = None, False  # the query came too early, or too late
                else:
                    job.last = None

            self._system.detail(job.key, know)
        if job.asked and not job.answered:
            return
        if self._waits_for_inputs_end(job):
            return
        is_there = trust.is_there(job.output)  # then the next look reads it
        if now - job.gone_since > self._grace(job) and (job.damaged is not None or not is_there):
            self._give_up(job)

    @staticmethod
    def _grace(job: Job) -> float:
        """Seconds that the result of a job that has ended may take to appear."""
        if job.damaged is not None:
            return _GRACE
        if job.ended_well((RESULT, RAISED)):
            return _RESULT_GRACE
        return _RESULT_GRACE if job.ended_unseen() and not _is_on_local_disk(job) else _GRACE

    def _waits_for_inputs_end(self, job: Job) -> bool:
        """Return whether the job of an input has ended, too, and its end is being looked into, for the error text."""
        inputs = [self._by_output[path] for path in job.task.after if path in self._by_output]
        return any(each.gone_since is not None and not each.over for each in inputs) or not self._ended_now.isdisjoint(
            job.task.after
        )

    def _give_up(self, job: Job) -> None:
        """End the call of a job that has no result, or submit it again if another session submitted the job."""
        if job.batch is None or not job.batch.ours:
            # Nobody saw it end. The call is free again for one of the sessions that notice it now.
            batch = job.batch
            if batch is not None and entries.is_terminated(job.path, batch.directory, job.root):
                text = f"Call {job.task.number} of {job.task.name} was terminated (`terminate_task_in_cache`)"
                self._end(job, Exit(None, "", ExecutorlibSocketError(f"{text}; it can be submitted again.")))
                return
            self._start_over(job)
            if batch is not None:
                entries.take_over(job.path, entries.job_name(job.path, batch.directory), batch.directory, job.root)
            self._claim(job)
            return
        is_taken = entries.claimed_for(job.path, job.root) not in (None, job.batch.directory)
        if is_taken and not (job.last is not None and job.last.hopeless):
            # Another session believed this one to be dead, and has claimed the call.
            self._start_over(job)
            self._claim(job)
            return
        if not is_taken:
            _remove_input(job)
        self._ended_now.add(job.output)
        self._end(job, Exit(None, "", job.error(self._system)))

    def _start_over(self, job: Job) -> None:
        self._forget(job)
        self._keep(job)
        job.start_over()

    def _renew_views(self) -> None:
        """Make the work of other sessions' jobs visible here, even if the file system remembers an older state."""
        began = time.monotonic()
        self._each(self._some(self._to_renew), self._renew_view)
        if self._to_renew:
            self._renewals.within((time.monotonic() - began) / _WAIT_SHARE)

    def _renew_view(self, job: Job) -> None:
        # Nobody tells whether a job has the entry. If it is removed, or stays unreadable, it is free again.
        if job.batch is None and job.ending is None and (job.unreadable is not None or not trust.is_there(job.path)):
            self._try_to_claim(job)
        # The system may not know the job, and the file system may remember that there was no result.
        elif not _is_on_local_disk(job):
            trust.is_there(job.output)

    def _find_job_ids(self) -> None:
        """Find the jobs that the calls of other sessions became."""
        followed = set(self._followed.values())
        unknown = [job for job in self._jobs.values() if job.batch in followed and job.submitted is None]
        looked: dict[Batch, bool] = {}
        self._each(unknown, lambda job: self._find_job_id(job, looked))

    def _find_job_id(self, job: Job, looked: dict[Batch, bool]) -> None:
        batch = job.batch
        assert batch is not None
        if batch not in looked:
            known = batch.has_entries
            looked[batch] = batch.read_ids()
            if batch.has_entries and not known:
                batch.jobs.clear()
        if not looked[batch]:
            if batch.is_abandoned():
                self._give_up(job)
            return
        # If the list of its calls does not appear, its jobs cannot read it either.
        if not batch.has_entries:
            if trust.is_older(job.path, SUBMIT_SECONDS):
                self._give_up(job)
            return
        index = batch.index_of(job.path)
        if index is None:
            job.batch = None
            return
        job.index = index
        batch.jobs.setdefault(index, job)
        if job.submitted is not None:
            self._submitter.changed(job)
        elif batch.is_abandoned():
            self._give_up(job)  # it is in a part that has not been submitted


def _remove_input(job: Job) -> None:
    """Remove the entry of a job that is over. If that fails, whoever finds the entry sees that its job is dead."""
    with contextlib.suppress(OSError):
        entries.remove_input(job.path, job.root)


def _is_on_local_disk(job: Job) -> bool:
    return machine.is_local_disk(job.root or "/")


def _identity(path: str) -> Identity | None:
    """Read the identity of a file, which differs from that of any file that takes its place; None if there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
