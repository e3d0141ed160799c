"""The language of a batch queue: how to write its commands, and how to read its answers.

A `Dialect` starts no process and reads no clock. It turns a `Submission` into a script and an argument list, and text
into `JobState`. The code that runs the commands decides when, and never has to know which queue it is.
"""

from __future__ import annotations

import enum
import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from executorlib.jobs.ranks import mpiexec_command

if TYPE_CHECKING:
    from executorlib.jobs.templates import Templates
    from executorlib.resources import Resources


class Phase(enum.Enum):
    """The progress of a job."""

    PENDING = "pending"
    RUNNING = "running"
    ENDED = "ended"


class Cause(enum.Enum):
    """The reason why a job ended other than by its own program, in words that all queues share.

    These decide the consequences (advice, and whether a worker is replaced); a queue's own words are only shown.
    `DEADLINE` is a point in time that the user gave, `TIME_LIMIT` a length of time.
    """

    NONE = "none"  # or the queue does not tell it
    OUT_OF_MEMORY = "out of memory"
    TIME_LIMIT = "time limit"
    DEADLINE = "deadline"
    NODE_FAILED = "node failed"
    PREEMPTED = "preempted"
    CANCELLED = "cancelled"

    @property
    def ends_early(self) -> bool:
        """True if the job could have gone on. If it was a worker, another one takes its place."""
        return self in (Cause.TIME_LIMIT, Cause.DEADLINE, Cause.PREEMPTED)

    @property
    def advice(self) -> str:
        """Advice for the user, as a sentence without its full stop; empty if there is none."""
        return _ADVICE.get(self, "")


class Limit(enum.Enum):
    """The users whose jobs count under a limit on the number of jobs."""

    NONE = "none"  # there is no such limit, or it has not been reached
    OWN = "own"
    SHARED = "shared"  # other users' jobs count, too


_ADVICE = {
    Cause.OUT_OF_MEMORY: "Give it more memory with resource_dict={'memory_max': GB}",
    Cause.TIME_LIMIT: "Give it more time with resource_dict={'run_time_max': seconds}",
    Cause.DEADLINE: "It had not ended by its deadline; give it a later one",
    Cause.NODE_FAILED: "The node or the queue failed, not the call",
    Cause.PREEMPTED: "Other jobs had priority",
    Cause.CANCELLED: "Somebody cancelled it, or an input of it failed",
}
_SIGNALS = frozenset(signal.Signals)


@dataclass(frozen=True)
class JobState:
    """The state of a job, as the queue tells it.

    Attributes:
        phase: Its progress. A job that cleans up, is suspended or is being signalled still counts as running.
        state: The queue's own word, such as ``OUT_OF_MEMORY``.
        reason: Why it waits or ended, in the queue's own words; empty if there are none.
        exit_code: ``exit code:signal``, or the exit code alone; empty if it is not known.
        node: Where it ran or runs; empty if it has not run, or that is not known.
        hopeless: Whether it waits and will not start unless somebody changes the job or the limits that hold it.
        cause: Why it ended, if not by its own program, or why it cannot start; otherwise `Cause.NONE`.
        held: Whether an administrator holds it.
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
        """The number before the colon in `exit_code`; -1 if the queue does not tell it."""
        text = self.exit_code.partition(":")[0]
        return int(text) if text.isdigit() else -1

    @property
    def signal_number(self) -> int:
        """The number after the colon in `exit_code`; 0 if there is none."""
        text = self.exit_code.partition(":")[2]
        return int(text) if text.isdigit() else 0

    @property
    def died_of(self) -> int:
        """The signal that it died of; 0 if that is not known. A shell reports a signal as 128 plus its number."""
        number = self.signal_number or self.code - 128
        return number if number in _SIGNALS else 0

    def facts(self) -> str:
        """The known facts besides the state, for an error text: empty, or in parentheses after a space."""
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
        index: The element of an array; None for a plain job, or for all elements of an array.
        corresponding: Whether both jobs are arrays, and each element waits only for the element of the same index.
            Otherwise, the whole job waits for whatever `index` names.
    """

    job_id: str
    index: int | None = None
    corresponding: bool = False


@dataclass(frozen=True)
class Submission:
    """A batch, or a part of one, as a system takes it: a job array, or a plain job if it is one call.

    Attributes:
        name: The name of the job, unless the user gives a ``job_name``.
        directory: The absolute path of the batch's directory, which receives ``output.<index>``.
        command: The shell command that the job runs.
        count: The number of calls.
        resources: The resources of each call.
        template_values: Further keys of ``resource_dict``, for the template.
        cwd: The absolute path of the directory in which the job starts.
        dependencies: Jobs that have to succeed first; always empty for a queue without dependencies.
        first: The index of the first call; the others follow. Above 0, it is a job array even with one call.
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
    """The id that users see: that of the job, with the index if it is an element of an array."""
    if index is None:
        return job_id
    # PBS's ids of arrays have a place for the index.
    return f"{job_id[:-1]}{index}]" if job_id.endswith("[]") else f"{job_id}_{index}"


def same_system(noted: str, name: str) -> bool:
    """Return whether the system that an entry notes has this name.

    A session that could not find out which system of its kind it has noted only the beginning of the name.
    """
    return f"{name} ".startswith(f"{noted} ")


class Dialect:
    """The language of one kind of batch queue, as one class, which `registry` finds.

    The defaults suit a queue without job arrays, dependencies and ranks of its own.

    Args:
        templates: The templates of job scripts.

    Attributes:
        title: The system's name as long as its settings are not known.
        settings_command: The command that prints a system's settings; empty if there is nothing to ask.
        default_template: The job script of calls that bring no other; None if there is none.
        has_pmi_modes: Whether the system starts ranks itself if a ``pmi_mode`` is given.
        transient: Found in the error text of a command that may succeed if it is repeated as it is.
        limit: Found in the error text of a submission that was refused because there are too many jobs.
        job_id: Finds the job's id, as its only group, in the output of the submission; the last match counts, because
            sites may print lines of their own first.
        id_variables: The variables that hold a job's id, in the form of `parse_job_id`; the first one that is set
            counts.
        element_variables: The variables that hold a job's index in its array.
        local_rank_variables: The variables in which the system gives a rank's number among the ranks of its node.
        history_delay: Seconds after a job's end during which `detail_command` may not know of it yet.
        waits_for_elements: Whether dependencies may name elements of arrays, too, and not only whole jobs.
        codes_of_the_gone: Exit codes, besides 0, of commands that did everything except for jobs that are gone.
        cancels_the_gone: Whether `cancel_command` may name jobs that are gone; otherwise it names only those in
            `parse_status`.
    """

    title: ClassVar[str]
    settings_command: ClassVar[Sequence[str]] = ()
    default_template: ClassVar[str | None] = None
    has_pmi_modes: ClassVar[bool] = False
    transient: ClassVar[re.Pattern[str]]
    limit: ClassVar[re.Pattern[str]]
    job_id: ClassVar[re.Pattern[str]]
    id_variables: tuple[str, ...]
    element_variables: tuple[str, ...] = ()
    local_rank_variables: tuple[str, ...] = ()
    history_delay = 0.0
    waits_for_elements = False
    codes_of_the_gone: frozenset[int] = frozenset()
    cancels_the_gone = False

    def __init__(self, templates: Templates) -> None:
        self._templates = templates

    @classmethod
    def from_settings(cls, output: str, templates: Templates) -> Dialect:
        """Make the dialect of one system.

        Args:
            output: The output of `settings_command`; empty if it failed, or there is none.
            templates: The templates of job scripts.

        Raises:
            ImportError: A package that reads the answers is missing; the text says what to do.
        """
        raise NotImplementedError

    @staticmethod
    def command_environment(environ: Mapping[str, str]) -> dict[str, str]:
        """Make the environment of the queue's commands from that of this process."""
        return dict(environ)

    @staticmethod
    def rank_command(
        resources: Resources, pmi_mode: str | None, program: Sequence[str], mpiexec: str = "mpiexec"
    ) -> list[str]:
        """The command, run in a job, that starts a program on all ranks of a call.

        Args:
            resources: The resources of the call.
            pmi_mode: How the system and the MPI library find each other; None if `mpiexec` starts the ranks.
            program: Program and arguments.
            mpiexec: The path or name of the MPI library's own `mpiexec`.
        """
        return mpiexec_command(resources, program, mpiexec)

    @staticmethod
    def problem_with(folder: str) -> str:
        """Return why jobs cannot write their output into a folder, as the end of a sentence; empty if they can."""
        return ""

    @property
    def submit_program(self) -> str:
        """The command that submits a script; without it, nothing can be submitted from here."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        """The system's name, as for `BatchSystem.name`."""
        return self.title

    @property
    def array_limit(self) -> int:
        """Most calls in one submission; 1 for a queue without job arrays."""
        return 1

    @property
    def has_dependencies(self) -> bool:
        """True if the queue takes care of `Submission.dependencies`; otherwise the session waits for inputs first."""
        return False

    def handed_on(self, environ: Mapping[str, str]) -> dict[str, str]:
        """The variables of this process that jobs get, unless they have variables of these names already.

        Empty for a queue that hands on the environment by itself. They are kept in a file that only the user can read.
        """
        return {}

    def script(self, submission: Submission) -> str:
        """Render the job script.

        Raises:
            ValueError: The template cannot be rendered, or the values do not fit the queue.
            ImportError: pysqa is not installed; the text says what to do.
        """
        raise NotImplementedError

    def unused(self, submission: Submission) -> list[str]:
        """The keys of ``resource_dict`` that are set and have no effect with this template, for a warning."""
        ignored = ["slurm_cmd_args"] if submission.resources.slurm_cmd_args else []
        return self._templates.unused(submission) + ignored

    def submit_command(self, submission: Submission, script_path: str) -> list[str]:
        """The command that submits the script.

        Raises:
            ValueError: The user's options contradict ours.
        """
        raise NotImplementedError

    def parse_job_id(self, output: str) -> str:
        """Read the job's id from the standard output of the submission.

        Raises:
            ValueError: It has no id.
        """
        found = self.job_id.findall(output)
        if not found:
            raise ValueError(f"{self.submit_program} printed {output.strip()!r} instead of a job id.")
        return str(found[-1])

    def is_transient(self, error_text: str) -> bool:
        """Return whether a command that failed with this text may succeed if it is repeated as it is."""
        return self.transient.search(error_text) is not None

    def limit_in(self, error_text: str) -> Limit:
        """The limit on the number of jobs because of which a submission failed with this text, if any."""
        found = self.limit.search(error_text)
        if found is None:
            return Limit.NONE
        return Limit.OWN if self.is_own(found[0]) else Limit.SHARED

    @staticmethod
    def is_own(refusal: str) -> bool:
        """Return whether only the user's own jobs count under the limit that was found in an error text."""
        raise NotImplementedError

    def status_command(self, job_ids: Sequence[str]) -> list[str]:
        """The query for the states of all these jobs."""
        raise NotImplementedError

    def parse_status(self, output: str, job_ids: Sequence[str]) -> dict[tuple[str, int | None], JobState]:
        """Read states by job id and array index (0 for a plain job). Jobs that the queue no longer knows are absent.

        Args:
            output: The output of the query.
            job_ids: The jobs of the query. Any other job has only one state, at the index None.

        Raises:
            ValueError: The output is incomplete, so that jobs absent from it need not be gone.
        """
        raise NotImplementedError

    def detail_command(self, job_id: str, index: int | None) -> list[str]:
        """The query that tells how one job ended; empty if the queue has no such query."""
        return []

    def parse_detail(self, output: str) -> JobState | None:
        """Read how the job of `detail_command` ended; None if the queue has no record of it."""
        return None

    def cause_in(self, output: str) -> Cause:
        """Return why a job ended, if the queue tells it only in the job's output.

        Args:
            output: The end of the output.
        """
        return Cause.NONE

    def cancel_command(self, jobs: Sequence[tuple[str, int | None]]) -> list[str]:
        """The command that cancels jobs, or elements of job arrays; the index None stands for the whole job."""
        raise NotImplementedError
