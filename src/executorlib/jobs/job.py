"""The record of a job: its call, the states that it may pass through, and how it ended."""

from __future__ import annotations

import contextlib
import enum
import os
import signal
from typing import TYPE_CHECKING, TypeAlias

from executorlib import machine
from executorlib.cache import entries, trust
from executorlib.errors import ExecutorlibSocketError, TimeLimitError
from executorlib.jobs.queue import Cause, JobState, Phase, shown_id
from executorlib.launchers.contract import Process
from executorlib.launchers.last_output import tail_text

if TYPE_CHECKING:
    from executorlib.core.task import Task
    from executorlib.jobs.batch import Batch
    from executorlib.jobs.system import BatchSystem, JobKey

_OUTPUT_TAIL_BYTES = 16 * 1024
_GENERAL_ADVICE = "Only this call fails; it can be submitted again."


# Distinguishes a file from another one that takes its place.
Identity: TypeAlias = tuple[int, int, int]


class State(enum.Enum):
    """The progress of a call through the system."""

    UNCLAIMED = "nobody runs it, as far as this session knows"
    FREE = "the job that it followed is dead, or ran something else, so somebody has to claim it again"
    FOLLOWING = "waits for the job of an equal call, of this session or another"
    CLAIMED = "its entry is this session's, which submits it or has done so"
    FOUND = "its result is there, and passed on once the loop has heard that the call runs"
    ENDED = "over, with or without a result"
    LEFT = "goes on without this session, or as another record"


UNCLAIMED, FREE, FOLLOWING, CLAIMED = State.UNCLAIMED, State.FREE, State.FOLLOWING, State.CLAIMED
FOUND, ENDED, LEFT = State.FOUND, State.ENDED, State.LEFT

LEGAL_MOVES: dict[State, frozenset[State]] = {
    UNCLAIMED: frozenset({FOLLOWING, CLAIMED, ENDED, LEFT}),
    FREE: frozenset({FOLLOWING, CLAIMED, ENDED, LEFT}),
    # FOLLOWING → FOLLOWING: more has become known about the job that it follows.
    FOLLOWING: frozenset({FOLLOWING, FREE, CLAIMED, FOUND, ENDED, LEFT}),
    # CLAIMED → FOLLOWING: the call was killed, and the job goes on for an equal one. CLAIMED → FREE: another session
    # believed this one to be dead, and has claimed the call.
    CLAIMED: frozenset({FOLLOWING, FREE, FOUND, ENDED, LEFT}),
    FOUND: frozenset({ENDED, LEFT}),
    ENDED: frozenset(),
    LEFT: frozenset(),
}


class Known(enum.Enum):
    """The last news of a job from the system."""

    NOTHING = "the system has not been asked"
    ALIVE = "it waits or runs"
    GONE = "it has ended, or the system does not have it"
    ASKED = "it is gone, and the system was asked how it ended"
    TOLD = "it is gone, and the system has answered that"


class Presence:
    """One job in the system, as seen from here.

    Attributes:
        known: What is known about it.
        since: The time when the system first did not have it any more, or had it as ended; for one that is gone.
        last: Its last state in the system.
        seen: Whether the system has been seen to have it.
    """

    def __init__(self) -> None:
        self.known = Known.NOTHING
        self.since = 0.0
        self.last: JobState | None = None
        self.seen = False

    @property
    def is_gone(self) -> bool:
        """True while the system does not have it, or has it as ended."""
        return self.known not in (Known.NOTHING, Known.ALIVE)

    def hear(self, state: JobState | None, now: float) -> None:
        """Note its state; None if the system does not have it."""
        if state is not None:
            self.last, self.seen = state, True
        if state is not None and state.phase is not Phase.ENDED:
            self.known = Known.ALIVE  # the query before came too early, or it was put back into the queue
        elif not self.is_gone:
            self.known, self.since = Known.GONE, now

    def ask(self) -> bool:
        """Return whether to ask the system how it ended, which is done once."""
        if self.known is not Known.GONE or (self.last is not None and self.last.phase is Phase.ENDED):
            return False
        self.known = Known.ASKED
        return True

    def tell(self, end: JobState | None) -> None:
        """Note the system's answer to that; None if it does not know."""
        if self.known is Known.ASKED:  # otherwise it has come back meanwhile
            self.last = end
            self.known = Known.TOLD if end is None or end.phase is Phase.ENDED else Known.ALIVE


class Job:
    """A call on its way through the system.

    Attributes:
        process: The worker that this job stands for. It has a transport once the call is known to run.
        task: The call.
        path: The entry's file while the call waits or runs.
        output: The entry's file once the call is done.
        root: The cache directory.
        state: Current state; only the methods below change it.
        batch: The batch that runs it, maybe another session's; None if that is not known.
        index: Its place in the batch.
        changes: How often the call has become another one while it was pickled.
        presence: The job in the system.
        passed_over: The identity of a file in the place of its result that is not its result.
        damaged: Whether that file appeared while the job ran or had ended, and cannot be read.
        unreadable: The identity of its entry, if that cannot be read, and since when.
        ending: Its result, in the state `FOUND`.
    """

    def __init__(self, process: Process, task: Task, path: str, changes: int = 0) -> None:
        self.process = process
        self.task = task
        self.path = path
        self.output = entries.output_of(path)
        self.root = task.resources.cache_directory
        self.state = UNCLAIMED
        self.batch: Batch | None = None
        self.index = 0
        self.changes = changes
        self.presence = Presence()
        self.passed_over: Identity | None = None
        self.damaged = False
        self.unreadable: tuple[Identity, float] | None = None
        self.ending: entries.Ending | None = None

    @property
    def number(self) -> int:
        """The worker's number."""
        return self.process.number

    @property
    def is_on_local_disk(self) -> bool:
        """True if no other machine writes its files."""
        return machine.is_local_disk(self.root or "/")

    def may_be_done(self) -> bool:
        """Return whether there is a file in the place of its result, other than the one that is passed over."""
        return trust.is_there(self.output) and (
            self.passed_over is None or identity_of(self.output) != self.passed_over
        )

    def remove_input(self) -> None:
        """Remove the entry of a job that is over, unless another session has claimed the call by now.

        If that fails, whoever finds the entry sees that its job is dead.
        """
        with contextlib.suppress(OSError):
            if not self.is_taken_over():
                entries.remove_input(self.path, self.root)

    def is_taken_over(self) -> bool:
        """Return whether another session believed this one to be dead, and has claimed the call.

        Raises:
            OSError: The entry cannot be read.
        """
        assert self.batch is not None
        return entries.claimed_for(self.path, self.root) not in (None, self.batch.directory)

    # -- its states -----------------------------------------------------------------------------------------------

    def claim(self, batch: Batch, index: int) -> None:
        """Note that the entry is this session's, and is submitted in this batch."""
        self._move(CLAIMED)
        self.batch, self.index = batch, index

    def follow(self, batch: Batch | None, index: int) -> None:
        """Note that an equal call runs, in this batch; None if the batch is not known."""
        self._move(FOLLOWING)
        if batch is not self.batch:
            self.presence, self.damaged = Presence(), False
        self.batch, self.index = batch, index

    def trade_places(self, other: Job) -> None:
        """Swap calls with another record that waits for the same job."""
        self.follow(self.batch, self.index)
        self.process, other.process = other.process, self.process
        self.task, other.task = other.task, self.task

    def free(self) -> None:
        """Forget everything about a job that is dead, or ran something else."""
        self._move(FREE)
        self.batch, self.index, self.presence = None, 0, Presence()
        self.damaged, self.unreadable = False, None

    def find(self, ending: entries.Ending) -> None:
        """Note its result."""
        self._move(FOUND)
        self.ending = ending

    def end(self) -> None:
        """Note that the call is over."""
        self._move(ENDED)
        self.ending = None  # later jobs refer to this one longer than the result is needed

    def leave(self) -> None:
        """Note that this session no longer waits for it."""
        self._move(LEFT)
        self.ending = None

    def _move(self, state: State) -> None:
        if state not in LEGAL_MOVES[self.state]:
            raise RuntimeError(f"call {self.task.number}: illegal move from {self.state.name} to {state.name}")
        self.state = state

    @property
    def over(self) -> bool:
        """True if its end is known, with or without a result."""
        return self.state in (FOUND, ENDED)

    # -- in the system --------------------------------------------------------------------------------------------

    @property
    def submitted(self) -> JobKey | None:
        """Its id and index in the system; None if it has not been submitted (yet)."""
        return None if self.batch is None else self.batch.ids.of(self.index)

    @property
    def key(self) -> JobKey:
        """Its id and index in the system, once it has been submitted."""
        submitted = self.submitted
        assert submitted is not None
        return submitted

    @property
    def who(self) -> str:
        """The call that waits for it."""
        return f"call {self.task.number} of {self.task.name}"

    @property
    def is_watched(self) -> bool:
        """True while its state in the system matters."""
        return self.state in (FOLLOWING, CLAIMED) and self.submitted is not None

    # -- its end --------------------------------------------------------------------------------------------------

    def ended_well(self, codes: tuple[int, ...]) -> bool:
        """Return whether it ended by itself with one of these exit codes, which say that it has left a result."""
        state = self.presence.last
        if state is None or state.cause is not Cause.NONE:
            return False  # the system may have made up its exit code
        return state.code in codes and state.signal_number == 0

    def ended_unseen(self) -> bool:
        """Return whether it has ended just now and nobody knows how, so that it may have left a result."""
        state, batch = self.presence.last, self.batch
        is_unknown = state is None or (state.cause is Cause.NONE and not state.exit_code)
        return is_unknown and (self.presence.seen or (batch is not None and batch.ours))

    def error(self, system: BatchSystem) -> BaseException:
        """Make the error that says why there is no result.

        Args:
            system: The system that it was submitted to.
        """
        state, task, batch = self.presence.last, self.task, self.batch
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
        if self.damaged:
            text += f" Its result in {self.output} cannot be read."
        elif self.ended_well((0,)):
            text += (
                " The exit code says that it left a result. A function that ends its process (os._exit) leaves none."
            )
        limit = task.resources.run_time_max
        # MPICH's mpiexec exits with the number of the signal that a rank died of.
        alarmed = signal.SIGALRM in (state.died_of, state.code if task.resources.cores > 1 else 0)
        if limit is not None and (state.cause is Cause.TIME_LIMIT or alarmed):
            told = f"{text} It ran longer than its run_time_max of {limit:g} s; give it more time."
            return TimeLimitError(f"{told}{said}")
        cause = state.cause if state.cause is not Cause.NONE else system.cause_in(tail)
        advice = f"{cause.advice}. {_GENERAL_ADVICE}" if cause.advice else _GENERAL_ADVICE
        return ExecutorlibSocketError(f"{text} {advice}{said}")


def identity_of(path: str) -> Identity | None:
    """Return the identity of a file, which differs from that of any that takes its place; None if there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def read_tail(path: str) -> bytes:
    """Read the end of a job's output; empty if there is none."""
    try:
        return trust.read(path, last=_OUTPUT_TAIL_BYTES)
    except OSError:
        return b""
