"""Flux's language: how jobs are requested and what their events mean. Nothing is run here, and no Flux module loaded.

Tried with flux-core 0.88. The words come from Flux's RFCs (https://flux-framework.readthedocs.io/projects/flux-rfc): 14
and 25 (jobspec), 19 (job ids), 20 (resource sets), 21 (events), 24 (output), 26 (dependencies); and from what a real
Flux said, which tests/unit/test_flux.py keeps.
"""

from __future__ import annotations

import base64
import json
import os
import signal
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from executorlib.flux.policy import Policy
from executorlib.jobs.queue import Cause, JobState, Phase
from executorlib.launchers.hostlist import expand_hosts, expand_ranges
from executorlib.machine import NodeShape
from executorlib.resources import Resources
from executorlib.single_node.mpi import FOREIGN_PREFIXES
from executorlib.worker import guard
from executorlib.worker.protocol import THREAD_VARIABLES

# Keys of resource_dict, beyond ours, that mean something to Flux, and their names in a jobspec.
FURTHER_KEYS = {"queue": "queue", "partition": "queue", "bank": "bank", "account": "bank", "job_name": "job_name"}
# The variables in which other systems give a job's number in its array. The instance may be in a job of such a system.
_PLACE_VARIABLES = frozenset({"SLURM_ARRAY_TASK_ID", "SGE_TASK_ID", "PBS_ARRAY_INDEX", "LSB_JOBINDEX"})
# Flux's urgencies: other jobs have the default, in the middle, and 0 would hold the job.
_URGENCY, _LOWEST, _HIGHEST = 16, 1, 31
# Seconds after the end of a job's first rank until Flux ends the others. If a rank fails, it ends them at once.
_EXIT_SECONDS = 10.0
_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


def jobspec(
    resources: Resources,
    command: Sequence[str],
    environ: Mapping[str, str],
    *,
    name: str,
    cwd: str,
    policy: Policy,
    pmi_mode: str | None = None,
    nested: bool = False,
    output: str = "",
    errors: str = "",
    dependencies: Iterable[int] = (),
) -> dict[str, Any]:
    """The jobspec of a job that runs a command once on each rank of a call.

    Args:
        resources: What the call needs.
        command: Program and arguments.
        environ: The environment to run it in.
        name: Name of the job, unless the user gave one as ``job_name``.
        cwd: Directory in which it starts.
        policy: What the instance demands of jobs.
        pmi_mode: What Flux's shell offers to MPI; None for its default, PMI-1.
        nested: Whether the command runs once, in a Flux instance of its own that has everything the job has.
        output: Path for what it prints, which may contain ``{{id}}``; if empty, it goes to Flux's own store.
        errors: The same for standard error; by default the same path as `output`.
        dependencies: Numbers of jobs that have to succeed first.
    """
    further = {FURTHER_KEYS[key]: str(value) for key, value in resources.template_keys if key in FURTHER_KEYS}
    options: dict[str, Any] = {}
    if nested:
        # One broker on each node; the first one runs the command that follows.
        command = ["flux", "broker", *command]
        options = {"per-resource": {"type": "node"}, "mpi": "none", "exit-timeout": "none"}
    elif resources.cores > 1:
        # The other ranks may wait forever for a rank that has died.
        options = {"cpu-affinity": "per-task", "exit-on-error": 1, "exit-timeout": _EXIT_SECONDS}
        if resources.gpus_per_core:
            options["gpu-affinity"] = "per-task"
    if pmi_mode is not None and not nested:  # brokers find each other by Flux's own PMI
        options["pmi"] = pmi_mode
    if output:
        # The job may also write there itself; see `worker.job.OUTPUT_VARIABLE`.
        options["output"] = {"mode": "append", "stdout": {"type": "file", "path": output}}
        if errors:
            options["output"]["stderr"] = {"type": "file", "path": errors}
    system: dict[str, Any] = {
        "duration": policy.duration(resources),
        "cwd": cwd,
        "environment": {
            **job_environment(environ),
            **dict.fromkeys(THREAD_VARIABLES, str(resources.threads_per_core)),
        },
        "job": {"name": further.pop("job_name", name)},
        "shell": {"options": options},
        **further,
    }
    afterok = [{"scheme": "afterok", "value": job_name(number)} for number in dependencies]
    if afterok:
        system["dependencies"] = afterok
    requested, count = _requested(resources)
    return {
        "version": 1,
        "resources": [requested],
        "tasks": [{"command": list(command), "slot": "task", "count": count}],
        "attributes": {"system": system},
    }


def _requested(resources: Resources) -> tuple[dict[str, Any], dict[str, int]]:
    """The resources of a jobspec, and the number of tasks they are for."""
    each = [{"type": "core", "count": resources.threads_per_core}]
    if resources.gpus_per_core:
        each.append({"type": "gpu", "count": resources.gpus_per_core})
    nodes = resources.num_nodes
    if nodes is None and resources.exclusive:
        nodes = 1  # Flux knows "exclusive" only for nodes
    slots = resources.cores if nodes is None else -(-resources.cores // nodes)
    slot = {"type": "slot", "count": slots, "label": "task", "with": each}
    if nodes is None:
        return slot, {"per_slot": 1}
    node: dict[str, Any] = {"type": "node", "count": nodes, "with": [slot]}
    if resources.exclusive:
        node["exclusive"] = True
    # If the ranks cannot be spread evenly, some slots stay empty.
    return node, {"per_slot": 1} if slots * nodes == resources.cores else {"total": resources.cores}


def run_command(resources: Resources, pmi_mode: str | None, program: Sequence[str]) -> list[str]:
    """The command that runs a program on all ranks of a call, within an instance."""
    pmi = [] if pmi_mode is None else ["-o", f"pmi={pmi_mode}"]
    return ["flux", "run", *task_options(resources), *pmi, *program]


def task_options(resources: Resources) -> list[str]:
    """The ranks of a call and the needs of each, as options of Flux's commands."""
    options = [f"-n{resources.cores}", f"-c{resources.threads_per_core}"]
    if resources.gpus_per_core:
        options.append(f"-g{resources.gpus_per_core}")
    if resources.num_nodes is not None:
        options.append(f"-N{resources.num_nodes}")
    return options


def job_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment for a job: this process's, without its MPI world and its place in an array.

    Variables that Flux cannot take are left to the worker; see `untold_environment`.
    """
    told = {
        name: value
        for name, value in environ.items()
        if name not in _PLACE_VARIABLES and not name.startswith(FOREIGN_PREFIXES) and is_text(name + value)
    }
    return {**told, guard.VARIABLE: "1"}


def untold_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that are not UTF-8, and so cannot be part of a jobspec."""
    return {name: value for name, value in environ.items() if not is_text(name + value)}


def is_text(value: str) -> bool:
    """Return whether the value consists of characters only, without undecodable bytes (PEP 383)."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def urgency(priority: int, is_owner: bool) -> int:
    """Convert the priority of a call into Flux's urgency of a job.

    Args:
        priority: 0 stands for the priority of other jobs.
        is_owner: Whether the instance is this user's; other users can only lower it.
    """
    return min(max(_LOWEST, _URGENCY + priority), _HIGHEST if is_owner else _URGENCY)


def nodes_of(resource_set: Mapping[str, Any]) -> list[NodeShape]:
    """The nodes of a resource set (R, version 1)."""
    execution = resource_set["execution"]
    names = [name for hosts in execution.get("nodelist", ()) for name in expand_hosts(hosts)]
    shapes: dict[int, NodeShape] = {}
    for entry in execution["R_lite"]:
        children = entry["children"]
        cores = len(expand_ranges(str(children.get("core", ""))))
        gpus = tuple(map(str, expand_ranges(str(children.get("gpu", "")))))
        for rank in expand_ranges(str(entry["rank"])):
            shapes[rank] = NodeShape("", cores, gpus)
    # Host names come in the order of the ranks; some ranks may be missing.
    ranks = sorted(shapes)
    if len(names) != len(ranks):
        names = [f"rank {rank}" for rank in ranks]
    return [shapes[rank]._replace(name=name) for rank, name in zip(ranks, names, strict=True)]


def job_name(number: int) -> str:
    """A job's id as Flux's commands print and accept it (F58, RFC 19), in its pure ASCII form."""
    digits = ""
    while number or not digits:
        number, digit = divmod(number, 58)
        digits = _BASE58[digit] + digits
    return f"f{digits}"


def job_number(name: str) -> int:
    """The number of a job, from its id in the form of `job_name`, in Flux's own form, or in decimal.

    Raises:
        ValueError: It is not a job id.
    """
    if name.isdecimal():
        return int(name)
    number = 0
    for letter in name.removeprefix("f").removeprefix("ƒ"):
        number = number * 58 + _BASE58.index(letter)
    return number


# Types of Flux's exceptions that say why a job was ended; others are failures of the job or of the request.
_CAUSES = {"cancel": Cause.CANCELLED, "timeout": Cause.TIME_LIMIT, "node-failure": Cause.NODE_FAILED}
_WORDS = {"cancel": "CANCELED", "timeout": "TIMEOUT"}


class JobLog:
    """The state of a job, from the events so far.

    Attributes:
        state: Its present state.
        status: Wait status of its tasks, the worst of all, once they have ended; as from `os.waitpid`.
        started: Whether it has ever run.
    """

    def __init__(self) -> None:
        self.state = JobState(Phase.PENDING, "PENDING")
        self.status: int | None = None
        self.started = False
        self._type = ""
        self._note = ""
        self._node = ""

    def add(self, event: str, context: Mapping[str, Any]) -> None:
        """Add the next event.

        Args:
            event: Its name.
            context: What else it says.
        """
        if event == "alloc":
            self._node = _where(context)
        elif event == "start":
            self.started = True
            self.state = JobState(Phase.RUNNING, "RUNNING", node=self._node)
        elif event == "exception" and context.get("severity") == 0 and not self._type:
            self._type, self._note = str(context.get("type", "")), str(context.get("note", ""))
        elif event == "finish":
            self.status = _wait_status(int(context["status"]))
            self._end()
        elif event == "clean":
            self._end()

    def _end(self) -> None:
        status = self.status
        word = _WORDS.get(self._type) or ("COMPLETED" if status == 0 and not self._type else "FAILED")
        reason = ": ".join(filter(None, (self._type, self._note)))
        self.state = JobState(
            Phase.ENDED,
            word,
            reason,
            "" if status is None else _exit_code(status),
            self._node,
            cause=_cause(self._type, self._note),
        )


def _where(context: Mapping[str, Any]) -> str:
    """Return where a job was placed, in the scheduler's words, such as ``rank0/core[0-1]``."""
    scheduled = context.get("annotations", {}).get("sched", {})
    return str(scheduled.get("resource_summary", ""))


def _cause(kind: str, note: str) -> Cause:
    # When a broker is lost, its part of the job is, too; only Flux's note says so.
    if kind == "exec" and "lost" in note:
        return Cause.NODE_FAILED
    return _CAUSES.get(kind, Cause.NONE)


def _wait_status(status: int) -> int:
    """Undo the conversion by Flux's shell, which, like other shells, exits with 128 plus a task's signal number."""
    number = (status >> 8) - 128
    return number if os.WIFEXITED(status) and number in {*signal.Signals} else status


def _exit_code(status: int) -> str:
    """The status in the form of `JobState.exit_code`."""
    return f"0:{os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"{os.WEXITSTATUS(status)}:0"


def errors_in(log: bytes, most: int) -> bytes:
    """The last bytes that a job's tasks have written to standard error.

    Args:
        log: Its output log, or a part of it: events, one a line.
        most: Most bytes to return.
    """
    found: list[bytes] = []
    size = 0
    end = len(log)
    while size < most and end > 0:
        start = log.rfind(b"\n", 0, end) + 1
        line, end = log[start:end], start - 1
        if b'"stderr"' in line:
            data = _errors_of(line)
            found.append(data)
            size += len(data)
    return b"".join(reversed(found))[-most:]


def _errors_of(line: bytes) -> bytes:
    try:
        event = json.loads(line)
        context = event["context"]
        if event["name"] != "data" or context["stream"] != "stderr" or "data" not in context:
            return b""
        data = str(context["data"])
    except (ValueError, KeyError, TypeError):
        return b""
    return base64.b64decode(data) if context.get("encoding") == "base64" else data.encode(errors="surrogateescape")


def blobs_of(value: Mapping[str, Any]) -> tuple[bytes, list[bytes]]:
    """Find the blobs that hold a value of Flux's key-value store (RFC 11).

    Args:
        value: Its tree object.

    Returns:
        The value itself if it is small; otherwise the digests of its pieces, which are in the content store.
    """
    data = value.get("data")
    if value.get("type") == "val":
        return base64.b64decode(str(data)), []
    return b"", [bytes.fromhex(str(reference).partition("-")[2]) for reference in data or ()]
