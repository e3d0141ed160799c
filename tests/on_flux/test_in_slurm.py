"""Flux inside a job of a real Slurm: one `srun` starts an instance over its nodes, and a program in that."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(120),
    pytest.mark.skipif(shutil.which("flux") is None, reason="needs Flux: there is no flux command on PATH"),
]

PROGRAM = """\
import os

from executorlib import FluxClusterExecutor, FluxJobExecutor


def of_job(number):
    return number, "FLUX_JOB_ID" in os.environ


def size(number):
    from mpi4py import MPI

    return MPI.COMM_WORLD.size


with FluxJobExecutor() as executor:
    print([executor.submit(of_job, number).result() for number in range(2)])
    print(executor.submit(size, 0, resource_dict={"cores": 2, "num_nodes": 2}).result())
with FluxClusterExecutor(cache_directory="cache") as executor:
    first = executor.submit(of_job, 3)
    print(executor.submit(len, first).result())
"""


def test_an_instance_over_the_nodes_of_a_job(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    bindings = subprocess.run(["flux", "python", "--get-path"], capture_output=True, text=True, check=True).stdout
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_JOB", "SLURM_N", "FLUX_"))}
    done = subprocess.run(
        [
            *("salloc", "--quiet", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=4", "--time=5"),
            *("srun", "--mpi=pmi2", "flux", "start", sys.executable, "program.py"),
        ],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=tmp_path,
        env={**kept, "PYTHONPATH": bindings.strip()},
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stdout == "[(0, True), (1, True)]\n[2, 2]\n2\n"
