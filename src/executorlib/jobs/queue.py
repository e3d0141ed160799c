"""What is known of a batch queue: how to put its commands, and how to read its answers.

A `Queue` starts no process and reads no clock: it turns a `Batch` into a script and an argument list, and text into
`JobState`. Who runs the commands decides when, and never has to know which queue it is.
"""

from __future__ import annotations

import enum
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from executorlib.jobs.templates import Templates
    from executorlib.resources import Resources


class Phase(enum.Enum):
    """How far a job is."""

    PENDING = "pending"
    RUNNING = "running"
    ENDED = "ended"


class Cause(enum.Enum):
    """Why a job ended other than by its own program, in words that all queues share.

    What follows from it (advice, whether a worker is replaced) is decided by these; a queue's own words are only shown.
    `DEADLINE` is a point in time that the user gave, `TIME_LIMIT` a length of time.
    """

    NONE = "none"  # also where the queue does not say
    OUT_OF_MEMORY = "out of memory"
    TIME_LIMIT = "time limit"
    DEADLINE = "deadline"
    NODE_FAILED = "node failed"
    PREEMPTED = "preempted"
    CANCELLED = "cancelled"

    @property
    def ends_early(self) -> bool:
        """Whether the job could have gone on: where it was a worker, another one takes its place."""
        return self in (Cause.TIME_LIMIT, Cause.DEADLINE, Cause.PREEMPTED)

    @property
    def advice(self) -> str:
        """What to do, as a sentence without its full stop; empty where there is nothing to say."""
        return _ADVICE.get(self, "")


class Limit(enum.Enum):
    """Whose jobs fill a limit to how many there may be."""

    NONE = "none"  # there is no such limit, or it is not reached
    OWN = "own"
    SHARED = "shared"  # others' count, too


_ADVICE = {
    Cause.OUT_OF_MEMORY: "Give it more memory with resource_dict={'memory_max': GB}",
    Cause.TIME_LIMIT: "Give it more time with resource_dict={'run_time_max': seconds}",
    Cause.DEADLINE: "It had not ended by the deadline that it was given; give it a later one",
    Cause.NODE_FAILED: "The node failed, not the call",
    Cause.PREEMPTED: "Other jobs had priority",
    Cause.CANCELLED: "Somebody cancelled it, or an input of it failed",
}
_SIGNALS = frozenset(signal.Signals)


@dataclass(frozen=True)
class JobState:
    """What a queue says of a job.

    Attributes:
        phase: How far it is. A job that cleans up, is suspended or is being signalled still counts as running.
        state: The queue's own word, such as ``OUT_OF_MEMORY``.
        reason: Why it waits or ended, in the queue's own words; empty where it gives none.
        exit_code: ``exit code:signal``, or the exit code alone; empty where it is not known.
        node: Where it ran or runs; empty where it did not, or that is not known.
        hopeless: Whether a job that waits will not start unless somebody changes the job or the limits that hold it.
        cause: Why it ended, if not by its own program, or cannot start; else `Cause.NONE`.
        held: Whether an administrator has it wait.
    """

    phase: Phase
    state: str
    reason: str = ""
    exit_code: str = ""
    node: str = ""
    hopeless: bool = False
    cause: Cause = Cause.NONE
    held: bool = False

    @property
    def code(self) -> int:
        """The number before the colon in `exit_code`; -1 where the queue does not tell it."""
        text = self.exit_code.partition(":")[0]
        return int(text) if text.isdigit() else -1

    @property
    def signal_number(self) -> int:
        """The number after the colon in `exit_code`, 0 where there is none."""
        text = self.exit_code.partition(":")[2]
        return int(text) if text.isdigit() else 0

    @property
    def died_of(self) -> int:
        """The signal that it died of, 0 where that is not known; a shell reports it as 128 more than its number."""
        number = self.signal_number or self.code - 128
        return number if number in _SIGNALS else 0

    def facts(self) -> str:
        """What is known beside the state, for an error text: empty, or in parentheses after a space."""
        died_of = f" by {signal.Signals(self.died_of).name}" if self.died_of else ""
        exit_code = self.exit_code and self.exit_code + died_of
        known = (("reason", self.reason), ("exit code", exit_code), ("node", self.node))
        listed = ", ".join(f"{what} {value}" for what, value in known if value)
        return f" ({listed})" if listed else ""


@dataclass(frozen=True)
class Dependency:
    """A job that has to succeed before another starts.

    Attributes:
        job_id: The job.
        index: Which element of an array; None for a plain job, or for all elements of an array.
        corresponding: Whether each element waits only for that of the same index, instead of all for what `index` says.
            Both jobs are arrays then.
    """

    job_id: str
    index: int | None = None
    corresponding: bool = False


@dataclass(frozen=True)
class Batch:
    """Calls with the same needs, submitted together: a job array, or a plain job where it is one call.

    Attributes:
        name: Name of the job, where the user gave none as ``job_name``.
        directory: Absolute path of the batch's directory, which receives ``output.<index>``.
        command: Shell command that the job runs.
        count: Number of calls.
        resources: What each call needs.
        template_values: Further keys of ``resource_dict``, for the template.
        cwd: Absolute path of the directory in which the job starts.
        dependencies: Jobs that have to succeed first; of a queue without dependencies, none.
        first: Index of the first call; the others follow. Above 0 it is a job array, even with one call.
    """

    name: str
    directory: str
    command: str
    count: int
    resources: Resources
    template_values: Mapping[str, Any]
    cwd: str
    dependencies: tuple[Dependency, ...] = ()
    first: int = 0


def shown_id(job_id: str, index: int | None) -> str:
    """What users find a job by: its id, and the index where it is an element of an array."""
    if index is None:
        return job_id
    # Ids of arrays that are not numbers alone have a place for it.
    return f"{job_id[:-1]}{index}]" if job_id.endswith("[]") else f"{job_id}_{index}"


def means(noted: str, name: str) -> bool:
    """Whether the system that an entry notes is the one of this name.

    Who could not find out which of its kind it is has noted only the beginning of the name.
    """
    return f"{name} ".startswith(f"{noted} ")


class Queue(Protocol):
    """A batch queue's language: all that is known of one kind of queue, and nowhere else. `registry` finds it.

    Attributes:
        title: What the system is called as long as its settings are not known.
        settings_command: The command that tells what there is to know of a system; empty where nothing is asked.
        default_template: The job script of calls for which no other one is given; None where there is none.
        has_pmi_modes: Whether the system starts ranks itself, where a ``pmi_mode`` is given.
    """

    title: ClassVar[str]
    settings_command: ClassVar[Sequence[str]]
    default_template: ClassVar[str | None]
    has_pmi_modes: ClassVar[bool]

    @classmethod
    def from_settings(cls, output: str, templates: Templates) -> Queue:
        """The language of one system.

        Args:
            output: What `settings_command` printed; empty where it failed, or there is none.
            templates: Where job scripts come from.

        Raises:
            ImportError: A package is missing that reads the answers; the text says what to do.
        """
        ...

    @staticmethod
    def command_environment(environ: Mapping[str, str]) -> dict[str, str]:
        """The environment for the queue's commands, from that of this process."""
        ...

    @staticmethod
    def rank_command(
        resources: Resources, pmi_mode: str | None, program: Sequence[str], mpiexec: str = "mpiexec"
    ) -> list[str]:
        """The command, in a job, that runs a program on all ranks of a call.

        Args:
            resources: What the call needs.
            pmi_mode: How the system and the MPI library find each other; None where `mpiexec` starts the ranks.
            program: Program and arguments.
            mpiexec: The MPI library's own starter.
        """
        ...

    @staticmethod
    def problem_with(folder: str) -> str:
        """Why no job can have its output files in a folder, as the end of a sentence about it; empty if they can."""
        ...

    @property
    def submit_program(self) -> str:
        """The command that submits a script, without which nothing can be submitted from here."""
        ...

    @property
    def name(self) -> str:
        """Which system it is, as `JobSystem.name` has it."""
        ...

    @property
    def array_limit(self) -> int:
        """Most calls in one batch; 1 for a queue without job arrays."""
        ...

    @property
    def id_variables(self) -> tuple[str, ...]:
        """The environment variables by which a job is told its id, in the form of `parse_job_id`; the first counts."""
        ...

    @property
    def element_variables(self) -> tuple[str, ...]:
        """The environment variables by which a job is told its index in its array; none without job arrays."""
        ...

    @property
    def local_rank_variables(self) -> tuple[str, ...]:
        """The environment variables by which the system tells a rank its number among those of its node."""
        ...

    @property
    def history_delay(self) -> float:
        """How long after a job's end `detail_command` may not know of it yet, in seconds."""
        ...

    @property
    def has_dependencies(self) -> bool:
        """Whether the queue takes care of `Batch.dependencies`; else whoever submits waits for inputs first."""
        ...

    @property
    def waits_for_elements(self) -> bool:
        """Whether it takes care of dependencies on elements of arrays, too, and not of those on whole jobs alone."""
        ...

    @property
    def codes_of_the_gone(self) -> frozenset[int]:
        """Exit codes beside 0 of commands that did what they were told, but for jobs that are gone."""
        ...

    @property
    def cancels_the_gone(self) -> bool:
        """Whether `cancel_command` may name jobs that are gone; else only those are that `parse_status` tells of."""
        ...

    def handed_on(self, environ: Mapping[str, str]) -> dict[str, str]:
        """The variables of this process's environment that jobs are to have, unless they have such ones already.

        None of a queue that hands on the environment by itself. They are kept in a file that only the user can read.
        """
        ...

    def script(self, batch: Batch) -> str:
        """The text of the job script.

        Raises:
            ValueError: The template cannot be rendered, or the values do not fit the queue.
            ImportError: pysqa is not installed; the text says what to do.
        """
        ...

    def unused(self, batch: Batch) -> list[str]:
        """The keys of ``resource_dict`` that are set and have no effect with this template, for a warning."""
        ...

    def submit_command(self, batch: Batch, script_path: str) -> list[str]:
        """The command that submits the script.

        Raises:
            ValueError: Options of the user's would break what has to hold.
        """
        ...

    def parse_job_id(self, output: str) -> str:
        """The job's id, from the standard output of the submission.

        Raises:
            ValueError: There is none in it.
        """
        ...

    def is_transient(self, error_text: str) -> bool:
        """Whether a command that failed, saying this, may succeed when repeated as it is."""
        ...

    def limit_in(self, error_text: str) -> Limit:
        """Whether a submission that failed, saying this, was refused because there are, or would be, too many jobs."""
        ...

    def status_command(self, job_ids: Sequence[str]) -> list[str]:
        """One query for all of these jobs."""
        ...

    def parse_status(self, output: str, job_ids: Sequence[str]) -> dict[tuple[str, int | None], JobState]:
        """States by job id and array index (0 for a plain job). Jobs that the queue no longer knows are absent.

        Args:
            output: What the query printed.
            job_ids: The jobs that were asked for. Of others only some state is told, at the index None.

        Raises:
            ValueError: The output is incomplete; what is absent from it cannot be told from what is gone.
        """
        ...

    def detail_command(self, job_id: str, index: int | None) -> list[str]:
        """The query for what became of one job; empty where there is nothing to ask."""
        ...

    def parse_detail(self, output: str) -> JobState | None:
        """How the job of `detail_command` ended; None where the queue does not know it (any more)."""
        ...

    def cause_in(self, output: str) -> Cause:
        """Why a job ended, where the queue says so only in what it adds to the job's output.

        Args:
            output: The end of the output.
        """
        ...

    def cancel_command(self, jobs: Sequence[tuple[str, int | None]]) -> list[str]:
        """The command that cancels jobs, or elements of job arrays; None stands for the whole job."""
        ...
