"""The record of a job: its call, its batch, and how it ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import time
from typing import TYPE_CHECKING, Any, TypeAlias

from executorlib import machine
from executorlib.cache import batch_directory, entries, trust
from executorlib.errors import ExecutorlibSocketError, TimeLimitError
from executorlib.jobs.queue import Cause, JobState, Phase, shown_id
from executorlib.launchers.contract import Process, tail_text

if TYPE_CHECKING:
    from executorlib.core.task import Task
    from executorlib.jobs.system import BatchSystem

# Seconds that an entry of another machine's session may lack a job id before that session counts as dead.
SUBMIT_SECONDS = 600.0

_OUTPUT_TAIL_BYTES = 16 * 1024
_GENERAL_ADVICE = "Only this call fails; it can be submitted again."


# Distinguishes a file from another one that takes its place.
Identity: TypeAlias = tuple[int, int, int]


class Job:
    """A call on its way through the system.

    Attributes:
        process: The worker that this job stands for.
        task: The call.
        path: The entry's file while the call waits or runs.
        output: The entry's file once the call is done.
        root: The cache directory.
        batch: The batch that runs it, maybe another session's; None if that is not known.
        index: Its place in the batch.
        claimed: Whether it runs this very call, and not an equal one of this session or another.
        changes: How often the call has become another one while it was pickled.
        again: Whether it was claimed or followed before, so that its dependents know it by its key.
        begun: Whether it is known to run.
        seen: Whether the system has been seen to have it.
        over: Whether its end is known, with or without a result.
        gone_since: The time when the system first did not have it any more, or had it as ended.
        last: Its last state in the system.
        asked: Whether the system was asked how it ended.
        answered: Whether the system has answered that.
        damaged: The identity of the file that is in the place of its result but cannot be read.
        unreadable: The identity of its entry, if that cannot be read, and since when.
        ending: Its result.
    """

    def __init__(self, process: Process, task: Task, path: str) -> None:
        self.process = process
        self.task = task
        self.path = path
        self.output = entries.output_of(path)
        self.root = task.resources.cache_directory
        self.batch: Batch | None = None
        self.index = 0
        self.claimed = False
        self.changes = 0
        self.again = False
        self.begun = False
        self.seen = False
        self.over = False
        self.gone_since: float | None = None
        self.last: JobState | None = None
        self.asked = False
        self.answered = False
        self.damaged: Identity | None = None
        self.unreadable: tuple[Identity, float] | None = None
        self.ending: entries.Ending | None = None

    @property
    def submitted(self) -> tuple[str, int | None] | None:
        """Its id and index in the system; None if it has not been submitted (yet)."""
        return None if self.batch is None else self.batch.ids.of(self.index)

    @property
    def key(self) -> tuple[str, int | None]:
        """Its id and index in the system, once it has been submitted."""
        submitted = self.submitted
        assert submitted is not None
        return submitted

    def trade_places(self, other: Job) -> None:
        """Swap calls with another record that waits for the same job."""
        self.process, other.process = other.process, self.process
        self.task, other.task = other.task, self.task
        self.begun, other.begun = other.begun, self.begun
        self.claimed = False

    def start_over(self) -> None:
        """Forget everything about a dead job that another session submitted."""
        self.batch, self.gone_since, self.asked, self.last, self.seen = None, None, False, None, False
        self.claimed, self.again = False, True

    def ended_well(self, codes: tuple[int, ...]) -> bool:
        """Return whether it ended by itself with one of these exit codes, which say that it has left a result."""
        state = self.last
        if state is None or state.cause is not Cause.NONE:
            return False  # the system may have made up its exit code
        return state.code in codes and state.signal_number == 0

    def ended_unseen(self) -> bool:
        """Return whether it has ended just now and nobody knows how, so that it may have left a result."""
        state, batch = self.last, self.batch
        is_unknown = state is None or (state.cause is Cause.NONE and not state.exit_code)
        return is_unknown and (self.seen or (batch is not None and batch.ours))

    def error(self, system: BatchSystem) -> BaseException:
        """Make the error that says why there is no result.

        Args:
            system: The system that it was submitted to.
        """
        state, task, batch = self.last, self.task, self.batch
        assert batch is not None
        name = f"job {shown_id(*self.key)}"
        subject = f"Call {task.number} of {task.name} has no result: {name}"
        tail = tail_text(read_tail(os.path.join(batch.directory, f"output.{self.index}")))
        said = f" Its output ended with:\n{tail}" if tail else " It wrote no output."
        if state is None:
            text = f"{subject} is no longer known to {system.name} and left no result in {self.output}."
            return ExecutorlibSocketError(f"{text} {_GENERAL_ADVICE}{said}")
        if state.phase is not Phase.ENDED:
            advice = state.cause.advice or "Change what the call asks for in its resource_dict"
            return ExecutorlibSocketError(
                f"{subject} would wait forever and was cancelled: {system.name} reports it as "
                f"{state.state}{state.facts()}. {advice}; only this call fails."
            )
        text = f"{subject} ended as {state.state}{state.facts()}."
        if self.damaged is not None:
            text += f" Its result in {self.output} cannot be read."
        limit = task.resources.run_time_max
        # MPICH's mpiexec exits with the number of the signal that a rank died of.
        alarmed = signal.SIGALRM in (state.died_of, state.code if task.resources.cores > 1 else 0)
        if limit is not None and (state.cause is Cause.TIME_LIMIT or alarmed):
            told = f"{text} It ran longer than its run_time_max of {limit:g} s; give it more time."
            return TimeLimitError(f"{told}{said}")
        cause = state.cause if state.cause is not Cause.NONE else system.cause_in(tail)
        advice = f"{cause.advice}. {_GENERAL_ADVICE}" if cause.advice else _GENERAL_ADVICE
        return ExecutorlibSocketError(f"{text} {advice}{said}")


class Batch:
    """Calls that are submitted together, by this session or another, or in parts if a limit does not admit all.

    Attributes:
        directory: The directory of its files.
        ours: Whether this session submits it.
        key: The values that all its calls share.
        name: The function of its first call.
        jobs: Its calls by index, as long as they are not over.
        first: The index of the first call.
        size: The number of calls that it has had.
        ids: The ids of the jobs that were submitted.
        after: The jobs that have to succeed first.
        corresponds: Another batch. Each of its jobs has to succeed before the job of the same index here.
        cancelled: The indices of calls that were cancelled before the job's id was known.
        kept: By index, how many bytes of a job's output are in its entry.
        made: The time when it was begun.
        touched: The time when the last call was added.
    """

    def __init__(self, directory: str, ours: bool, key: Any = None, first: int = 0) -> None:
        self.directory = directory
        self.ours = ours
        self.key = key
        self.name = ""
        self.jobs: dict[int, Job] = {}
        self.first = first
        self.size = 0
        self.ids = batch_directory.JobIds()
        self.after: list[Job] = []
        self.corresponds: Batch | None = None
        self.cancelled: set[int] = set()
        self.kept: dict[int, int] = {}
        self.made = self.touched = time.monotonic()
        self._indices: dict[str, int] | None = None

    def read_entries(self) -> bool:
        """Read which entries a batch of another session has; False if the file is missing (so far) or damaged.

        Raises:
            OSError: The file cannot be read.
        """
        if self._indices is None:
            try:
                self._indices = {entry: index for index, entry in batch_directory.entries_of(self.directory).items()}
            except (FileNotFoundError, ValueError):
                return False
        return True

    def read_ids(self) -> bool:
        """Read which jobs a batch of another session became; returns whether there are any (yet).

        Raises:
            UntrustedFile: Anybody could have written the file.
            OSError: The list of its entries cannot be read.
        """
        # The order matters: once there is a job, the list is complete.
        is_submitted = bool(batch_directory.JobIds.read(self.directory, 0))
        if is_submitted and self.read_entries():
            self.ids = batch_directory.JobIds.read(self.directory, max((self._indices or {}).values(), default=0))
        return is_submitted

    @property
    def last(self) -> int:
        """The index of the last call."""
        return self.first + self.size - 1

    @property
    def has_entries(self) -> bool:
        """True if the entries of a batch of another session are known."""
        return self._indices is not None

    def index_of(self, path: str) -> int | None:
        """The place of an entry in a batch of another session; None if that is not known."""
        return (self._indices or {}).get(path)

    def remove_files(self) -> None:
        """Remove its directory, unless that has the only copy of something that its jobs have printed."""
        if not self.ours and not self.kept.keys() >= set((self._indices or {"": -1}).values()):
            return  # other sessions may wait for calls that are not known here
        with contextlib.suppress(OSError):
            for name, status in trust.listed(self.directory, batch_directory.root_of(self.directory)):
                output, _, index = name.partition(".")
                if output == "output" and status.st_size > (self.kept.get(int(index), 0) if index.isdecimal() else 0):
                    return
            batch_directory.remove(self.directory)

    def is_abandoned(self) -> bool:
        """Return whether the session that made it ended before submitting it. A job that runs anyway will notice."""
        owner = owner_of(self.directory)
        if owner.get("host") != socket.gethostname() or "pid" not in owner:
            return not trust.is_there(self.directory) or trust.is_older(self.directory, SUBMIT_SECONDS)
        return not machine.is_running(owner["pid"], owner.get("started", ""))


def owner_of(directory: str) -> dict[str, Any]:
    """Read the record of the session that submits, or has submitted, a batch; empty if that is not known."""
    try:
        owner = json.loads(batch_directory.read_text(directory, batch_directory.OWNER_FILE) or "{}")
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def read_tail(path: str) -> bytes:
    """Read the end of a job's output; empty if there is none."""
    try:
        return trust.read(path, last=_OUTPUT_TAIL_BYTES)
    except OSError:
        return b""
