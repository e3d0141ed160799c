"""`SlurmClusterExecutor` over PBS Professional, whose commands are those of `pretended_pbs`."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from contract.failures import assert_broken
from contract.functions import CustomError, Gate, add, fail, files, identity, until, wait_until_gone
from executorlib import SlurmClusterExecutor, get_future_from_cache, terminate_tasks_in_cache
from gridengine.functions import CALM, die, surroundings

pytestmark = [
    pytest.mark.cache,
    pytest.mark.long,
    pytest.mark.skipif(sys.platform != "linux", reason="needs Linux"),
    pytest.mark.skipif(importlib.util.find_spec("pysqa") is None, reason="needs pysqa (pip install pysqa)"),
]

WAIT = 40.0
HELD = "#!/bin/sh\n#PBS -N {{ job_name }} -h\n{{ command }}\n"


class Pbs:
    """The pretended system.

    Args:
        folder: Its files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.queues = str(folder / "queues")
        (folder / "bin").mkdir(parents=True)
        (folder / "state").mkdir()
        (folder / "queues").mkdir()
        (folder / "queues" / "queue.yaml").write_text(
            "queue_type: PBS\nqueue_primary: workq\nqueues:\n  workq: {cores_max: 8}\n  nosuch: {cores_max: 8}\n"
        )
        program = [sys.executable, "-IS", str(Path(__file__).with_name("pretended_pbs.py")), str(folder / "state")]
        for name in ("qsub", "qstat", "qselect", "qdel"):
            command = folder / "bin" / name
            command.write_text(f'#!/bin/sh\nexec {shlex.join([*program, name])} "$@"\n')
            command.chmod(0o755)

    def run(self, *command: str) -> str:
        path = str(self.folder / "bin" / command[0])
        return subprocess.run([path, *command[1:]], capture_output=True, text=True, timeout=30, check=True).stdout

    def jobs(self) -> list[dict[str, Any]]:
        """All jobs that there have been, in order."""
        names = sorted(int(name) for name in os.listdir(self.folder / "state") if name.isdigit())
        return [json.loads((self.folder / "state" / str(name)).read_text()) for name in names]

    def going(self) -> list[str]:
        """The ids of jobs that have not ended."""
        return self.run("qselect").split()

    def end(self) -> None:
        going = self.going()
        if going:
            self.run("qdel", *going)
        until(lambda: not self.going(), WAIT)


@pytest.fixture
def pbs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pbs]:
    made = Pbs(tmp_path / "pbs")
    monkeypatch.setattr("executorlib.jobs.command_system.CommandSystem.first_query", 0.1)
    monkeypatch.setattr("executorlib.jobs.command_system.CommandSystem.last_query", 0.5)
    monkeypatch.setattr("executorlib.jobs.results._GRACE", 0.1)  # the disk is local
    monkeypatch.setenv("PATH", f"{made.folder / 'bin'}:{os.environ['PATH']}")
    yield made
    made.end()


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def make(pbs: Pbs, store: Path, gates: list[Gate]) -> Iterator[Callable[..., Any]]:
    """Make executors that share one cache directory."""
    made = []

    def new(**kwargs: Any) -> Any:
        made.append(SlurmClusterExecutor(pysqa_config_directory=pbs.queues, cache_directory=str(store), **kwargs))
        return made[-1]

    yield new
    for gate in gates:
        gate.open()
    for executor in made:
        executor.shutdown(wait=True, cancel_futures=True)


def test_calls_and_what_jobs_find(
    make: Callable[..., Any], pbs: Pbs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OF_THIS_SESSION", "some value")
    monkeypatch.setenv("PBS_ARRAY_INDEX", "1")  # of a job that the session is in
    (tmp_path / "my folder").mkdir()
    monkeypatch.chdir(tmp_path / "my folder")
    with make() as executor:
        found = executor.submit(surroundings, resource_dict={"job_name": "a name"}).result(WAIT)
        mapped = executor.map(add, range(3), range(3))
        assert list(mapped) == [0, 2, 4]
    assert (found["OF_THIS_SESSION"], found["cwd"]) == ("some value", str(tmp_path / "my folder"))
    assert (found["PBS_ENVIRONMENT"], "PBS_ARRAY_INDEX" in found) == ("PBS_BATCH", False)
    plain, array = pbs.jobs()
    assert (plain["asked"]["N"], plain["asked"]["q"]) == (["a_name"], ["workq"])
    assert array["asked"]["J"] == ["0-2"]
    # Others may see a job's variables, which hold nothing of the session's except the places of programs.
    assert {*plain["environ"], *array["environ"]} <= {"PATH", "LD_LIBRARY_PATH"}


def test_inputs(make: Callable[..., Any], pbs: Pbs, gate: Callable[..., Gate]) -> None:
    """PBS waits for whole jobs and whole arrays; this session waits for elements."""
    held = gate()
    with make() as executor:
        first = executor.submit(held, 7, resource_dict={"job_name": "first"})
        second = executor.submit(add, first, 10)
        many = [executor.submit(held, x) for x in range(3)]
        total = executor.submit(sum, many)
        each = [executor.submit(add, x, 1) for x in many]
        until(lambda: sum(bool(job["after"]) for job in pbs.jobs()) == 2, WAIT)
        held.open()
        assert (second.result(WAIT), total.result(WAIT)) == (17, 3)
        assert [future.result(WAIT) for future in each] == [1, 2, 3]
    jobs = pbs.jobs()
    assert sorted("".join(job["after"]).endswith("[]") for job in jobs if job["after"]) == [False, True]
    assert [job["asked"]["J"] for job in jobs if "J" in job["asked"]] == [["0-2"], ["0-2"]]


def test_failures(make: Callable[..., Any], pbs: Pbs, tmp_path: Path) -> None:
    """Each error says how; the same calls can be submitted again."""
    folder = str(tmp_path)
    with make() as executor:
        failing = executor.submit(fail, "on purpose")
        after_failing = executor.submit(identity, failing)
        killed = executor.submit(die, signal.SIGKILL, folder)
        ended = executor.submit(die, 0, folder)
        refused = executor.submit(identity, 3, resource_dict={"queue": "nosuch"})
        no_python = executor.submit(identity, 1, resource_dict={"submission_template": "#PBS -N a\n/no/such/python"})
        assert isinstance(failing.exception(WAIT), CustomError)
        assert isinstance(after_failing.exception(WAIT), CustomError)
        assert_broken(refused, "qsub refused it: qsub: Unknown queue")
        assert_broken(ended, r"ended as failed \(exit code 7, node node1\)", "last words")
        assert_broken(killed, r"ended as failed \(exit code 137 by SIGKILL, node node1\)", "last words")
        assert_broken(no_python, r"ended as failed \(exit code 127, node node1\)", "not found")
        (tmp_path / CALM).touch()
        again = [executor.submit(die, signal.SIGKILL, folder), executor.submit(die, 0, folder)]
        assert [future.result(WAIT) for future in again] == [CALM, CALM]


def test_a_job_that_somebody_deletes(make: Callable[..., Any], pbs: Pbs, gate: Callable[..., Gate]) -> None:
    held = gate()
    with make() as executor:
        futures = [executor.submit(held, x) for x in range(2)]
        held.pids(2)
        (name,) = pbs.going()
        pbs.run("qdel", name.replace("[]", "[1]"))
        assert_broken(futures[1], r"job \d+\[1\] ended as terminated \(exit code 0:15 by SIGTERM, node node1\)")
        held.open()
        assert futures[0].result(WAIT) == 0


def test_cancel(make: Callable[..., Any], pbs: Pbs, gate: Callable[..., Gate], store: Path) -> None:
    """Cancelling removes a waiting job from the queue; `terminate_tasks_in_cache` ends running ones, too."""
    held = gate()
    executor = make()
    waits = executor.submit(held, 1, resource_dict={"submission_template": HELD})
    until(lambda: pbs.going(), WAIT)
    (waiting,) = pbs.going()
    assert waits.cancel()
    until(lambda: waiting not in pbs.going(), WAIT)
    executor.submit(identity, 0).result(WAIT)
    runs = [executor.submit(held, x) for x in range(2)]
    pids = held.pids(2)
    executor.shutdown(wait=False)
    until(lambda: all(future.cancelled() for future in runs), WAIT)
    terminate_tasks_in_cache(store, pysqa_config_directory=pbs.queues)
    for pid in pids:
        wait_until_gone(pid, seconds=WAIT)
    assert not files(store, "_i.h5")


def test_leaving_and_coming_back(
    make: Callable[..., Any], pbs: Pbs, gate: Callable[..., Gate], store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elements that run are joined; a job that died meanwhile leaves an entry, which can be terminated."""
    held, dying = gate("held"), gate("dying")
    executor = make()
    futures = [executor.submit(held, x, resource_dict={"cache_key": f"held-{x}"}) for x in range(2)]
    held.pids(2)
    executor.submit(dying, 1)
    pid = dying.pid()
    executor.shutdown(wait=False)
    until(lambda: all(future.cancelled() for future in futures), WAIT)
    with make() as again:
        joined = [again.submit(held, x, resource_dict={"cache_key": f"held-{x}"}) for x in range(2)]
        until(lambda: all(future.running() for future in joined), WAIT)
        followed = get_future_from_cache(store, "held-1")
        held.open()
        assert [future.result(WAIT) for future in [*joined, followed]] == [0, 1, 1]
    os.kill(pid, signal.SIGKILL)
    until(lambda: not pbs.going(), WAIT)
    assert len(pbs.jobs()) == 2
    assert files(store, "_i.h5")
    terminate_tasks_in_cache(store, pysqa_config_directory=pbs.queues)
    assert not files(store, "_i.h5")


def test_workers_that_stay(pbs: Pbs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with SlurmClusterExecutor(
        pysqa_config_directory=pbs.queues, block_allocation=True, max_workers=2, hostname_localhost=True
    ) as executor:
        assert list(executor.map(add, range(20), range(20))) == [2 * i for i in range(20)]
        assert executor.submit(os.getcwd).result(WAIT) == str(tmp_path)
    until(lambda: not pbs.going(), WAIT)
    assert [job["asked"].get("J") for job in pbs.jobs()] == [["0-1"]]


def test_arguments_that_pbs_cannot_honour(pbs: Pbs, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="PBS Professional does not start ranks"):
        SlurmClusterExecutor(pysqa_config_directory=pbs.queues, pmi_mode="pmix")
    with pytest.raises(ValueError, match="has a colon in its path"):
        SlurmClusterExecutor(pysqa_config_directory=pbs.queues, cache_directory=str(tmp_path / "a:b"))
