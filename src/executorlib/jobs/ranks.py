"""Starts the ranks of a call in a job whose queuing system does not start them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from executorlib.resources import Resources


def mpiexec_command(
    resources: Resources, program: Sequence[str], mpiexec: str = "mpiexec", environment: Sequence[str] = ()
) -> list[str]:
    """The command, run in a job, that starts a program on all ranks of a call with the MPI library's own `mpiexec`.

    Each rank sees all GPUs of the job on its node, and has to choose its own by its number among the ranks there.

    Args:
        resources: The resources of the call.
        program: Program and arguments.
        mpiexec: The path or name of `mpiexec`.
        environment: Further arguments of `env`, which runs `mpiexec`.
    """
    if resources.cores == 1:
        return list(program)
    # For Open MPI 4 and 5: the system has assigned the cores, and a binding to one core would confine a rank's threads
    # to it.
    unbound = ["OMPI_MCA_hwloc_base_binding_policy=none", "PRTE_MCA_hwloc_default_binding_policy=none"]
    oversubscribe = ["--oversubscribe"] if resources.openmpi_oversubscribe else []
    return ["env", *environment, *unbound, mpiexec, "-n", str(resources.cores), *oversubscribe, *program]
