"""`SlurmClusterExecutor` on a queue that is not Slurm's: a real Grid Engine, through a configuration of pysqa."""

from __future__ import annotations

import functools
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from contract import failures
from contract.functions import CustomError, Gate, add, fail, files, identity, until, wait_until_gone
from executorlib import SlurmClusterExecutor, get_future_from_cache, terminate_tasks_in_cache
from gridengine.functions import CALM, die, rank_of, surroundings

pytestmark = [pytest.mark.gridengine, pytest.mark.cache]

QUEUES = str(Path(__file__).with_name("queues"))
WAIT = 50.0
assert_broken = functools.partial(failures.assert_broken, wait=WAIT)


def output_of(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, f"{' '.join(command)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def jobs() -> list[str]:
    """The numbers of all jobs that wait or run."""
    return re.findall("<JB_job_number>(.*?)</JB_job_number>", output_of("qstat", "-xml"))


def demands(job: str) -> dict[str, str]:
    """Return the resources that a job asks for, as Grid Engine reports them."""
    lines = [line.partition(":") for line in output_of("qstat", "-j", job).splitlines()]
    return {key.strip(): value.strip() for key, _, value in lines}


def job_of(name: str) -> str:
    """The number of the job of this name, once there is one."""

    def named() -> list[str]:
        done = subprocess.run(["qstat", "-j", name], capture_output=True, text=True, timeout=30)
        return re.findall(r"^job_number: +(\d+)", done.stdout, re.MULTILINE)

    until(named, WAIT)
    return named()[-1]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def make(store: Path, gates: list[Gate]) -> Iterator[Callable[..., Any]]:
    """Make executors that share one cache directory."""
    made = []

    def new(**kwargs: Any) -> Any:
        made.append(SlurmClusterExecutor(pysqa_config_directory=QUEUES, cache_directory=str(store), **kwargs))
        return made[-1]

    yield new
    for gate in gates:
        gate.open()
    for executor in made:
        executor.shutdown(wait=True, cancel_futures=True)
    # Grid Engine takes a moment to end a job.
    until(lambda: not jobs(), 15.0)


def test_calls_and_what_jobs_find(
    make: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OF_THIS_SESSION", "some value")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with make() as executor:
        first = executor.submit(add, 1, 2)
        dependent = executor.submit(add, first, executor.submit(identity, 4))
        mapped = executor.map(add, range(3), range(3))
        failing = executor.submit(fail, "on purpose")
        after_failing = executor.submit(identity, failing)
        unnamed = executor.submit(lambda: 5)
        found = executor.submit(surroundings, resource_dict={"job_name": "named", "account": "ours"})
        with pytest.raises(ValueError, match="unknown key 'colour' in resource_dict"):
            executor.submit(surroundings, resource_dict={"colour": "red"})
        elsewhere = executor.submit(
            surroundings, resource_dict={"cwd": str(tmp_path / "else where"), "cache_key": "elsewhere"}
        )
        assert (first.result(WAIT), unnamed.result(WAIT)) == (3, 5)
        assert list(mapped) == [0, 2, 4]
        assert isinstance(failing.exception(WAIT), CustomError)
        assert isinstance(after_failing.exception(WAIT), CustomError)
        assert dependent.result(WAIT) == 7
        environment = found.result(WAIT)
        assert environment["OF_THIS_SESSION"] == "some value"
        assert (environment["JOB_NAME"], environment["cwd"]) == ("named", str(tmp_path / "here"))
        assert elsewhere.result(WAIT)["cwd"] == str(tmp_path / "else where")
    warnings = [record.getMessage() for record in caplog.records]
    assert len([text for text in warnings if "does not use" in text and "account" in text]) == 1


def test_jobs_that_end_without_a_result(make: Callable[..., Any], gate: Callable[..., Gate], tmp_path: Path) -> None:
    """Each error says how; the same calls can be submitted again."""
    held, folder = gate(), str(tmp_path)
    with make() as executor:
        killed = executor.submit(die, signal.SIGKILL, folder)
        ended = executor.submit(die, 0, folder)
        deleted = executor.submit(held, resource_dict={"job_name": "deleted"})
        stopped = executor.submit(held, 2, resource_dict={"run_time_max": 1})
        no_python = executor.submit(
            identity, 1, resource_dict={"submission_template": "#$ -S /bin/sh\n/no/such/python"}
        )
        refused = executor.submit(identity, 3, resource_dict={"submission_template": "#$ -l colour=red\n{{command}}"})
        too_many = executor.submit(identity, 4, resource_dict={"threads_per_core": 9})
        held.pid()
        output_of("qdel", job_of("deleted"))
        assert_broken(refused, 'qsub refused it: .*unknown resource "colour"')
        assert_broken(too_many, "needs 9 cores, but its queue has cores_max: 8")
        assert_broken(ended, r"ended as failed \(exit code 7, node localhost\)", "last words")
        assert_broken(killed, r"ended as failed \(.*exit code 137 by SIGKILL", "last words")
        assert_broken(deleted, r"ended as failed \(.*exit code 137 by SIGKILL")
        assert_broken(no_python, r"ended as failed \(exit code 127, node localhost\)", "not found")
        assert isinstance(stopped.exception(WAIT), TimeoutError)
        held.open()
        (tmp_path / CALM).touch()
        again = [executor.submit(die, signal.SIGKILL, folder), executor.submit(die, 0, folder)]
        assert [future.result(WAIT) for future in again] == [CALM, CALM]


def test_resources(make: Callable[..., Any], gate: Callable[..., Gate]) -> None:
    held = gate()
    with make() as executor:
        needs = {"threads_per_core": 3, "memory_max": 2, "run_time_max": 100, "job_name": "needy", "priority": -5}
        first = executor.submit(held, 1, resource_dict=needs)
        short = executor.submit(held, 2, resource_dict={"queue": "short", "run_time_max": 3600, "job_name": "short"})
        asked = demands(job_of("needy"))
        assert asked["parallel environment"] == "smp range: 3"
        assert set(asked["hard resource_list"].split(",")) == {"h_vmem=2G", "h_rt=180"}
        assert asked["priority"] == "-5"
        assert demands(job_of("short"))["hard resource_list"] == "h_rt=600"
        held.open()
        assert [first.result(WAIT), short.result(WAIT)] == [1, 2]


@pytest.mark.mpi
def test_ranks(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"):
        monkeypatch.setenv(name, "1")
    with make() as executor:
        future = executor.submit(rank_of, 7, resource_dict={"cores": 2, "openmpi_oversubscribe": True})
        assert future.result(WAIT) == [(0, 7), (1, 7)]


def test_leaving_and_coming_back(make: Callable[..., Any], gate: Callable[..., Gate], store: Path) -> None:
    held = gate()
    executor = make()
    executor.submit(held, 1, resource_dict={"cache_key": "held"})
    (pid,) = held.pids(1)
    executor.shutdown(wait=False)
    with make() as again:
        joined = again.submit(held, 1, resource_dict={"cache_key": "held"})
        until(joined.running, WAIT)
        followed = get_future_from_cache(store, "held")
        held.open()
        assert (joined.result(WAIT), followed.result(WAIT)) == (1, 1)
    assert held.pids(1) == [pid]


def test_cancel(make: Callable[..., Any], gate: Callable[..., Gate], store: Path) -> None:
    """Cancelling removes a waiting job from the queue; `terminate_tasks_in_cache` ends running ones, too."""
    held = gate()
    executor = make()
    template = (Path(QUEUES) / "job.sh.j2").read_text().replace("#$ -S", "#$ -h\n#$ -S")
    waits = executor.submit(held, 1, resource_dict={"submission_template": template, "job_name": "waits"})
    runs = executor.submit(held, 2)
    waiting_job = job_of("waits")
    assert waits.cancel()
    pid = held.pid()
    until(lambda: waiting_job not in jobs(), WAIT)
    executor.shutdown(wait=False)
    until(runs.cancelled, WAIT)
    terminate_tasks_in_cache(store, pysqa_config_directory=QUEUES)
    wait_until_gone(pid, seconds=WAIT)
    assert not files(store, "_i.h5")


def test_terminating_what_has_ended_already(make: Callable[..., Any], gate: Callable[..., Gate], store: Path) -> None:
    """A job that died while no session watched leaves an entry, and qdel refuses its number."""
    held = gate()
    executor = make()
    executor.submit(held, 1)
    pid = held.pid()
    executor.shutdown(wait=False)
    os.kill(pid, signal.SIGKILL)
    until(lambda: not jobs(), WAIT)
    assert files(store, "_i.h5")
    terminate_tasks_in_cache(store, pysqa_config_directory=QUEUES)
    assert not files(store, "_i.h5")


def test_job_that_cannot_be_started(make: Callable[..., Any], tmp_path: Path) -> None:
    """Grid Engine keeps it in the queue forever, in state Eqw."""
    directory = tmp_path / "removed"
    template = (Path(QUEUES) / "job.sh.j2").read_text().replace("#$ -S", "#$ -h\n#$ -S")
    needs = {"cwd": str(directory), "submission_template": template, "job_name": "homeless"}
    with make() as executor:
        future = executor.submit(identity, 1, resource_dict=needs)
        job = job_of("homeless")
        directory.rmdir()
        output_of("qrls", job)
        assert_broken(future, "would wait forever and was cancelled: .* reports it as .*working directory")
        until(lambda: job not in jobs(), WAIT)


def test_workers_that_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with SlurmClusterExecutor(
        pysqa_config_directory=QUEUES, block_allocation=True, max_workers=2, hostname_localhost=True
    ) as executor:
        assert list(executor.map(add, range(20), range(20))) == [2 * i for i in range(20)]
    until(lambda: not jobs(), WAIT)
