"""The Slurm on which the other tests run works: job arrays, nodes, GPUs, accounting."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slurm

COMMAND_SECONDS = 30.0


def slurm(*command: str) -> str:
    """Return the output of a Slurm command, which must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS)
    assert done.returncode == 0, f"{' '.join(command)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def array(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The id of an array of four jobs that have ended, and the folder they wrote to."""
    folder = tmp_path_factory.mktemp("array")
    script = 'echo "$SLURM_ARRAY_TASK_ID of $SLURM_ARRAY_JOB_ID"; exit $((SLURM_ARRAY_TASK_ID == 2))'
    options = ["--parsable", "--array=0-3", f"--chdir={folder}", "--output=%a", f"--wrap={script}"]
    # The exit status of --wait is the highest of the jobs.
    done = subprocess.run(["sbatch", "--wait", *options], capture_output=True, text=True, timeout=COMMAND_SECONDS)
    assert (done.returncode, done.stderr) == (1, "")
    return done.stdout.strip(), folder


def test_job_array_runs(array: tuple[str, Path]) -> None:
    job_id, folder = array
    assert [(folder / str(index)).read_text() for index in range(4)] == [f"{i} of {job_id}\n" for i in range(4)]


def test_controller_remembers_how_jobs_ended(array: tuple[str, Path]) -> None:
    job_id, _ = array
    jobs = slurm("scontrol", "--oneliner", "show", "job", job_id).splitlines()
    states = {
        (fields["ArrayTaskId"], fields["JobState"], fields["ExitCode"])
        for fields in (dict(field.split("=", 1) for field in job.split() if "=" in field) for job in jobs)
    }
    assert states == {
        ("0", "COMPLETED", "0:0"),
        ("1", "COMPLETED", "0:0"),
        ("2", "FAILED", "1:0"),
        ("3", "COMPLETED", "0:0"),
    }


def test_accounting_knows_the_array(array: tuple[str, Path]) -> None:
    if "accounting_storage/slurmdbd" not in slurm("scontrol", "show", "config"):
        pytest.skip("needs accounting (SLURM_CLUSTER_ACCOUNTING=1 make test-slurm)")
    job_id, _ = array
    expected = {
        f"{job_id}_0|COMPLETED|0:0",
        f"{job_id}_1|COMPLETED|0:0",
        f"{job_id}_2|FAILED|1:0",
        f"{job_id}_3|COMPLETED|0:0",
    }
    query = ("sacct", "-n", "-P", "-X", "-j", job_id, "-o", "JobID,State,ExitCode")
    give_up = time.monotonic() + COMMAND_SECONDS
    # Slurm tells its database of a job's end some time after that end.
    while (known := set(slurm(*query).splitlines())) != expected and time.monotonic() < give_up:
        time.sleep(0.1)
    assert known == expected


def test_two_nodes() -> None:
    names = slurm("srun", "--nodes=2", "--ntasks=2", "printenv", "SLURMD_NODENAME").split()
    assert len(set(names)) == 2


def test_job_sees_its_gpus() -> None:
    if "gpu" not in slurm("sinfo", "--noheader", "--format=%G"):
        pytest.skip("needs nodes with GPUs")
    assert slurm("srun", "--gpus=1", "printenv", "CUDA_VISIBLE_DEVICES").strip() == "0"
