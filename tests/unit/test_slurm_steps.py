"""Slurm's language inside an allocation, tried without one."""

from __future__ import annotations

import pytest

from executorlib.resources import Resources
from executorlib.slurm.steps import parse_time_left, ranks_command, relays_command, step_environment


def test_environment_of_a_step() -> None:
    environ = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "a[1-2]",
        "SLURM_NTASKS": "8",
        "SLURM_MEM_PER_CPU": "100",
        "PMI_RANK": "0",
        "HOME": "/home/x",
    }
    assert step_environment(environ) == {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "a[1-2]", "HOME": "/home/x"}


def test_relays_command() -> None:
    command = relays_command(["a1", "a2"], ["python", "-c", "pass"])
    assert command[0] == "srun"
    assert {"--overlap", "--nodes=2", "--ntasks=2", "--nodelist=a1,a2", "--no-kill", "--mpi=none"} <= set(command)
    assert command[-3:] == ["python", "-c", "pass"]


def test_ranks_command() -> None:
    on_one = ranks_command(Resources(cores=2, threads_per_core=3), ["a1", "a1"], "pmi2", ["program"])
    assert {"--nodes=1", "--ntasks=2", "--nodelist=a1", "--cpus-per-task=3", "--mpi=pmi2"} <= set(on_one)
    resources = Resources(cores=2, slurm_cmd_args=("--comment=x",))
    over_two = ranks_command(resources, ["a2", "a1"], None, ["program"])
    assert {"--distribution=arbitrary", "--comment=x"} <= set(over_two)
    # Newer versions refuse it beside the file that names the nodes.
    assert not [option for option in over_two if option.startswith("--nodes")]
    assert not any(each.startswith(("--mpi", "--nodelist")) for each in over_two)


@pytest.mark.parametrize(
    ("output", "seconds"),
    [("59:58\n", 3598.0), ("2:00:01", 7201.0), ("1-02:03:04", 93784.0), ("UNLIMITED", None), ("", None)],
)
def test_time_left(output: str, seconds: float | None) -> None:
    assert parse_time_left(output) == seconds
