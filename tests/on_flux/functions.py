"""Functions that run in Flux jobs."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from contract.functions import put

GPU_VARIABLES = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")


def variables(*names: str) -> list[str | None]:
    return [os.environ.get(name) for name in names]


def about_job(number: str, fields: str) -> list[str]:
    """Return Flux's description of a job, in the words of `flux jobs`."""
    command = ["flux", "jobs", "--no-header", f"--format={fields}", number]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def my_job(fields: str) -> list[str]:
    return about_job(os.environ["FLUX_JOB_ID"], fields)


def rank_of_world(_argument: Any) -> tuple[int, int, list[str | None]]:
    from mpi4py import MPI

    return MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size, variables(*GPU_VARIABLES)


def gather_nodes(_argument: Any) -> list[str]:
    """The nodes of all ranks, by a message among them."""
    from mpi4py import MPI

    # All pretended nodes are one host: the broker's rank tells them apart.
    done = subprocess.run(["flux", "getattr", "rank"], capture_output=True, text=True, check=True)
    return sorted(MPI.COMM_WORLD.allgather(done.stdout.strip()))


def calls_in_an_instance_of_its_own(number: int) -> tuple[int, int, str]:
    """The result of a call in an executor of this one's instance, the cores of that instance, and what it is called."""
    from executorlib import FluxJobExecutor

    with FluxJobExecutor() as executor:
        cores = sum(node["cores"] for node in executor.info["nodes"].values())
        return executor.submit(abs, number).result(), cores, os.environ["FLUX_URI"]


def say(line: str) -> str:
    """Print a line, which may stay in a buffer until the worker ends; returns the job's id."""
    sys.stdout.write(f"{line}\n")
    return os.environ["FLUX_JOB_ID"]


def printed(number: str) -> list[str]:
    """The lines that a job has printed, once it has ended."""
    command = ["flux", "job", "attach", number]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def say_and_die() -> None:
    os.write(2, b"last words\n")
    os.kill(os.getpid(), 9)


def jobs(name: str, *options: str) -> list[str]:
    """The numbers of all jobs of a name that the instance has had, or of those that `flux jobs` lists with options."""
    command = ["flux", "jobs", *(options or ["-a"]), "--no-header", f"--name={name}", "--format={id.dec}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def active_jobs(name: str) -> list[str]:
    """Those that wait or run."""
    return jobs(name, "--filter=pending,running")


def arguments() -> list[str]:
    return sys.argv


def leave_and_die(path: str) -> None:
    """Leave a process in a session of its own, which has this one's output open, and end without a word."""
    left = subprocess.Popen(["sleep", "900"], start_new_session=True)
    put(path, str(left.pid))
    os._exit(3)


def print_much_and_die(size: int) -> None:
    os.write(2, b"the first words\n")
    for _ in range(size // 100):
        os.write(1, b"o" * 99 + b"\n")
    os.write(2, b"last words\n")
    os._exit(4)


def die_on_a_rank(rank: int) -> None:
    from mpi4py import MPI

    if MPI.COMM_WORLD.rank == rank:
        os._exit(5)
    MPI.COMM_WORLD.barrier()
