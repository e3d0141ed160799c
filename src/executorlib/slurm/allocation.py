"""Finds out what a Slurm job has: its nodes and, on each, the CPUs and GPUs that belong to the job.

The parsers are pure; only `slurm_allocation` runs a command, once.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping

from executorlib.launchers.hostlist import expand_hosts, expand_ranges, expand_repeated
from executorlib.machine import NodeShape

# A controller under load may be slow to answer; Slurm's own commands give up after MessageTimeout, 10 s by default.
_SECONDS = 60


def slurm_allocation(environ: Mapping[str, str]) -> list[NodeShape]:
    """Find out what the Slurm job that this process runs in has.

    `scontrol` is asked, because it knows the shape of each node. If it cannot be run or cannot reach the controller,
    the environment is read instead, and GPUs are assumed to be the same on all nodes. For a heterogeneous job
    (`salloc … : …`), this is the component named by ``SLURM_JOB_ID``.

    Args:
        environ: The environment, such as ``os.environ``.

    Returns:
        The nodes, in Slurm's order.

    Raises:
        ValueError: There is no allocation, or the job is over.
    """
    job = environ.get("SLURM_JOB_ID", "")
    if not job:
        raise ValueError(
            "this process is not in a Slurm allocation (SLURM_JOB_ID is not set). Start it with sbatch or salloc, or "
            "use SlurmClusterExecutor, which submits a job for each call, or SingleNodeExecutor on this machine alone."
        )
    command = ["scontrol", "show", "job", "-d", job]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return shapes_from_environment(environ)
    if "Invalid job id" in done.stderr:
        raise ValueError(
            f"Slurm does not know job {job}, which SLURM_JOB_ID names: it ended long ago, or belongs to another "
            "cluster. Start the script anew with sbatch or salloc, or unset SLURM_JOB_ID and use another executor."
        )
    if done.returncode != 0:
        return shapes_from_environment(environ)
    shapes = shapes_from_scontrol(done.stdout, job)
    if not shapes:
        state = re.search(r"\bJobState=(\S+)", done.stdout)
        raise ValueError(
            f"Slurm job {job}, which SLURM_JOB_ID names, has no nodes (state {state[1] if state else 'unknown'}). "
            "Start the script anew with sbatch or salloc."
        )
    return shapes


def shapes_from_scontrol(text: str, job: str) -> list[NodeShape]:
    """Read the nodes of a job from the output of ``scontrol show job -d``.

    Args:
        text: The output; for a heterogeneous job it has a paragraph for each component.
        job: Number of the job.
    """
    shapes = []
    for paragraph in re.split(r"^(?=JobId=)", text, flags=re.MULTILINE):
        if not re.match(rf"JobId={re.escape(job)}\b", paragraph):
            continue
        # Slurm before 20.02 called it GRES_IDX=.
        for match in re.finditer(
            r"^ +Nodes=(\S+) CPU_IDs=(\S+) Mem=\S+(?: GRES(?:_IDX)?=(\S*))?", paragraph, re.MULTILINE
        ):
            nodes, cpus, gres = match.groups()
            count = len(expand_ranges(cpus))
            gpus = tuple(_gpu_indices(gres or ""))
            shapes += [NodeShape(name, count, gpus) for name in expand_hosts(nodes)]
    return shapes


def shapes_from_environment(environ: Mapping[str, str]) -> list[NodeShape]:
    """Read the nodes of a job from its environment.

    Raises:
        ValueError: The variables are missing or contradict each other.
    """
    hosts = expand_hosts(environ.get("SLURM_JOB_NODELIST", ""))
    cpus = expand_repeated(environ.get("SLURM_JOB_CPUS_PER_NODE", ""))
    if not hosts or len(hosts) != len(cpus):
        raise ValueError(
            f"SLURM_JOB_NODELIST={environ.get('SLURM_JOB_NODELIST')!r} and "
            f"SLURM_JOB_CPUS_PER_NODE={environ.get('SLURM_JOB_CPUS_PER_NODE')!r} do not give the CPUs of each node, "
            "and neither does scontrol: is Slurm's bin folder on PATH?"
        )
    gpus: tuple[str, ...] = ()
    if indices := environ.get("SLURM_JOB_GPUS"):
        gpus = tuple(map(str, expand_ranges(indices)))
    elif count := environ.get("SLURM_GPUS_ON_NODE"):
        gpus = tuple(str(index) for index in range(int(count)))
    return [NodeShape(name, count, gpus) for name, count in zip(hosts, cpus, strict=True)]


def _gpu_indices(gres: str) -> list[str]:
    """The GPUs in a GRES such as ``gpu:a100:2(IDX:0-1),gpu:v100:1(IDX:4),nvme:1(CNT:1)``."""
    found = re.findall(r"(?:^|,)gpu(?::[^,(]*)?\(IDX:([\d,-]+)\)", gres)
    return [str(index) for index in sorted({index for ranges in found for index in expand_ranges(ranges)})]
