"""Slurm's language inside an allocation: commands for steps, and the time that is left.

Like `slurm.queue`, which does the same for jobs, it runs nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from executorlib.resources import Resources
from executorlib.single_node.mpi import FOREIGN_PREFIXES

# Variables that describe the allocation; srun would take others for options of the step.
_ALLOCATION = (
    "SLURM_CONF",
    "SLURM_CLUSTER_NAME",
    "SLURM_JWT",
    "SLURM_JOBID",
    "SLURM_JOB_ID",
    "SLURM_JOB_CPUS_PER_NODE",
    "SLURM_JOB_NODELIST",
    "SLURM_JOB_NUM_NODES",
    "SLURM_JOB_PARTITION",
    "SLURM_NNODES",
    "SLURM_NODELIST",
    "SLURM_TASKS_PER_NODE",
)


def step_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment for `srun` inside an allocation: what the job has asked for is not what a step needs.

    Args:
        environ: The environment of this process.
    """
    foreign = ("SLURM_", *FOREIGN_PREFIXES)
    return {name: value for name, value in environ.items() if name in _ALLOCATION or not name.startswith(foreign)}


def relays_command(nodes: Sequence[str], program: Sequence[str]) -> list[str]:
    """The command that runs a program once on each node, with everything that the allocation has there.

    Args:
        nodes: Names of nodes.
        program: Program and arguments.
    """
    return [
        "srun",
        # Beside all other steps. Without --exact, a step has all of the job's CPUs and GPUs on its nodes.
        *("--overlap", f"--nodes={len(nodes)}", f"--ntasks={len(nodes)}", "--ntasks-per-node=1", "--cpus-per-task=1"),
        *(f"--nodelist={','.join(nodes)}", "--mem=0", "--cpu-bind=none", "--mpi=none", "--export=ALL", "--input=none"),
        # The loss of one node must not end the others.
        *("--no-kill", "--kill-on-bad-exit=0", "--wait=0", "--unbuffered", "--quiet"),
        *program,
    ]


def ranks_command(
    resources: Resources, hosts: Sequence[str], pmi_mode: str | None, program: Sequence[str]
) -> list[str]:
    """The command that runs a program on all ranks of a call, on the nodes chosen for it.

    The ranks pin themselves to the cores that the ledger has given them, since Slurm would choose the same cores for
    all steps that overlap. If there are several nodes, ``SLURM_HOSTFILE`` must name a file with the node of each rank.

    Args:
        resources: What the call needs.
        hosts: The node of each rank.
        pmi_mode: How `srun` and MPI find each other; None for Slurm's default.
        program: Program and arguments.
    """
    nodes = list(dict.fromkeys(hosts))
    # Versions after Slurm 24.11 refuse --nodes together with the file that names the nodes.
    where = ["--distribution=arbitrary"] if len(nodes) > 1 else ["--nodes=1", f"--nodelist={nodes[0]}"]
    return [
        "srun",
        *("--overlap", *where, f"--ntasks={len(hosts)}"),
        *(f"--cpus-per-task={resources.threads_per_core}", "--mem=0", "--cpu-bind=none", "--export=ALL"),
        # When one rank dies, the others would otherwise wait for it until the time limit.
        *("--input=none", "--kill-on-bad-exit=1", "--unbuffered", "--quiet"),
        *([f"--mpi={pmi_mode}"] if pmi_mode is not None else []),
        *(["--overcommit"] if resources.openmpi_oversubscribe else []),
        *resources.slurm_cmd_args,
        *program,
    ]


def parse_time_left(output: str) -> float | None:
    """Seconds in what `squeue` prints for ``%L``, such as ``1-02:03:04``; None if it is not a time."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", output.strip())
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
