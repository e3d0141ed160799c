"""Block mode on a cluster: each worker is a job, which connects back over the network once the system has started it.

Workers that are wanted at the same time become one job array. They may wait in the queue for a long time. Meanwhile,
calls go to the workers that already run.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import time
from collections.abc import Callable
from typing import Any

from executorlib.cache import batch_directory
from executorlib.jobs.job import read_tail
from executorlib.jobs.queue import JobState, Limit, Phase, Submission, shown_id
from executorlib.jobs.room import Retry, Room
from executorlib.jobs.system import BatchSystem, Cancellations, JobKey, Refused, ask_whether_more_may_end
from executorlib.jobs.watch import Watch
from executorlib.launchers.boot import boot_file
from executorlib.launchers.connecting import ConnectingWorker, dismiss
from executorlib.launchers.contract import Events, Exit, Launcher, Process, Timer
from executorlib.launchers.session import interpreter
from executorlib.resources import Resources
from executorlib.serialize import Frame
from executorlib.transports.router import Router, worker_of

logger = logging.getLogger("executorlib")

# Workers that are wanted within this many seconds become one job array.
_LINGER = 0.02
# Seconds that the system may take to find out how a worker ended after the loss of its connection.
_KNOW_SECONDS = 10.0


class _Member:
    """A worker and its job.

    Attributes:
        worker: The worker.
        batch: The workers that were submitted with it.
        index: Its place among them.
        identity: Names it in its messages.
        lost_at: The time when its connection or its job was first missing; the system is then asked how it ended.
        lost: Whether its connection was lost.
        last: The job's last state in the system.
    """

    def __init__(self, worker: ConnectingWorker, batch: _WorkerBatch, index: int) -> None:
        self.worker = worker
        self.process = worker.process
        self.batch = batch
        self.index = index
        self.identity = f"{batch.number}-{index}"
        self.lost_at: float | None = None
        self.lost = False
        self.last: JobState | None = None

    @property
    def who(self) -> str:
        return f"worker {self.process.number}"

    @property
    def key(self) -> JobKey:
        return self.batch.key(self.index)

    @property
    def is_watched(self) -> bool:
        """True until it connects: its job may end before that."""
        is_here = self.batch.members.get(self.index) is self
        return is_here and self.worker.peer is None and bool(self.batch.job_id)


class _WorkerBatch:
    """Workers that were submitted together."""

    def __init__(self, number: int, directory: str, size: int) -> None:
        self.number = number
        self.directory = directory
        self.size = size
        self.job_id = ""
        self.members: dict[int, _Member] = {}

    def key(self, index: int) -> JobKey:
        return self.job_id, index if self.size > 1 else None


class JobWorkerLauncher(Launcher):
    """Starts workers as jobs.

    Args:
        events: The loop.
        system: The system that runs the jobs.
        command: Makes the argument list of a job from the resources of its worker and the program that it runs.
        folder: A directory that all nodes see, for the files of the jobs.
        hostname_localhost: Whether workers connect to ``localhost``.
    """

    def __init__(
        self,
        events: Events,
        system: BatchSystem,
        command: Callable[[Resources, list[str]], list[str]],
        folder: str,
        hostname_localhost: bool,
    ) -> None:
        self._events = events
        self._system = system
        self._command = command
        self._folder = folder
        try:
            self._cwd = os.getcwd()  # for workers without a cwd, whenever they start
        except OSError:  # it was removed
            self._cwd = os.path.expanduser("~")
        self._router = Router(events, self._on_message, self._on_lost, tcp=True, hostname_localhost=hostname_localhost)
        self._wanted: list[Process] = []
        self._batches = 0
        self._members: dict[str, _Member] = {}  # by identity
        self._by_worker: dict[int, _Member] = {}
        self._prepared = False
        self._retry = Retry()
        self._room: Room | None = None  # made when a limit has been met
        self._submitting = 0
        self._cancellations = Cancellations(events, system)
        self._submissions = Timer(events, self._submit)
        self._watch = Watch(events, system, self._to_watch, self._on_state)

    # -- Launcher -------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Find out the system's settings."""
        self._system.prepare(self._on_prepared)

    def _on_prepared(self) -> None:
        self._prepared = True
        self._submissions.within(_LINGER)

    def launch(self, process: Process) -> None:
        """Submit a worker soon, together with others that are wanted now."""
        self._wanted.append(process)
        if self._prepared:
            self._submissions.within(_LINGER)

    def setup(self, process: Process) -> dict[str, Any]:
        """The settings with which the worker sees this process as it is now."""
        return self._system.setup()

    def kill(self, process: Process, signal_number: int) -> None:
        """Cancel the worker's job."""
        if process in self._wanted:
            self._wanted.remove(process)
            self._events.on_exit(process, Exit(None, "it was no longer needed"))
            return
        member = self._by_worker.get(process.number)
        if member is not None:
            self._cancel(member)
            self._end(member, "its job was cancelled")

    def _cancel(self, member: _Member) -> None:
        if member.batch.job_id:  # otherwise `_answered` cancels it
            self._cancellations.add(member.key)

    @property
    def busy(self) -> bool:
        """True while cancellations or other requests are on their way."""
        return self._cancellations.pending or self._system.busy

    def close(self) -> None:
        """Close all connections. Workers that still run notice that and end."""
        self._router.close()
        for directory in {member.batch.directory for member in self._members.values()}:
            batch_directory.remove(directory, but_output=True)
        batch_directory.remove_folder(self._folder)
        self._members.clear()
        self._system.close()

    # -- starting -------------------------------------------------------------------------------------------------

    def _submit(self) -> None:
        if not self._wanted:
            return
        now = time.monotonic()
        if now < self._retry.due:
            self._submissions.within(self._retry.due - now)
            return
        most = self._system.array_limit
        if self._room is not None:
            if self._submitting:
                return
            most = self._room.size(now)
            if not most:
                self._submissions.within(self._room.due - now)
                return
        wanted, self._wanted = self._wanted[:most], self._wanted[most:]
        if self._wanted and self._room is None:  # otherwise the answer will tell how much fits
            self._submissions.within(_LINGER)
        self._batches += 1
        name = batch_directory.new_name("workers")
        directory = os.path.join(self._folder, batch_directory.FOLDER, name)
        batch = _WorkerBatch(self._batches, directory, len(wanted))
        for index, process in enumerate(wanted):
            process.host = self._system.name
            member = batch.members[index] = _Member(self._connecting(process), batch, index)
            self._members[member.identity] = self._by_worker[process.number] = member
        resources = wanted[0].resources
        try:
            batch_directory.make(self._folder, name)
            credentials = os.path.join(directory, "credentials")
            self._router.credentials(f"{batch.number}-").write(credentials)
            module = "executorlib.worker.mpi" if resources.cores > 1 else "executorlib.worker.remote"
            program = os.path.join(directory, "run.py")
            with open(program, "w", encoding="utf-8") as file:
                arguments = f"{credentials!r}, numbered={self._system.element_variables!r}"
                arguments = f"(False, {arguments})" if resources.cores > 1 else f"({arguments})"
                file.write(boot_file(module, arguments))
        except Exception as error:  # mostly from the file system
            self._answered(batch, Refused(f"{directory} cannot be written: {error}"))
            return
        submission = Submission(
            name="executorlib workers",
            directory=directory,
            command=shlex.join(self._command(resources, [*interpreter(), program])),
            count=len(wanted),
            resources=resources,
            template_values=resources.template_values,
            cwd=resources.cwd or self._cwd,
        )
        self._submitting += 1

        def answered(answer: str | Refused) -> None:
            self._submitting -= 1
            self._answered(batch, answer)
            if self._wanted and self._room is not None:
                self._submissions.within(_LINGER)  # these workers have waited for the answer

        self._system.submit(submission, answered)

    def _connecting(self, process: Process) -> ConnectingWorker:
        return ConnectingWorker(
            self._events,
            self._router,
            process,
            lambda: self.kill(process, signal.SIGKILL),
            starter="the job",
            advice="Use an mpi4py that was built for the MPI of the cluster, and the pmi_mode that suits it.",
        )

    def _answered(self, batch: _WorkerBatch, answer: str | Refused) -> None:
        now = time.monotonic()
        if isinstance(answer, Refused) and answer.limit is not Limit.NONE:
            self._over_limit(batch, answer, now)
            return
        if isinstance(answer, Refused) and self._retry.again(answer, now):
            self._put_back(batch)
            self._submissions.within(self._retry.due - now)
            return
        self._retry = Retry()
        if isinstance(answer, Refused):
            self._refuse(batch, answer)
            return
        if self._room is not None:
            self._room.taken(batch.size, now)
        batch.job_id = answer
        cancelled = [batch.key(index) for index in range(batch.size) if index not in batch.members]
        if cancelled:
            self._system.cancel(cancelled)
        self._watch.soon()

    def _put_back(self, batch: _WorkerBatch) -> None:
        """Submit the same workers again later, as new jobs."""
        members = list(batch.members.values())
        for member in members:
            del self._members[member.identity], self._by_worker[member.process.number]
        self._wanted[:0] = [member.process for member in members]
        batch_directory.remove(batch.directory)

    def _refuse(self, batch: _WorkerBatch, refusal: Refused) -> None:
        for member in list(batch.members.values()):
            self._end(member, f"{self._system.name} did not accept its job: {refusal}")

    def _over_limit(self, batch: _WorkerBatch, refusal: Refused, now: float) -> None:
        """There would be too many jobs, so try fewer, and then wait until some have ended."""
        if self._room is None:
            self._room = Room()
            logger.warning(
                "%d workers are more jobs than %s accepts now. Those that wait start as other jobs end; until then, "
                "calls go to those that run. %s",
                batch.size + len(self._wanted),
                self._system.name,
                refusal,
            )
        room = self._room
        room.refused(batch.size, now)

        def decide(may_end: bool) -> None:
            later = time.monotonic()
            if room.is_hopeless(later, may_end):
                self._refuse(batch, refusal)
                return
            self._put_back(batch)
            self._submissions.within(max(0.0, room.due - later))

        own = any(member.batch.job_id for member in self._members.values())
        ask_whether_more_may_end(self._system, refusal, own or not room.is_full, decide)

    # -- messages -------------------------------------------------------------------------------------------------

    def _on_message(self, peer: bytes, header: list[Any], frames: list[Frame]) -> None:
        member = self._members.get(worker_of(peer))
        if member is not None:
            member.worker.on_message(peer, header, frames)
        elif header[0] == "hello":
            dismiss(self._router, peer)  # this worker was given up

    def _on_lost(self, peer: bytes) -> None:
        member = self._members.get(worker_of(peer))
        if member is None or member.worker.peer != peer:
            return
        if member.worker.told_to_stop:
            if member.worker.left_in_silence():
                self._cancel(member)  # it would hold its resources forever
            self._end(member, "it ended")
            return
        member.lost = True
        self._begin_to_find_out(member)

    def _begin_to_find_out(self, member: _Member) -> None:
        if member.lost_at is None:
            member.lost_at = time.monotonic()
            self._find_out(member)

    def _find_out(self, member: _Member) -> None:
        """Ask the system how a lost worker ended."""
        if self._members.get(member.identity) is not member:
            return

        def know(state: JobState | None) -> None:
            if self._members.get(member.identity) is not member:
                return  # it was cancelled meanwhile
            if state is not None:
                member.last = state
            if state is not None and state.phase is Phase.ENDED:
                self._end(member, self._how(member))
            elif not member.lost and (state is not None or member.worker.peer is not None):
                member.lost_at = None  # the query came too early, or missed the job
            elif time.monotonic() - (member.lost_at or 0.0) > _KNOW_SECONDS:
                # It is stopped, or on a node that is cut off, and would hold its resources forever.
                self._cancel(member)
                self._end(member, self._how(member))
            else:
                self._events.call_later(0.5, lambda: self._find_out(member))

        if member.batch.job_id:
            self._system.detail(member.key, know)
        else:  # it ended before the answer to its submission came
            know(None)

    def _how(self, member: _Member) -> str:
        state = member.last
        name = shown_id(*member.key)
        if state is None or state.phase is not Phase.ENDED:
            return f"job {name} lost its connection"
        advice = f"; {state.cause.advice[0].lower()}{state.cause.advice[1:]}" if state.cause.advice else ""
        return f"job {name} ended as {state.state}{state.facts()}{advice}"

    # -- states in the system -------------------------------------------------------------------------------------

    def _to_watch(self) -> list[_Member] | None:
        return [member for member in self._members.values() if member.is_watched] or None

    def _on_state(self, member: _Member, state: JobState | None) -> None:
        if state is not None:
            member.last = state
        if state is not None and state.hopeless:
            self._cancel(member)
            self._end(member, f"{self._system.name} would let it wait forever: {state.state}, {state.reason}")
        elif state is None or state.phase is Phase.ENDED:
            self._begin_to_find_out(member)

    # -- ending ---------------------------------------------------------------------------------------------------

    def _end(self, member: _Member, text: str) -> None:
        process, batch = member.process, member.batch
        del self._members[member.identity], self._by_worker[process.number], batch.members[member.index]
        if self._room is not None and batch.job_id:
            now = time.monotonic()
            self._room.ended(now)
            if self._wanted:
                self._submissions.within(max(0.0, self._room.due - now))
        process.stderr += read_tail(os.path.join(batch.directory, f"output.{member.index}"))
        planned = member.last is not None and member.last.cause.ends_early
        if not batch.members:
            # No entry has the output, because a worker prints for many calls.
            batch_directory.remove(batch.directory, but_output=True)
        self._events.on_exit(process, Exit(None, text, planned=planned))
