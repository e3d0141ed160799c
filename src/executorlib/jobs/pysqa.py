"""Grid Engine, Torque and LSF, through pysqa: one job for each call, without dependencies.

Templates, commands and the reading of states are pysqa's. This module adds the options that every template needs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from executorlib.jobs.queue import Cause, Dialect, JobState, Phase, Submission
from executorlib.jobs.templates import Templates, load_commands

# Options that override the script: they hand on the environment (LSF does so by itself), and send both output streams
# to the file that follows.
_OPTIONS = {"SGE": ["-V", "-j", "y", "-o"], "TORQUE": ["-V", "-j", "oe", "-o"], "LSF": ["-o"]}
_ID_VARIABLES = {"SGE": "JOB_ID", "TORQUE": "PBS_JOBID", "LSF": "LSB_JOBID"}
# The words of pysqa and of the queues themselves, such as Grid Engine's letters for jobs that are held or start again.
# A job in any other state is not over.
_PENDING = re.compile("pending|h?R?qw|PSUSP")
_ENDED = re.compile("DONE|EXIT")
# Grid Engine could not start the job, and will not try again. It tells the reason only in answer to another query.
_FAILED_TO_START = re.compile("error|E.*qw")
_WHY_NOT_STARTED = (
    "a node could not start it; often because its working directory or output file cannot be reached from there"
)
# Grid Engine's history: it ended the job at a limit, nearly always its time limit.
_AT_LIMIT = "37"
_TRANSIENT = re.compile(
    r"can(not|'t) (connect|contact|reach)|unable to (connect|contact|send)|connection refused|timed? ?out"
    r"|commlib|communication|try again|not responding|LSF is (down|not responding)",
    re.IGNORECASE,
)

# Refusals because of too many jobs, in the words of Grid Engine, Torque, PBS Pro and LSF.
_LIMIT = re.compile(
    r"jobs are allowed per (user|cluster)|maximum number of (user )?jobs already in queue.*"
    r"|would exceed .*limit.*|pending job threshold reached",
    re.IGNORECASE,
)


class PysqaDialect(Dialect):
    """A queue that pysqa drives.

    Args:
        templates: A configuration for such a queue.
    """

    title = "the queue"
    transient = _TRANSIENT
    limit = _LIMIT

    def __init__(self, templates: Templates) -> None:
        super().__init__(templates)
        self._commands = load_commands(templates.queue_type)
        self.id_variables = (_ID_VARIABLES[templates.queue_type],)
        # Grid Engine writes its history every 15 s, unless its administrator sets another time (`flush_time`).
        self.history_delay = 16.0 if templates.queue_type == "SGE" else 0.0

    @classmethod
    def from_settings(cls, output: str, templates: Templates) -> PysqaDialect:
        """Make the dialect of a queue; it has no settings to ask for."""
        return cls(templates)

    @property
    def submit_program(self) -> str:
        """The command that submits a script."""
        return str(self._commands.submit_job_command[0])

    def script(self, submission: Submission) -> str:
        """Render the script of a submission."""
        # Grid Engine accepts no other names.
        name = re.sub(r"[^\w.+-]+|^(?=\d)", "_", submission.name)
        return self._templates.render(replace(submission, name=name))

    def submit_command(self, submission: Submission, script_path: str) -> list[str]:
        """The command that submits a call; raises ValueError for an array or dependencies."""
        if submission.count > 1 or submission.dependencies:
            raise ValueError(f"{self._templates.queue_type} jobs are submitted one by one, after their inputs.")
        options = [*_OPTIONS[self._templates.queue_type], f"{submission.directory}/output.0"]
        if self._templates.queue_type == "SGE":
            options += ["-wd", submission.cwd]  # otherwise it would be the home directory
        return [*self._commands.submit_job_command, *options, script_path]

    def parse_job_id(self, output: str) -> str:
        """Read the id of the new job."""
        try:
            return str(self._commands.get_job_id_from_output(output))
        except (ValueError, IndexError) as error:
            raise ValueError(f"the queue printed {output.strip()!r} instead of a job id.") from error

    @staticmethod
    def is_own(refusal: str) -> bool:
        """Return whether the refusal speaks of the user."""
        return "user" in refusal

    def status_command(self, job_ids: Sequence[str]) -> list[str]:
        """The query for the states of all jobs."""
        return list(self._commands.get_queue_status_command)

    def parse_status(self, output: str, job_ids: Sequence[str]) -> dict[tuple[str, int | None], JobState]:
        """Read the states of jobs."""
        if self._templates.queue_type == "SGE" and "<job_list" not in output:
            if "</job_info>" not in output:
                raise ValueError(f"qstat printed {output.strip()!r} instead of a list of jobs.")
            return {}  # pysqa cannot read an empty list
        try:
            frame = self._commands.convert_queue_status(output)
        except Exception as error:  # whatever pysqa's reason, the output is not a list of jobs
            raise ValueError(f"the queue printed {output.strip()!r} instead of a list of jobs: {error}") from error
        states: dict[tuple[str, int | None], JobState] = {}
        for job_id, word in zip(frame["jobid"], frame["status"], strict=True):
            states[str(job_id), 0] = _state(str(word))
        if self._templates.queue_type == "TORQUE":
            states.update(_completed(output))
        return states

    def detail_command(self, job_id: str, index: int | None) -> list[str]:
        """Grid Engine's qacct command; the other queues have no history for users."""
        return ["qacct", "-j", job_id] if self._templates.queue_type == "SGE" else []

    def parse_detail(self, output: str) -> JobState | None:
        """Read the output of qacct; None if it does not have the job."""
        found = dict(re.findall(r"^(\w+) +(.*?) *$", output, re.MULTILINE))
        if "exit_status" not in found:
            return None
        failed, _, reason = found.get("failed", "0").partition(":")
        code = found["exit_status"].split()[0]
        state = "failed" if failed.strip() != "0" or code != "0" else "finished"
        cause = Cause.TIME_LIMIT if failed.strip() == _AT_LIMIT else Cause.NONE
        return JobState(Phase.ENDED, state, reason.strip(), code, found.get("hostname", ""), cause=cause)

    def cancel_command(self, jobs: Sequence[tuple[str, int | None]]) -> list[str]:
        """The command that cancels jobs."""
        return [*self._commands.delete_job_command, *dict.fromkeys(job_id for job_id, _ in jobs)]


def _completed(output: str) -> dict[tuple[str, int | None], JobState]:
    """Read the completed jobs, which Torque lists for some minutes; pysqa believes that they are waiting."""
    states: dict[tuple[str, int | None], JobState] = {}
    for job in output.split("Job Id:")[1:]:
        found = dict(re.findall(r"^\s*(job_state|exit_status|exec_host) = (\S+)", job, re.MULTILINE))
        if found.get("job_state") == "C":
            code = found.get("exit_status", "")
            # A number above 256 is 256 plus a signal's number.
            text = f"0:{int(code) - 256}" if code.isdigit() and int(code) > 256 else code
            node = found.get("exec_host", "").partition("/")[0]
            states[job.split(".")[0].strip(), 0] = JobState(Phase.ENDED, "completed", "", text, node)
    return states


def _state(word: str) -> JobState:
    """Translate a queue's word for the state of a job."""
    if _FAILED_TO_START.fullmatch(word):
        return JobState(Phase.PENDING, word, _WHY_NOT_STARTED, hopeless=True)
    if _PENDING.fullmatch(word):
        return JobState(Phase.PENDING, word)
    return JobState(Phase.ENDED if _ENDED.fullmatch(word) else Phase.RUNNING, word)
