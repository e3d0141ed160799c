"""What is known of a job: its call, its batch, and how it ended."""

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
    from executorlib.jobs.system import JobSystem

# How long an entry of another machine's session may lack a job id, in seconds, before that session counts as dead.
SUBMIT_SECONDS = 600.0

_OUTPUT_TAIL_BYTES = 16 * 1024
_GENERAL_ADVICE = "Only this call fails; it can be submitted again."


# What tells a file from another that takes its place.
Identity: TypeAlias = tuple[int, int, int]


class Job:
    """A call on its way through the system.

    Attributes:
        process: The worker that the job is.
        task: The call.
        path: The entry's file while it waits or runs.
        output: The entry's file once it is done.
        root: The cache directory.
        batch: The batch that runs it, maybe another session's; None where that is not known.
        index: Its place in the batch.
        claimed: Whether it runs this very call, and not an equal one, of this session or another.
        changes: How often the call has become another one as it was pickled.
        again: Whether it was claimed, or followed, before; those that depend on it know it by its key.
        begun: Whether it is known to run.
        seen: Whether the system was seen to have it.
        over: Whether its end is known, with or without a result.
        gone_since: When the system was first seen without it, or with it ended.
        last: What the system said of it last.
        asked: Whether the system was asked what became of it.
        answered: Whether it has answered that.
        damaged: What tells the file that is in the place of its result, but cannot be read, from a later one.
        unreadable: The same of its entry, and since when that is so.
        ending: Its result.
    """

    def __init__(self, process: Process, task: Task, path: str) -> None:
        self.process = process
        self.task = task
        self.path = path
        self.output = entries.output_of(path)
        self.root = task.resources.cache_directory
        self.batch: JobBatch | None = None
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
        """What the system calls it; None where it was not submitted (yet)."""
        return None if self.batch is None else self.batch.ids.of(self.index)

    @property
    def key(self) -> tuple[str, int | None]:
        """What the system calls it, once it was submitted."""
        submitted = self.submitted
        assert submitted is not None
        return submitted

    def trade_places(self, other: Job) -> None:
        """Stand for the call of another one, which waits for the same job, and have that stand for this one's."""
        self.process, other.process = other.process, self.process
        self.task, other.task = other.task, self.task
        self.begun, other.begun = other.begun, self.begun
        self.claimed = False

    def start_over(self) -> None:
        """Forget what was known of a job that another session submitted, and that is dead."""
        self.batch, self.gone_since, self.asked, self.last, self.seen = None, None, False, None, False
        self.claimed, self.again = False, True

    def ended_well(self, codes: tuple[int, ...]) -> bool:
        """Whether it ended, by itself, with one of these exit codes, by which a job says that it left a result."""
        state = self.last
        if state is None or state.cause is not Cause.NONE:
            return False  # whatever exit code the system makes up for it
        return state.code in codes and state.signal_number == 0

    def ended_unseen(self) -> bool:
        """Whether it has ended just now, and nobody knows how, so that it may have left a result."""
        state, batch = self.last, self.batch
        is_unknown = state is None or (state.cause is Cause.NONE and not state.exit_code)
        return is_unknown and (self.seen or (batch is not None and batch.ours))

    def error(self, system: JobSystem) -> BaseException:
        """Why there is no result.

        Args:
            system: What it was submitted to.
        """
        state, task, batch = self.last, self.task, self.batch
        assert batch is not None
        name = f"job {shown_id(*self.key)}"
        subject = f"Call {task.number} of {task.name} has no result: {name}"
        tail = tail_text(read_tail(os.path.join(batch.directory, f"output.{self.index}")))
        said = f" Its output ended with:\n{tail}" if tail else " It wrote no output."
        if state is None:
            text = f"{subject} is not known to {system.name} any more, and left no result in {self.output}."
            return ExecutorlibSocketError(f"{text} {_GENERAL_ADVICE}{said}")
        if state.phase is not Phase.ENDED:
            advice = state.cause.advice or "Change what the call asks for in its resource_dict"
            return ExecutorlibSocketError(
                f"{subject} would wait for ever and was cancelled: {system.name} has it as "
                f"{state.state}{state.facts()}. {advice}; only this call fails."
            )
        text = f"{subject} ended as {state.state}{state.facts()}."
        if self.damaged is not None:
            text += f" What it left in {self.output} cannot be read."
        limit = task.resources.run_time_max
        # MPICH's mpiexec exits with the number of the signal that a rank died of.
        alarmed = signal.SIGALRM in (state.died_of, state.code if task.resources.cores > 1 else 0)
        if limit is not None and (state.cause is Cause.TIME_LIMIT or alarmed):
            told = f"{text} It ran longer than its run_time_max of {limit:g} s; give it more time."
            return TimeLimitError(f"{told}{said}")
        cause = state.cause if state.cause is not Cause.NONE else system.cause_in(tail)
        advice = f"{cause.advice}. {_GENERAL_ADVICE}" if cause.advice else _GENERAL_ADVICE
        return ExecutorlibSocketError(f"{text} {advice}{said}")


class JobBatch:
    """Calls that are submitted together, by this session or another; in parts, where a limit lets in no more.

    Attributes:
        directory: Its files.
        ours: Whether this session submits it.
        key: What its calls have in common.
        name: The function of its first call.
        jobs: Its calls by index, as long as they are not over.
        first: Index of the first call.
        size: Number of calls that it has had.
        ids: What the system calls what was submitted.
        after: Jobs that have to succeed first.
        corresponds: Batch of which each job has to succeed before the one of the same index here.
        cancelled: Indices of calls that were cancelled before the job's id was known.
        kept: By index, how many bytes of what a call's job printed are in its entry.
        made: When it was begun.
        touched: When the last call was added.
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
        self.corresponds: JobBatch | None = None
        self.cancelled: set[int] = set()
        self.kept: dict[int, int] = {}
        self.made = self.touched = time.monotonic()
        self._indices: dict[str, int] | None = None

    def read_entries(self) -> bool:
        """Find out which entries a batch of another session has; False where no file tells (yet), or a damaged one.

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
        """Find out which jobs a batch of another session became; returns whether there are any (yet).

        Raises:
            UntrustedFile: Anybody could have put a file there.
            OSError: The list of its entries cannot be read.
        """
        # In this order: once there is a job, the list is complete.
        is_submitted = bool(batch_directory.JobIds.read(self.directory, 0))
        if is_submitted and self.read_entries():
            self.ids = batch_directory.JobIds.read(self.directory, max((self._indices or {}).values(), default=0))
        return is_submitted

    @property
    def last(self) -> int:
        """Index of the last call."""
        return self.first + self.size - 1

    @property
    def has_entries(self) -> bool:
        """Whether the entries of a batch of another session are known."""
        return self._indices is not None

    def index_of(self, path: str) -> int | None:
        """The place of an entry in a batch of another session; None where that is not known."""
        return (self._indices or {}).get(path)

    def remove_files(self) -> None:
        """Remove its directory, unless its jobs have printed something that is kept nowhere else."""
        if not self.ours and not self.kept.keys() >= set((self._indices or {"": -1}).values()):
            return  # others may wait for calls of which nothing is known here
        with contextlib.suppress(OSError):
            for name, status in trust.listed(self.directory, batch_directory.root_of(self.directory)):
                output, _, index = name.partition(".")
                if output == "output" and status.st_size > (self.kept.get(int(index), 0) if index.isdecimal() else 0):
                    return
            batch_directory.remove(self.directory)

    def is_abandoned(self) -> bool:
        """Whether the session that made it ended before submitting it; a job that runs all the same will notice."""
        owner = owner_of(self.directory)
        if owner.get("host") != socket.gethostname() or "pid" not in owner:
            return not trust.is_there(self.directory) or trust.is_older(self.directory, SUBMIT_SECONDS)
        return not machine.is_running(owner["pid"], owner.get("started", ""))


def owner_of(directory: str) -> dict[str, Any]:
    """Who submits, or has submitted, a batch; empty where that is not known."""
    try:
        owner = json.loads(batch_directory.read_text(directory, batch_directory.OWNER_FILE) or "{}")
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def read_tail(path: str) -> bytes:
    """The end of a job's output; empty where there is none."""
    try:
        return trust.read(path, last=_OUTPUT_TAIL_BYTES)
    except OSError:
        return b""
