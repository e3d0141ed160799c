"""The language of PBS Professional and OpenPBS: their scripts and commands, and the meaning of their answers.

It follows the manual pages of version 19.1 and later (qsub, qstat, qselect, qdel, pbs_job_attributes) and the source of
OpenPBS. It has not been tried on a real PBS. tests/unit/test_pbs.py shows the formats that it relies on.

A job's id is a number, such as ``1234``. An array's id ends with brackets, as in ``1234[]``, and an element's is
``1234[3]``. PBS appends the server's name, which is dropped here because it is the system's (`PbsDialect.name`).
"""

from __future__ import annotations

import json
import os
import pwd
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from executorlib.jobs.queue import Cause, Dependency, Dialect, JobState, Phase, Submission, shown_id
from executorlib.jobs.templates import Templates

# The options that every template needs are on qsub's command line, which overrides the script.
#
# - A chunk is one node's part of the job, so memory (counted by node) and ranks fit into one request. If the ranks
#   cannot be spread evenly, some nodes get one more.
# - A job that loses its node ends in an error instead of running again unasked. PBS refuses that option for arrays.
DEFAULT_TEMPLATE = """\
{%- macro word(text) -%}{{ (text | string).split() | join }}{%- endmacro -%}
{%- macro chunk(nodes, ranks) -%}
{{ nodes }}:ncpus={{ ranks * threads_per_core }}:mpiprocs={{ ranks }}:ompthreads={{ threads_per_core }}
{%- if gpus_per_core %}:ngpus={{ ranks * gpus_per_core }}{% endif %}
{%- if memory_max | float(0) %}:mem={{ (memory_max | float * 1024) | round(0, "ceil") | int }}mb
{%- elif memory_max %}:mem={{ word(memory_max) }}{% endif %}
{%- endmacro -%}
{%- set nodes = num_nodes or 1 -%}
{%- set each, more = cores // nodes, cores % nodes -%}
#!/bin/bash
#PBS -N {{ job_name }}
{%- for option, value in [("q", queue or partition), ("A", account), ("P", project)] if value %}
#PBS -{{ option }} {{ word(value) }}
{%- endfor %}
#PBS -l select={{ chunk(more, each + 1) ~ "+" if more }}{{ chunk(nodes - more, each) }}
{%- if num_nodes or exclusive %}
#PBS -l place={{ "scatter" if num_nodes else "pack" }}{{ ":excl" if exclusive }}
{%- endif %}
{%- if run_time_max %}
#PBS -l walltime={{ run_time_max }}
{%- endif %}
{%- if priority %}
#PBS -p {{ [[priority, -1024] | max, 1023] | min }}
{%- endif %}
{%- if not is_array %}
#PBS -r n
{%- endif %}

{{ command }}
"""

# The letters of states, in words. M is a job that has moved to another server: its result is found, but nobody knows
# whether it still runs.
_WORDS = {
    "B": "begun",
    "E": "exiting",
    "F": "finished",
    "H": "held",
    "M": "moved",
    "Q": "queued",
    "R": "running",
    "S": "suspended",
    "T": "in transit",
    "U": "suspended by its workstation's user",
    "W": "waiting for its time",
    "X": "finished",
}
_WAITING = frozenset("HQTW")
_ENDED = frozenset("FX")
# Substates of jobs that have ended.
_TERMINATED, _FAILED = 91, 93
# Negative exit codes are PBS's own. Codes that are not listed mean that the job could not be started.
_OWN_CODES = {
    -3: ("it could not be started, and would have been tried again", Cause.NODE_FAILED),
    -4: ("its node's daemon was restarted", Cause.NODE_FAILED),
    -5: ("its node's daemon was restarted", Cause.NODE_FAILED),
    -6: ("its node's daemon was restarted", Cause.NODE_FAILED),
    -10: ("the user or group is not known on its node", Cause.NONE),
    -11: ("it was to be run again", Cause.PREEMPTED),
    -14: ("a node of it could not be reached", Cause.NODE_FAILED),
    -20: ("its first node could not be reached", Cause.NODE_FAILED),
    -24: ("it used more CPUs than it asked for", Cause.NONE),
    -25: ("it used more CPUs than it asked for", Cause.NONE),
    -26: ("it exceeded vmem", Cause.OUT_OF_MEMORY),
    -27: ("it exceeded mem", Cause.OUT_OF_MEMORY),
    -28: ("it exceeded cput", Cause.NONE),
    -29: ("it exceeded walltime", Cause.TIME_LIMIT),
}
_NOT_STARTED = "it could not be started"
# Comments on jobs that will wait until somebody changes them.
_HOPELESS = re.compile(r"can never run|too many failed attempts", re.IGNORECASE)
# Comments on jobs that were deleted, by somebody or because a job that they waited for had failed.
_DELETED = re.compile("terminated|deleted as result of dependency", re.IGNORECASE)
_FAILED_TO_START = re.compile("too many failed attempts", re.IGNORECASE)
# PBS adds this to the error output of a job that it ends.
_ADDED = re.compile(r"=>> PBS: job killed: (\w+)|Cgroup mem\w* limit exceeded", re.IGNORECASE)
_TRANSIENT = re.compile(
    r"cannot connect to server|connection (refused|reset)|no free connections|server shutting down|timed? ?out"
    r"|resource temporarily unavailable|communication failure|batch protocol error|end of file|try (the request )?again"
    r"|munge|no route to host|network is unreachable",
    re.IGNORECASE,
)
# Refusals because of too many jobs. The last one is about the length of an array: a queue's own limit is not known.
_LIMIT = re.compile(
    r"maximum number of jobs.* already in .*|would exceed .*limit.*|array job exceeds server or queue size limit",
    re.IGNORECASE,
)
_LIMIT_OF_OWN = re.compile(r"user|array job exceeds", re.IGNORECASE)
_ID = re.compile(r"(\d+)(?:\[(\d*)\])?(?:\..*)?")
# A job's name may not contain these characters, nor be longer than this.
_NO_NAME = re.compile(r"[^A-Za-z0-9_.+-]+")
_LONGEST_NAME = 230
# An answer lists all elements of the arrays in question, with about 2 KB for each.
_MOST_ELEMENTS = 1000
# These have to be set before Python starts: they find the interpreter, mpiexec and their libraries.
_EXPORTED = ("PATH", "LD_LIBRARY_PATH")
# These belong to the session's own job, node or MPI world.
_NOT_HANDED_ON = re.compile(
    r"(PBS_|PMI_|PMIX_|OMPI_COMM_WORLD_|HYDI_|PALS_|CUDA_VISIBLE_|ROCR_VISIBLE_).*|TMPDIR|NCPUS|HOSTNAME"
)


@dataclass(frozen=True)
class Settings:
    """The settings of a server.

    Attributes:
        array_limit: Most elements of a job array; 1 if it has no job arrays.
        history: Whether it remembers jobs that have ended.
        server: Its name; empty if that is not known.
    """

    array_limit: int = _MOST_ELEMENTS
    history: bool = False
    server: str = ""


def parse_settings(output: str) -> Settings:
    """Read the output of `PbsDialect.settings_command`; settings that are missing there are left at PBS's defaults."""
    try:
        told = json.loads(output, strict=False)
        server = str(told["pbs_server"])
        about = next(iter(told["Server"].values()))
        limit = int(about.get("max_array_size", _MOST_ELEMENTS))
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration):
        return Settings()
    history = str(about.get("job_history_enable", "")).lower() == "true"
    return Settings(max(1, min(limit, _MOST_ELEMENTS)), history, server)


class PbsDialect(Dialect):
    """PBS Professional.

    Args:
        settings: The settings of the server.
        templates: The templates of job scripts; by default `DEFAULT_TEMPLATE`, and a call's own.
        environ: The environment of `qsub`; None is that of this process.
    """

    title = "PBS Professional"
    settings_command = ("qstat", "-B", "-f", "-F", "json")
    default_template = DEFAULT_TEMPLATE
    transient = _TRANSIENT
    limit = _LIMIT
    job_id = re.compile(r"^(\d+(?:\[\])?)(?:\.\S+)?\s*$", re.MULTILINE)
    id_variables = ("PBS_ARRAY_ID", "PBS_JOBID")
    element_variables = ("PBS_ARRAY_INDEX",)
    # The mpiexec that comes with PBS on HPE's Cray machines sets this one.
    local_rank_variables = ("PALS_LOCAL_RANKID",)
    # The last byte of PBS's error numbers: the job is unknown, has finished, is exiting, or is a finished element.
    codes_of_the_gone = frozenset(number & 0xFF for number in (15001, 15139, 15016, 15159))
    cancels_the_gone = True
    submit_program = "qsub"

    def __init__(
        self,
        settings: Settings | None = None,
        templates: Templates | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(templates or Templates(DEFAULT_TEMPLATE))
        self._settings = settings or Settings()
        self._environ = os.environ if environ is None else environ

    @classmethod
    def from_settings(cls, output: str, templates: Templates) -> PbsDialect:
        """Make the dialect of one server from the output of `settings_command`."""
        return cls(parse_settings(output), templates)

    @staticmethod
    def problem_with(folder: str) -> str:
        """The reason if there is a colon in the path."""
        if ":" in folder:
            return "has a colon in its path, and PBS takes the part before it for the name of a machine"
        return ""

    @property
    def name(self) -> str:
        """The server: a job's number means nothing on another one."""
        return f"{self.title} server {self._settings.server}" if self._settings.server else self.title

    @property
    def array_limit(self) -> int:
        """Most calls in one job array."""
        return self._settings.array_limit

    @property
    def has_dependencies(self) -> bool:
        """True if the server has a history.

        Without one, PBS denies any knowledge of a job that ended well while its dependent was being submitted.
        """
        return self._settings.history

    def handed_on(self, environ: Mapping[str, str]) -> dict[str, str]:
        """All variables except those of the session's own job.

        `qsub -V` would show them to everybody who can see the job, and made the answers of older versions unreadable.
        """
        return {name: value for name, value in environ.items() if not _NOT_HANDED_ON.fullmatch(name)}

    def script(self, submission: Submission) -> str:
        """Render the script of a submission."""
        # Jobs start in the home directory.
        command = f"cd {shlex.quote(submission.cwd)} && {submission.command}"
        named = dict(submission.template_values)
        if named.get("job_name"):
            named["job_name"] = _job_name(str(named["job_name"]))
        submission = replace(submission, name=_job_name(submission.name), command=command, template_values=named)
        return self._templates.render(submission, is_array=_is_array(submission))

    def submit_command(self, submission: Submission, script_path: str) -> list[str]:
        """The qsub command for a submission."""
        is_array = _is_array(submission)
        output = f"{submission.directory}/output.{'^array_index^' if is_array else '0'}"
        # With -k, output appears at once if the node can reach the file, instead of at the job's end.
        command = ["qsub", "-j", "oe", "-k", "oed", "-o", output]
        exported = [name for name in _EXPORTED if name in self._environ]
        if exported:
            command += ["-v", ",".join(exported)]
        if is_array:
            last = submission.first + submission.count - 1
            # The ends of a range must differ. With a step beyond the second one, only the first is left.
            command += ["-J", f"{submission.first}-{last}" if submission.count > 1 else f"{last}-{last + 1}:2"]
        if submission.dependencies:
            # If one of these fails, PBS deletes the job.
            command += ["-W", f"depend={_dependencies(submission.dependencies)}"]
        return [*command, script_path]

    @staticmethod
    def is_own(refusal: str) -> bool:
        """Return whether the refusal speaks of the user, or is about the length of an array."""
        return _LIMIT_OF_OWN.search(refusal) is not None

    def status_command(self, job_ids: Sequence[str]) -> list[str]:
        """The qstat command for these jobs; without ids, a qselect command that lists the user's jobs."""
        if not job_ids:
            return ["qselect", "-u", _user()]
        return ["qstat", *self._options, "-t", *job_ids]

    def parse_status(self, output: str, job_ids: Sequence[str]) -> dict[tuple[str, int | None], JobState]:
        """Read the states of jobs from the output of qstat, or of qselect if there are no ids."""
        if not job_ids:
            return {(line.partition(".")[0], None): JobState(Phase.PENDING, "there") for line in output.split()}
        states: dict[tuple[str, int | None], JobState] = {}
        for job_id, index, job in _jobs(output):
            if index is None and job_id.endswith("[]"):
                states[job_id, None] = _state(job)
            else:
                states[job_id, index or 0] = _state(job)
        return states

    def detail_command(self, job_id: str, index: int | None) -> list[str]:
        """The qstat command that tells how a job ended; empty if the server has no history."""
        return ["qstat", *self._options, shown_id(job_id, index)] if self._settings.history else []

    def parse_detail(self, output: str) -> JobState | None:
        """Read the answer to `detail_command`; None if it does not have the job."""
        return next((_state(job) for *_, job in _jobs(output)), None)

    def cause_in(self, output: str) -> Cause:
        """The limit that the job exceeded, if PBS has written that into the output."""
        found = _ADDED.search(output)
        if found is None:
            return Cause.NONE
        what = (found[1] or "mem").lower()
        return Cause.TIME_LIMIT if what == "walltime" else Cause.OUT_OF_MEMORY if "mem" in what else Cause.NONE

    def cancel_command(self, jobs: Sequence[tuple[str, int | None]]) -> list[str]:
        """The qdel command for jobs and array elements."""
        whole = dict.fromkeys(job_id for job_id, index in jobs if index is None)
        elements: dict[str, set[int]] = {}
        for job_id, index in jobs:
            if index is not None and job_id not in whole:
                elements.setdefault(job_id, set()).add(index)
        parts = [f"{job_id[:-1]}{run}]" for job_id, indices in elements.items() for run in _runs(indices)]
        return ["qdel", *whole, *parts]

    @property
    def _options(self) -> list[str]:
        return [*(["-x"] if self._settings.history else []), "-f", "-F", "json"]


def _user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return os.environ.get("LOGNAME", str(os.geteuid()))


def _is_array(submission: Submission) -> bool:
    return submission.count > 1 or submission.first > 0


def _job_name(name: str) -> str:
    """The nearest name that PBS accepts."""
    return _NO_NAME.sub("_", name)[:_LONGEST_NAME] or "_"


def _dependencies(dependencies: Iterable[Dependency]) -> str:
    """The value of ``depend``: all jobs must succeed. It names only whole jobs (`PbsDialect.waits_for_elements`)."""
    return ":".join(["afterok", *dict.fromkeys(each.job_id for each in dependencies)])


def _runs(indices: Iterable[int]) -> Iterator[str]:
    """The fewest ranges that cover these indices exactly."""
    first = last = None
    for index in sorted(indices):
        if last is not None and index == last + 1:
            last = index
            continue
        if last is not None:
            yield f"{first}" if first == last else f"{first}-{last}"
        first = last = index
    if last is not None:
        yield f"{first}" if first == last else f"{first}-{last}"


def _state(job: Mapping[str, Any]) -> JobState:
    """Read a job's state from its attributes."""
    letter = str(job.get("job_state", ""))
    comment = str(job.get("comment", "")).strip()
    node = ",".join(dict.fromkeys(re.findall(r"(?:^|\+)([^/+]+)", str(job.get("exec_host", "")))))
    if letter in _ENDED:
        return _ending(job, comment, node)
    word = _WORDS.get(letter, letter or "unknown")
    if letter not in _WAITING:
        return JobState(Phase.RUNNING, word, node=node)
    hopeless = _HOPELESS.search(comment) is not None
    cause = Cause.NODE_FAILED if _FAILED_TO_START.search(comment) else Cause.NONE
    # `o` is an operator's hold; `s`, an administrator's, also stands for a dependency's.
    holds = str(job.get("Hold_Types", "n"))
    held = letter == "H" and not hopeless and ("o" in holds or ("s" in holds and "depend" not in job))
    return JobState(Phase.PENDING, word, comment, "", "", hopeless, cause, held)


def _ending(job: Mapping[str, Any], comment: str, node: str) -> JobState:
    """Read how a job ended, as far as PBS tells it."""
    text = str(job.get("Exit_status", ""))
    status = int(text) if re.fullmatch(r"-?\d+", text) else None
    is_terminated = job.get("substate") == _TERMINATED or _DELETED.search(comment) is not None
    if status is None and is_terminated:
        return JobState(Phase.ENDED, "terminated", comment, "", node, cause=Cause.CANCELLED)
    if status is None:  # an element, in older versions
        return JobState(Phase.ENDED, "finished", "", "", node)
    if status < 0:
        reason, cause = _OWN_CODES.get(status, (_NOT_STARTED, Cause.NONE))
        return JobState(Phase.ENDED, "failed", f"{reason} ({status})", "", node, cause=cause)
    # A number above 256 is 256 plus a signal's number.
    exit_code = f"0:{status - 256}" if status > 256 else str(status)
    cause = Cause.NONE
    if status > 128:
        cause = _exceeded(job)
        if cause is Cause.NONE and is_terminated:
            cause = Cause.CANCELLED
    is_failed = status != 0 or job.get("substate") == _FAILED
    word = "terminated" if cause is Cause.CANCELLED else "failed" if is_failed else "finished"
    return JobState(Phase.ENDED, word, "", exit_code, node, cause=cause)


def _exceeded(job: Mapping[str, Any]) -> Cause:
    """The limit that a killed job had reached; versions before 2021 do not tell it directly."""
    asked, used = job.get("Resource_List"), job.get("resources_used")
    if isinstance(asked, dict) and isinstance(used, dict):
        for name, read, cause in (
            ("walltime", _seconds, Cause.TIME_LIMIT),
            ("mem", _bytes, Cause.OUT_OF_MEMORY),
        ):
            limit, reached = read(asked.get(name)), read(used.get(name))
            if limit is not None and reached is not None and reached >= limit:
                return cause
    return Cause.NONE


def _seconds(text: object) -> int | None:
    """Read a time such as ``01:30:00``."""
    if not re.fullmatch(r"\d+(:\d+){0,3}", str(text)):
        return None
    seconds = 0
    for part in str(text).split(":"):
        seconds = 60 * seconds + int(part)
    return seconds


def _bytes(text: object) -> int | None:
    """Read a size such as ``800mb``."""
    found = re.fullmatch(r"(\d+)([kmgtp]?)b", str(text))
    return None if found is None else int(found[1]) << 10 * (" kmgtp".index(found[2]) if found[2] else 0)


def _jobs(output: str) -> Iterator[tuple[str, int | None, Mapping[str, Any]]]:
    """Read qstat's output: for each job its id, its index if it is an element, and its attributes.

    Raises:
        ValueError: The output is incomplete.
    """
    text = output.strip()
    if not (text.startswith("{") and text.endswith("}")):
        raise ValueError(f"qstat printed {text[-200:]!r} instead of a list of jobs.")
    try:
        told = json.loads(text, strict=False)
        jobs = told.get("Jobs", {})
    except ValueError:
        jobs = _scanned(text)
    for name, job in jobs.items():
        found = _ID.fullmatch(name)
        if found is None or not isinstance(job, dict):
            continue
        number, element = found[1], found[2]
        if element is None:
            yield number, None, job
        else:
            yield f"{number}[]", int(element) if element else None, job


# A line with an attribute: its indentation, its name, and its value or the opening brace of a group.
_LINE = re.compile(r'([ \t]*)"([^"]+)"\s*:\s*(?:(\{)|"(.*?)"|([^"{]*?)),?\s*')


def _scanned(text: str) -> dict[str, dict[str, Any]]:
    """Read the attributes of jobs from output that is not valid JSON.

    Versions before 2020 do not escape everything that users put into names, comments and variables. But each attribute
    has its own line, and all attributes of a job have the same indentation.
    """
    jobs: dict[str, dict[str, Any]] = {}
    job: dict[str, Any] | None = None
    group: dict[str, Any] | None = None
    outer = inner = -1  # the indentation of the job's name, and of its attributes
    for line in text.splitlines():
        found = _LINE.fullmatch(line)
        if found is None:
            continue
        indent, name, opens, quoted, bare = found.groups()
        depth = len(indent)
        if opens and _ID.fullmatch(name) and (job is None or depth == outer):
            job, group, outer, inner = jobs.setdefault(name, {}), None, depth, -1
        elif job is not None and depth > outer and inner in (-1, depth):
            inner, group = depth, None
            if opens:
                group = job.setdefault(name, {})
            else:
                job.setdefault(name, _value(quoted, bare))
        elif group is not None and depth > inner and not opens:
            group.setdefault(name, _value(quoted, bare))
    return jobs


def _value(quoted: str | None, bare: str) -> Any:
    if quoted is not None:
        return quoted
    return int(bare) if re.fullmatch(r"-?\d+", bare.strip()) else bare.strip()
