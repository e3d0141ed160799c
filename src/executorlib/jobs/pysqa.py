"""The other queues that pysqa drives: Grid Engine, Torque, LSF. One job a call, no dependencies.

Templates, commands and the reading of states are pysqa's; added is what has to hold whatever a template says.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from executorlib.jobs.queue import Batch, Cause, JobState, Limit, Phase
from executorlib.jobs.ranks import mpiexec_command
from executorlib.jobs.templates import Templates, load_commands

if TYPE_CHECKING:
    from executorlib.resources import Resources

# Options that hand on the environment, which LSF does by itself, and that send both output streams to the file that
# follows, whatever the script says.
_OPTIONS = {"SGE": ["-V", "-j", "y", "-o"], "TORQUE": ["-V", "-j", "oe", "-o"], "LSF": ["-o"]}
_ID_VARIABLES = {"SGE": "JOB_ID", "TORQUE": "PBS_JOBID", "LSF": "LSB_JOBID"}
# pysqa's words and what queues say beside them, among it Grid Engine's letters for what is held or starts again.
# Whatever else a job may be, it is not over.
_PENDING = re.compile("pending|h?R?qw|PSUSP")
_ENDED = re.compile("DONE|EXIT")
# Grid Engine could not start it, and will not try again. Why, it says only in words that cannot be asked for at once.
_FAILED_TO_START = re.compile("error|E.*qw")
_WHY_NOT_STARTED = "a node could not start it; often its working directory or output file cannot be reached from there"
# Of Grid Engine's history: it ended the job at a limit, nearly always that of its time.
_AT_LIMIT = "37"
_TRANSIENT = re.compile(
    r"can(not|'t) (connect|contact|reach)|unable to (connect|contact|send)|connection refused|timed? ?out"
    r"|commlib|communication|try again|not responding|LSF is (down|not responding)",
    re.IGNORECASE,
)

# How many jobs there may be, in the words of Grid Engine, Torque, PBS Pro and LSF.
_LIMIT = re.compile(
    r"jobs are allowed per (user|cluster)|maximum number of (user )?jobs already in queue.*"
    r"|would exceed .*limit.*|pending job threshold reached",
    re.IGNORECASE,
)


class PysqaQueue:
    """A queue other than Slurm, as `queue.Queue` describes it.

    Args:
        templates: A configuration for such a queue.
    """

    title: ClassVar[str] = "the queue"
    settings_command: ClassVar[Sequence[str]] = ()
    default_template: ClassVar[str | None] = None
    has_pmi_modes: ClassVar[bool] = False
    name = title
    array_limit = 1
    has_dependencies = False
    waits_for_elements = False
    element_variables: tuple[str, ...] = ()
    local_rank_variables: tuple[str, ...] = ()
    codes_of_the_gone: frozenset[int] = frozenset()
    cancels_the_gone = False

    def __init__(self, templates: Templates) -> None:
        self._templates = templates
        self._commands = load_commands(templates.queue_type)
        self.id_variables = (_ID_VARIABLES[templates.queue_type],)
        # Its history is written every 15 s, unless its administrator says otherwise (`flush_time`).
        self.history_delay = 16.0 if templates.queue_type == "SGE" else 0.0

    @classmethod
    def from_settings(cls, output: str, templates: Templates) -> PysqaQueue:
        """See `queue.Queue.from_settings`."""
        return cls(templates)

    @staticmethod
    def command_environment(environ: Mapping[str, str]) -> dict[str, str]:
        """See `queue.Queue.command_environment`."""
        return dict(environ)

    @staticmethod
    def rank_command(
        resources: Resources, pmi_mode: str | None, program: Sequence[str], mpiexec: str = "mpiexec"
    ) -> list[str]:
        """See `queue.Queue.rank_command`."""
        return mpiexec_command(resources, program, mpiexec)

    @staticmethod
    def problem_with(folder: str) -> str:
        """See `queue.Queue.problem_with`."""
        return ""

    def handed_on(self, environ: Mapping[str, str]) -> dict[str, str]:
        """See `queue.Queue.handed_on`; the options of the submission do that."""
        return {}

    @property
    def submit_program(self) -> str:
        """The command that submits a script."""
        return str(self._commands.submit_job_command[0])

    def script(self, batch: Batch) -> str:
        """See `queue.Queue.script`."""
        # Grid Engine takes no other names.
        name = re.sub(r"[^\w.+-]+|^(?=\d)", "_", batch.name)
        return self._templates.render(replace(batch, name=name))

    def unused(self, batch: Batch) -> list[str]:
        """See `queue.Queue.unused`."""
        ignored = ["slurm_cmd_args"] if batch.resources.slurm_cmd_args else []
        return self._templates.unused(batch) + ignored

    def submit_command(self, batch: Batch, script_path: str) -> list[str]:
        """See `queue.Queue.submit_command`."""
        if batch.count > 1 or batch.dependencies:
            raise ValueError(f"{self._templates.queue_type} jobs are submitted one by one, after their inputs.")
        options = [*_OPTIONS[self._templates.queue_type], f"{batch.directory}/output.0"]
        if self._templates.queue_type == "SGE":
            options += ["-wd", batch.cwd]  # else it would be the home directory
        return [*self._commands.submit_job_command, *options, script_path]

    def parse_job_id(self, output: str) -> str:
        """See `queue.Queue.parse_job_id`."""
        try:
            return str(self._commands.get_job_id_from_output(output))
        except (ValueError, IndexError) as error:
            raise ValueError(f"the queue printed no job id but {output.strip()!r}.") from error

    def is_transient(self, error_text: str) -> bool:
        """See `queue.Queue.is_transient`."""
        return _TRANSIENT.search(error_text) is not None

    def limit_in(self, error_text: str) -> Limit:
        """See `queue.Queue.limit_in`."""
        found = _LIMIT.search(error_text)
        if found is None:
            return Limit.NONE
        return Limit.OWN if "user" in found[0] else Limit.SHARED

    def status_command(self, job_ids: Sequence[str]) -> list[str]:
        """See `queue.Queue.status_command`."""
        return list(self._commands.get_queue_status_command)

    def parse_status(self, output: str, job_ids: Sequence[str]) -> dict[tuple[str, int | None], JobState]:
        """See `queue.Queue.parse_status`."""
        if self._templates.queue_type == "SGE" and "<job_list" not in output:
            if "</job_info>" not in output:
                raise ValueError(f"qstat printed no list of jobs but {output.strip()!r}.")
            return {}  # pysqa cannot read an empty list
        try:
            frame = self._commands.convert_queue_status(output)
        except Exception as error:  # whatever pysqa stumbles over, the output was not a list of jobs
            raise ValueError(f"the queue printed no list of jobs but {output.strip()!r}: {error}") from error
        states: dict[tuple[str, int | None], JobState] = {}
        for job_id, word in zip(frame["jobid"], frame["status"], strict=True):
            states[str(job_id), 0] = _state(str(word))
        if self._templates.queue_type == "TORQUE":
            states.update(_completed(output))
        return states

    def detail_command(self, job_id: str, index: int | None) -> list[str]:
        """See `queue.Queue.detail_command`; of these queues only Grid Engine has a history for users."""
        return ["qacct", "-j", job_id] if self._templates.queue_type == "SGE" else []

    def parse_detail(self, output: str) -> JobState | None:
        """See `queue.Queue.parse_detail`."""
        found = dict(re.findall(r"^(\w+) +(.*?) *$", output, re.MULTILINE))
        if "exit_status" not in found:
            return None
        failed, _, reason = found.get("failed", "0").partition(":")
        code = found["exit_status"].split()[0]
        state = "failed" if failed.strip() != "0" or code != "0" else "finished"
        cause = Cause.TIME_LIMIT if failed.strip() == _AT_LIMIT else Cause.NONE
        return JobState(Phase.ENDED, state, reason.strip(), code, found.get("hostname", ""), cause=cause)

    def cause_in(self, output: str) -> Cause:
        """See `queue.Queue.cause_in`; none of them adds anything."""
        return Cause.NONE

    def cancel_command(self, jobs: Sequence[tuple[str, int | None]]) -> list[str]:
        """See `queue.Queue.cancel_command`."""
        return [*self._commands.delete_job_command, *dict.fromkeys(job_id for job_id, _ in jobs)]


def _completed(output: str) -> dict[tuple[str, int | None], JobState]:
    """The jobs that Torque still lists for some minutes, completed; pysqa takes them for waiting."""
    states: dict[tuple[str, int | None], JobState] = {}
    for job in output.split("Job Id:")[1:]:
        found = dict(re.findall(r"^\s*(job_state|exit_status|exec_host) = (\S+)", job, re.MULTILINE))
        if found.get("job_state") == "C":
            code = found.get("exit_status", "")
            # Above 256 it is that and a signal's number.
            text = f"0:{int(code) - 256}" if code.isdigit() and int(code) > 256 else code
            node = found.get("exec_host", "").partition("/")[0]
            states[job.split(".")[0].strip(), 0] = JobState(Phase.ENDED, "completed", "", text, node)
    return states


def _state(word: str) -> JobState:
    """What a queue's word for a job means."""
    if _FAILED_TO_START.fullmatch(word):
        return JobState(Phase.PENDING, word, _WHY_NOT_STARTED, hopeless=True)
    if _PENDING.fullmatch(word):
        return JobState(Phase.PENDING, word)
    return JobState(Phase.ENDED if _ENDED.fullmatch(word) else Phase.RUNNING, word)
