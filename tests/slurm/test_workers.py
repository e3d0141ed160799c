"""Block mode on Slurm: workers are jobs, which wait in the queue, end by a time limit, and are killed."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any

import pytest
from test_cluster import slurm

from contract.functions import Gate, add, put, until, wait_for
from executorlib import SlurmClusterExecutor

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(120)]

WAIT = 60.0


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where files of jobs are; in the end no job is left."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    until(lambda: not jobs(), WAIT)


def block(workers: int, **resources: Any) -> SlurmClusterExecutor:
    needs = {"job_name": "block", **resources}
    return SlurmClusterExecutor(block_allocation=True, max_workers=workers, resource_dict=needs)


def jobs(state: str = "pending,running,completing") -> list[str]:
    """Ids of the jobs of these tests."""
    return slurm("squeue", "--noheader", "--array", "--name=block", f"--states={state}", "--format=%A").split()


def where() -> str:
    """The job, by the name that Slurm's commands know it by."""
    array, element = (os.environ.get(f"SLURM_ARRAY_{name}", "") for name in ("JOB_ID", "TASK_ID"))
    return f"{array}_{element}" if array else os.environ["SLURM_JOB_ID"]


def last(folder: str) -> None:
    """Take longer than any test."""
    put(f"{folder}/lasts", where())
    time.sleep(300)


def test_calls_are_spread_over_jobs(folder: Path) -> None:
    """They run at the same time, in separate jobs, and each job takes call after call."""
    held = Gate(str(folder), "gate")
    with block(3) as executor:
        futures = [executor.submit(held, number) for number in range(3)]
        assert len(set(held.pids(3))) == 3
        held.open()
        assert [future.result(WAIT) for future in futures] == [0, 1, 2]
        assert len({future.result(WAIT) for future in [executor.submit(where) for _ in range(30)]}) <= 3
        assert len(jobs()) == 3


def test_workers_that_wait_in_the_queue(folder: Path) -> None:
    """However long they wait, this is no error. The workers that run do all the work."""
    with block(1, slurm_cmd_args=["--hold"]) as executor:
        future = executor.submit(add, 1, 2)
        until(lambda: jobs("pending"), WAIT)
        assert not future.done()
        slurm("scontrol", "release", *jobs("pending"))
        assert future.result(WAIT) == 3


def test_workers_that_are_no_longer_needed(folder: Path) -> None:
    with block(2, slurm_cmd_args=["--hold"]) as executor:
        future = executor.submit(add, 1, 2)
        until(lambda: len(jobs("pending")) == 2, WAIT)
        executor.shutdown(cancel_futures=True)
    assert future.cancelled()


def test_worker_that_somebody_cancels(folder: Path) -> None:
    """Its call fails with Slurm's word for it, and the other workers go on."""
    with block(2) as executor:
        lost = executor.submit(last, str(folder))
        wait_for(folder / "lasts", WAIT)
        first = (folder / "lasts").read_text()
        slurm("scancel", first)
        with pytest.raises(BrokenExecutor, match="CANCELLED"):
            lost.result(WAIT)
        assert executor.submit(where).result(WAIT) != first


def test_worker_that_reaches_its_time_limit(folder: Path) -> None:
    """Only the call that ran fails. However often that happens in a long session, another job takes its place."""
    with block(1) as executor:
        lost = executor.submit(last, str(folder))
        waits = executor.submit(where)
        wait_for(folder / "lasts", WAIT)
        first = (folder / "lasts").read_text()
        # Limits are whole minutes, but the end can be moved. Slurm looks at it every 30 seconds.
        soon = datetime.datetime.now() + datetime.timedelta(seconds=1)
        slurm("scontrol", "update", f"JobId={first}", f"EndTime={soon.isoformat(timespec='seconds')}")
        with pytest.raises(BrokenExecutor, match="TIMEOUT"):
            lost.result(WAIT)
        assert waits.result(WAIT) != first


def test_cache_directory_that_slurm_cannot_take(folder: Path) -> None:
    """It is an error at once, as it is without block mode."""
    with pytest.raises(ValueError, match="has a backslash in its path"):
        SlurmClusterExecutor(block_allocation=True, max_workers=1, cache_directory=folder / "a\\b")
