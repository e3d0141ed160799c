"""Slurm's language: its scripts and commands, and the meaning of its answers. Nothing is run here.

Written for Slurm 20.11 and later, tried with 22.05, 24.11 and 26.05. The words come from the manual pages of sbatch,
squeue, sacct, scontrol and scancel, and from what a real Slurm printed, which tests/unit/test_slurm.py keeps.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from executorlib.jobs.queue import Cause, Dependency, Dialect, JobState, Phase, Submission
from executorlib.jobs.ranks import mpiexec_command
from executorlib.jobs.templates import Templates

if TYPE_CHECKING:
    from executorlib.resources import Resources

# Options that must hold whatever a template says are not here but on sbatch's command line, which takes precedence.
#
# - GPUs: every Slurm accepts --gres, but it counts by node. Ranks may be on several nodes, so theirs count by task.
# - priority: only operators may raise a job's priority; sbatch refuses negative nice values from others. The only
#   user known here to be an operator is root.
# - A job that lost its node, or was preempted, ends in an error instead of running again unasked; `--requeue` in
#   slurm_cmd_args, or a template without this line, allows that.
DEFAULT_TEMPLATE = """\
{%- macro quoted(text) -%}
"{{ text | string | replace("\\\\", "\\\\\\\\") | replace('"', '\\\\"') | replace("\\n", " ") }}"
{%- endmacro -%}
#!/bin/bash
#SBATCH --job-name={{ quoted(job_name) }}
{%- for option, value in [
    ("partition", partition or queue), ("account", account), ("qos", qos), ("constraint", constraint),
    ("reservation", reservation)] if value %}
#SBATCH --{{ option }}={{ quoted(value) }}
{%- endfor %}
{%- if num_nodes %}
#SBATCH --nodes={{ num_nodes }}
{%- endif %}
#SBATCH --ntasks={{ cores }}
#SBATCH --cpus-per-task={{ threads_per_core }}
{%- if gpus_per_core %}
#SBATCH {{ "--gpus-per-task=" if cores > 1 else "--gres=gpu:" }}{{ gpus_per_core }}
{%- endif %}
{%- if memory_max | float(0) %}
#SBATCH --mem={{ (memory_max | float * 1024) | round(0, "ceil") | int }}M
{%- elif memory_max %}
#SBATCH --mem={{ quoted(memory_max) }}
{%- endif %}
{%- if run_time_max %}
#SBATCH --time={{ run_time_max // 60 }}
{%- endif %}
{%- if exclusive %}
#SBATCH --exclusive
{%- endif %}
{%- if priority < 0 or (priority and operator) %}
#SBATCH --nice={{ -priority }}
{%- endif %}
#SBATCH --no-requeue

{{ command }}
"""

# States in `man squeue`, and those that later versions added; all others count as running.
_WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
_ENDED = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "LAUNCH_FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "RECONFIG_FAIL",
    "REVOKED",
    "TIMEOUT",
}
# The causes of the end of jobs that did not end by themselves. Its exit code is often 0 in that case.
_CAUSES = {
    "BOOT_FAIL": Cause.NODE_FAILED,
    "CANCELLED": Cause.CANCELLED,
    "DEADLINE": Cause.DEADLINE,
    "LAUNCH_FAILED": Cause.NODE_FAILED,
    "NODE_FAIL": Cause.NODE_FAILED,
    "OUT_OF_MEMORY": Cause.OUT_OF_MEMORY,
    "PREEMPTED": Cause.PREEMPTED,
    "RECONFIG_FAIL": Cause.NODE_FAILED,
    "REVOKED": Cause.CANCELLED,
    "TIMEOUT": Cause.TIME_LIMIT,
}
# Written into the output if Slurm itself watches the memory; the job's state is FAILED then.
_MEMORY = re.compile(
    r"(slurmstepd|\[\d{4}-\d\d-\d\dT[\d:.]+\] error: ).*exceeded (job )?memory limit",  # the latter since 26.05
    re.IGNORECASE,
)
# Reasons for which a job waits until somebody changes the job or the limits. Holding a job is not among them: whoever
# holds it wants it to wait, and if that is its user, they know.
_HOPELESS = re.compile(
    r"BadConstraints|DependencyNeverSatisfied|InvalidAccount|InvalidQOS|AccountNotAllowed|QOSNotAllowed"
    r"|Partition(Config|NodeLimit|TimeLimit)|launch.failed.requeued.held|\w+PerJob(Limit)?"
    r"|Job's (account|QOS|group) not .*"
)
# Reasons that belong in the error of a cancelled job; any other is only why it was waiting before.
_CANCEL_REASONS = {"DependencyNeverSatisfied"}
# Options of sbatch that only we may set.
_RESERVED = re.compile(
    # Also in the abbreviations that Slurm accepts. Jobs on another cluster could not be seen from here.
    r"(-[aoeDWM].*|--(arra?y?|outp?u?t?|erro?r?|chdi?r?|open-mode|parsable|wait|wrap|test-only|kill-[a-z-]*)(=.*)?|--clusters?(=.*)?)$"
)
_TRANSIENT = re.compile(
    r"unable to contact|connection (refused|reset|timed out)|connect failure|timed out|timeout|temporarily"
    r"|try(ing)? again|zero bytes were transmitted|communication|transport endpoint|standby mode|no route to host"
    r"|network is unreachable|munge|protocol authentication|broken pipe|database.*(down|connection)",
    re.IGNORECASE,
)
# A limit on the number of jobs: words such as AssocMaxSubmitJobLimit, QOSGrpSubmitJobsLimit, MaxSubmitJobsPerAccount,
# and what sbatch says at the controller's own limit (MaxJobCount) before it retries for minutes.
_LIMIT = re.compile(r"\w*(Max|Grp)Submit\w*|temporarily unable to accept job")
_LIMIT_OF_ALL = re.compile(r"GrpSubmit|PerAccount|temporarily")
_SQUEUE_FIELDS = ("ArrayJobID", "ArrayTaskID", "State", "exit_code", "NodeList", "Reason")


@dataclass(frozen=True)
class Settings:
    """The settings of a cluster.

    Attributes:
        array_limit: Most elements of a job array; 1 if there are no job arrays.
        accounting: Whether there is a database that `sacct` can ask.
        cluster: Its name; empty if it is not known.
    """

    array_limit: int = 1001  # MaxArraySize, if slurm.conf does not set it
    accounting: bool = False
    cluster: str = ""


SETTINGS_COMMAND = ["scontrol", "show", "config"]


def parse_settings(output: str) -> Settings:
    """Read the output of `SETTINGS_COMMAND`; settings that are missing there are left at Slurm's defaults."""
    found = dict(re.findall(r"^(\w+)\s*=\s*(.*?)\s*$", output, re.MULTILINE))
    settings = Settings()
    limit = int(found.get("MaxArraySize", settings.array_limit))
    # MaxJobCount counts all users' jobs, also recently ended ones. An array that does not fit is refused as a whole.
    limit = min(limit, int(found.get("MaxJobCount", 2 * limit)) // 2)
    most = re.search(r"\bmax_array_tasks=(\d+)", found.get("SchedulerParameters", ""))
    if most is not None and int(most[1]):
        limit = min(limit, int(most[1]))
    storage = found.get("AccountingStorageType", "")
    return Settings(
        array_limit=max(1, limit),
        accounting=storage not in ("", "(null)") and not storage.endswith("none"),
        cluster=found.get("ClusterName", "").replace("(null)", ""),
    )


def command_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment for Slurm's commands.

    Inside a job Slurm sets variables that would become options of the next job submitted (``SLURM_MEM_PER_CPU``
    together with ``--mem`` is an error), and ``SQUEUE_`` and ``SACCT_`` variables change what is printed. Of all
    these, only those are kept that say which cluster to talk to, and sbatch's own, ``SBATCH_``, by which users set
    their defaults.

    Args:
        environ: The environment of this process.
    """
    kept = {"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT"}
    dropped = ("SLURM_", "SQUEUE_", "SACCT_", "SCANCEL_", "SBATCH_ARRAY_INX", "SBATCH_WAIT")
    cleaned = {key: value for key, value in environ.items() if key in kept or not key.startswith(dropped)}
    # Have all indices of a job array printed, and not just the first 64 characters.
    cleaned["SLURM_BITSTR_LEN"] = "0"
    return cleaned


def rank_command(
    resources: Resources, pmi_mode: str | None, program: Sequence[str], mpiexec: str = "mpiexec"
) -> list[str]:
    """The command, run in a job, that runs a program on all ranks of a call.

    With `srun` each rank sees only its own GPUs. With ``mpiexec`` it sees all GPUs that the job has on its node, and
    has to choose by its rank number there.

    Args:
        resources: What the call needs.
        pmi_mode: How `srun` and MPI find each other, such as ``"pmix"``; None for ``mpiexec`` instead of `srun`.
        program: Program and arguments.
        mpiexec: The MPI library's own starter.
    """
    if resources.cores == 1:
        return list(program)
    if pmi_mode is None:
        return mpiexec_command(resources, program, mpiexec, _mpiexec_environment(resources))
    # Since Slurm 22.05 srun no longer inherits the number of threads from the job.
    options = ["-n", str(resources.cores), f"--cpus-per-task={resources.threads_per_core}", f"--mpi={pmi_mode}"]
    # When one rank dies, the others would otherwise wait for it until the time limit.
    options.append("--kill-on-bad-exit=1")
    if resources.openmpi_oversubscribe:
        options.append("--overcommit")
    return ["srun", *options, *program]


def _mpiexec_environment(resources: Resources) -> list[str]:
    """Arguments of `env`, which runs ``mpiexec``."""
    if not resources.gpus_per_core:
        return []
    # mpiexec has Slurm start one task on each node. With GPUs counted by task it would get only a single rank's.
    gpus = resources.cores * resources.gpus_per_core
    return ["-u", "SLURM_GPUS_PER_TASK", "-u", "SLURM_TRES_PER_TASK", f"SLURM_GPUS={gpus}"]


class SlurmDialect(Dialect):
    """Slurm.

    Args:
        settings: The settings of the cluster.
        templates: The templates of job scripts; by default `DEFAULT_TEMPLATE`, and a call's own.
        user: Number of the user whose jobs are queried; None is the user of this process.
    """

    title = "Slurm"
    settings_command = SETTINGS_COMMAND
    default_template = DEFAULT_TEMPLATE
    has_pmi_modes = True
    transient = _TRANSIENT
    limit = _LIMIT
    # A number, on some clusters followed by ";cluster".
    job_id = re.compile(r"^(?:Submitted batch job )?(\d+)(?:;\S*)?\s*$", re.MULTILINE)
    has_dependencies = True
    waits_for_elements = True
    id_variables = ("SLURM_ARRAY_JOB_ID", "SLURM_JOB_ID")
    element_variables = ("SLURM_ARRAY_TASK_ID",)
    local_rank_variables = ("SLURM_LOCALID",)
    cancels_the_gone = True
    submit_program = "sbatch"

    def __init__(
        self, settings: Settings | None = None, templates: Templates | None = None, user: int | None = None
    ) -> None:
        super().__init__(templates or Templates(DEFAULT_TEMPLATE))
        self._settings = settings or Settings()
        self._user = os.geteuid() if user is None else user

    @classmethod
    def from_settings(cls, output: str, templates: Templates) -> SlurmDialect:
        """Make the dialect of one cluster from the output of `SETTINGS_COMMAND`."""
        return cls(parse_settings(output), templates)

    @staticmethod
    def command_environment(environ: Mapping[str, str]) -> dict[str, str]:
        """The environment for Slurm's commands, from the function of this name."""
        return command_environment(environ)

    @staticmethod
    def rank_command(
        resources: Resources, pmi_mode: str | None, program: Sequence[str], mpiexec: str = "mpiexec"
    ) -> list[str]:
        """The command that starts the ranks of a call, from the function of this name."""
        return rank_command(resources, pmi_mode, program, mpiexec)

    @staticmethod
    def problem_with(folder: str) -> str:
        """The reason if there is a backslash in the path."""
        return "has a backslash in its path, and Slurm starts no job array with output files there" * ("\\" in folder)

    @property
    def name(self) -> str:
        """The cluster: a job's number means nothing on another one."""
        return f"Slurm cluster {self._settings.cluster}" if self._settings.cluster else "Slurm"

    @property
    def array_limit(self) -> int:
        """Most calls in one job array."""
        return self._settings.array_limit

    def script(self, submission: Submission) -> str:
        """Render the script of a submission."""
        return self._templates.render(submission, operator=self._user == 0)

    def unused(self, submission: Submission) -> list[str]:
        """Keys that the script does not use, and ``priority`` if this user may not raise it."""
        unused = self._templates.unused(submission)
        if submission.resources.priority > 0 and self._user != 0 and self._templates.is_default(submission):
            unused.append("priority")
        return unused

    def submit_command(self, submission: Submission, script_path: str) -> list[str]:
        """The sbatch command for a submission; raises ValueError if the user sets one of our options."""
        options = submission.resources.slurm_cmd_args
        for option in options:
            if _RESERVED.match(option) or (submission.dependencies and re.match(r"-d|--dependency", option)):
                raise ValueError(
                    f"resource_dict['slurm_cmd_args'] has {option!r}, an option of sbatch that executorlib sets from "
                    "each call's resources; leave it out."
                )
        # Slurm takes a % in the names of output files for the start of a placeholder.
        directory = submission.directory.replace("%", "%%")
        is_array = submission.count > 1 or submission.first > 0
        output = f"{directory}/output.{'%a' if is_array else '0'}"
        command = ["sbatch", *options, "--parsable", f"--chdir={submission.cwd}"]
        command += [f"--output={output}", f"--error={output}", "--open-mode=append"]
        if is_array:
            command.append(f"--array={submission.first}-{submission.first + submission.count - 1}")
        if submission.dependencies:
            # Without the second option, a job whose input has failed would stay in the queue forever.
            command += [f"--dependency={_dependencies(submission.dependencies)}", "--kill-on-invalid-dep=yes"]
        return [*command, script_path]

    @staticmethod
    def is_own(refusal: str) -> bool:
        """Return whether the refusal names no limit that all users share."""
        return _LIMIT_OF_ALL.search(refusal) is None

    def status_command(self, job_ids: Sequence[str]) -> list[str]:
        """The squeue command for all jobs of the user.

        For a list of ids, squeue would fetch the jobs of all users, and the list could be of any length. Waiting
        elements of an array share a line.
        """
        fields = ",".join(f"{field}:|" for field in _SQUEUE_FIELDS)
        # As in command_environment, for callers that do not use it: incomplete indices are of no use.
        return [
            *("env", "SLURM_BITSTR_LEN=0", "squeue", "--noheader", "--all", "--states=all"),
            *(f"--user={self._user}", f"--Format={fields}"),
        ]

    def parse_status(self, output: str, job_ids: Sequence[str]) -> dict[tuple[str, int | None], JobState]:
        """Read the states of jobs from squeue's output."""
        states: dict[tuple[str, int | None], JobState] = {}
        asked = frozenset(job_ids)
        for line in output.splitlines():
            if not line.strip() or line.startswith("CLUSTER:"):
                continue
            parts = line.split("|", len(_SQUEUE_FIELDS) - 1)
            if len(parts) < len(_SQUEUE_FIELDS):
                raise ValueError(f"squeue printed an incomplete line: {line!r}.")
            job_id, indices, word, exit_code, node, reason = (part.strip() for part in parts)
            state = _state(word, reason.rstrip("|"), exit_code, node)
            if job_id not in asked:
                # Not a job of ours, but maybe an array of millions of elements. One that has not ended says enough.
                if state.phase is not Phase.ENDED or (job_id, None) not in states:
                    states[job_id, None] = state
                continue
            for index in _expand(indices):
                states[job_id, index] = state
        return states

    def detail_command(self, job_id: str, index: int | None) -> list[str]:
        """The command that tells how a job ended: sacct if there is accounting, otherwise scontrol."""
        job = job_id if index is None else f"{job_id}_{index}"
        if self._settings.accounting:
            fields = "JobID,State,ExitCode,NodeList"
            return ["sacct", "--noheader", "--parsable2", f"--format={fields}", f"--jobs={job}"]
        return ["scontrol", "show", "job", job]

    def parse_detail(self, output: str) -> JobState | None:
        """Read the answer to `detail_command`; None if it does not have the job."""
        return _parse_scontrol(output) if "JobState=" in output else _parse_sacct(output)

    def cause_in(self, output: str) -> Cause:
        """Out of memory, if Slurm has written that into the output."""
        return Cause.OUT_OF_MEMORY if _MEMORY.search(output) else Cause.NONE

    def cancel_command(self, jobs: Sequence[tuple[str, int | None]]) -> list[str]:
        """The scancel command for jobs and array elements."""
        elements: dict[str, set[int] | None] = {}
        for job_id, index in jobs:
            known = elements.setdefault(job_id, set())
            if index is None:
                elements[job_id] = None
            elif known is not None:
                known.add(index)
        targets = [
            job_id if indices is None else f"{job_id}_[{_ranges(indices)}]" for job_id, indices in elements.items()
        ]
        return ["scancel", "--quiet", *targets]


def _dependencies(dependencies: Iterable[Dependency]) -> str:
    """The value of --dependency: all of them must succeed."""
    corresponding = [each.job_id for each in dependencies if each.corresponding]
    others = [
        each.job_id if each.index is None else f"{each.job_id}_{each.index}"
        for each in dependencies
        if not each.corresponding
    ]
    kinds = (("aftercorr", corresponding), ("afterok", others))
    return ",".join(":".join([kind, *dict.fromkeys(jobs)]) for kind, jobs in kinds if jobs)


def _state(word: str, reason: str, exit_code: str, node: str) -> JobState:
    """Combine what Slurm says about a job.

    Args:
        word: Its state, possibly with an addition, as in ``CANCELLED by 0`` or ``CANCELLED+``.
        reason: Why it is in that state.
        exit_code: ``code:signal``, or the wait status as a number.
        node: Names of nodes.
    """
    state, _, rest = word.partition(" ")
    state = state.rstrip("+")
    phase = Phase.PENDING if state in _WAITING else Phase.ENDED if state in _ENDED else Phase.RUNNING
    if reason in ("None", "(null)") or (state == "CANCELLED" and reason not in _CANCEL_REASONS):
        reason = ""
    if rest.startswith("by "):
        reason = f"by user {rest[3:]}"
    if phase is not Phase.ENDED:
        exit_code = ""
    elif exit_code.isdigit():
        exit_code = f"{int(exit_code) >> 8}:{int(exit_code) & 0x7F}"
    node = "" if node in ("None assigned", "(null)") else node
    hopeless = phase is Phase.PENDING and _HOPELESS.fullmatch(reason) is not None
    cause = Cause.NODE_FAILED if hopeless and reason.startswith("launch") else _CAUSES.get(state, Cause.NONE)
    held = phase is Phase.PENDING and reason == "JobHeldAdmin"
    if cause is not Cause.NONE and exit_code == "0:1":
        exit_code = ""  # newer versions make it up; it would look like a death by SIGHUP
    return JobState(phase, state, reason, exit_code, node, hopeless, cause, held)


def _parse_sacct(output: str) -> JobState | None:
    """The first job in sacct's output, which has a line for the job and one for each of its steps."""
    found: JobState | None = None
    for line in output.splitlines():
        job, *rest = line.split("|")
        if len(rest) != 3:
            continue
        # sacct is not asked for reasons, because it has only those for which the job was last waiting.
        state = _state(rest[0], "", rest[1], rest[2])
        if "." not in job:
            if found is not None:
                break
            found = state
        elif found is not None and found.state == "FAILED" and state.state == "OUT_OF_MEMORY":
            # If srun started what ran out of memory, only its step has this state.
            return state
    return found


def _parse_scontrol(output: str) -> JobState | None:
    """The first job in scontrol's output."""
    # Only line beginnings can be trusted: the first line ends in the job's name, which may be anything.
    state = re.search(r"^ +JobState=(\S+) Reason=(.*?)(?: Dependency=.*)?$", output, re.MULTILINE)
    if state is None:
        return None
    output = output[state.end() :].partition("\n\n")[0]
    exit_code = re.search(r"^ +Requeue=.* ExitCode=(\S+)", output, re.MULTILINE)
    node = re.search(r"^ +NodeList=(\S*)", output, re.MULTILINE)
    # scontrol writes underscores where squeue writes spaces.
    reason = state[2].replace("_", " ")
    return _state(state[1], reason, exit_code[1] if exit_code else "", node[1] if node else "")


# No cluster allows more (MaxArraySize).
_MOST_ELEMENTS = 4_000_001


def _expand(indices: str) -> Iterator[int]:
    """The numbers in an array's index expression, such as ``0,3-9,20-30:2%5``; 0 for a plain job."""
    if indices in ("N/A", ""):
        yield 0
        return
    for part in indices.partition("%")[0].split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part)
        if match is None:
            raise ValueError(f"array indices {indices!r} are incomplete; SLURM_BITSTR_LEN=0 has squeue print all.")
        first, last, step = match.groups()
        if max(len(first), len(last or "")) > 7 or int(last or first) >= _MOST_ELEMENTS or step == "0":
            raise ValueError(f"Slurm cannot have assigned the array indices {indices!r}.")
        yield from range(int(first), int(last or first) + 1, int(step or 1))


def _ranges(indices: Iterable[int]) -> str:
    """The shortest index expression for these numbers: the reverse of `_expand`, without steps."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
