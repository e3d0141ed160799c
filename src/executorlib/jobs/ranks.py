"""How a job starts the ranks of a call where no queuing system does it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from executorlib.resources import Resources


def mpiexec_command(
    resources: Resources, program: Sequence[str], mpiexec: str = "mpiexec", environment: Sequence[str] = ()
) -> list[str]:
    """The command, in a job, that runs a program on all ranks of a call by the MPI library's own starter.

    Each rank sees all GPUs that the job has on its node, and has to choose by its number among the ranks there.

    Args:
        resources: What the call needs.
        program: Program and arguments.
        mpiexec: The starter.
        environment: What `env` is told beside what all starters need.
    """
    if resources.cores == 1:
        return list(program)
    # Open MPI 4's and 5's: the system has given out the cores; a binding to one would hold a rank's threads there, too.
    unbound = ["OMPI_MCA_hwloc_base_binding_policy=none", "PRTE_MCA_hwloc_default_binding_policy=none"]
    oversubscribe = ["--oversubscribe"] if resources.openmpi_oversubscribe else []
    return ["env", *environment, *unbound, mpiexec, "-n", str(resources.cores), *oversubscribe, *program]
