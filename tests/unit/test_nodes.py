"""Tests of the executor for allocations without Slurm: commands, environments, errors outside of an allocation, and
agents that a program of ours starts in place of `srun`."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fakes
from conftest import Scripts
from executorlib import SlurmJobExecutor
from executorlib.errors import ExecutorlibSocketError
from executorlib.launchers.contract import Lifetime, Process
from executorlib.relay.executor_side import Relays
from executorlib.relay.node_side import Relay
from executorlib.single_node.agent import AgentClient
from unit.node_functions import (
    agent_and_relay,
    append,
    append_and_die,
    arguments,
    begin,
    fail,
    limits,
    node,
    relay,
    same,
    write_to_sockets,
)


def test_outside_an_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(RuntimeError, match="SlurmClusterExecutor"):
        SlurmJobExecutor()


@pytest.mark.parametrize(("module", "without"), [("worker.mpi", "zmq"), ("transports.dealer", "asyncio")])
def test_modules_that_a_rank_does_not_load(module: str, without: str) -> None:
    """All ranks start at once and wait for each other, so each loaded module costs time on every rank."""
    code = f"import sys, executorlib.{module}; sys.exit({without!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# -- agents -----------------------------------------------------------------------------------------------------------

pytestmark = [pytest.mark.linux, pytest.mark.long]

SECONDS = 30.0

SRUN = """\
#!/bin/sh
# Runs the program once for each node of --nodelist, all on this machine.
while [ "${1#--}" != "$1" ]; do
    case "$1" in --nodelist=*) nodes=$(echo "${1#*=}" | tr , " ");; esac
    shift
done
for node in $nodes; do SLURMD_NODENAME=$node "$@" & done
wait
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process, and what it starts, find themselves in a job of two nodes with two CPUs each."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {"srun": SRUN, "scontrol": "#!/bin/sh\nexit 1\n", "squeue": "#!/bin/sh\nexit 1\n"}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "a,b")
    monkeypatch.setenv("SLURM_JOB_CPUS_PER_NODE", "2(x2)")


@pytest.fixture
def allocation(job: None) -> Iterator[Callable[..., Any]]:
    """Makes executors of that job."""
    made: list[Any] = []

    def make(**options: Any) -> Any:
        made.append(SlurmJobExecutor(hostname_localhost=True, **options))
        return made[-1]

    yield make
    for executor in made:
        executor.shutdown(cancel_futures=True)


def test_agents_end_in_silence(job: None, scripts: Scripts) -> None:
    """They have the session's warning filters, which turn all warnings into errors here."""
    scripts.run(
        """
        from executorlib import SlurmJobExecutor

        if __name__ == "__main__":
            with SlurmJobExecutor(hostname_localhost=True) as executor:
                for needs in ({}, {"slurm_cmd_args": ["--quiet"]}):
                    assert executor.submit(abs, -1, resource_dict=needs).result() == 1
        """
    )


@pytest.mark.parametrize("block", [False, True], ids=["default", "block"])
def test_large_and_small_values(allocation: Callable[..., Any], block: bool) -> None:
    """Large ones travel in another way between a relay and a worker, but the order is kept."""
    executor = allocation(block_allocation=block, max_workers=2 if block else None)
    values = [bytes([index]) * (10, 100_000, 300_000, 1_000_000)[index % 4] for index in range(24)]
    assert list(executor.map(same, values, timeout=SECONDS)) == values


def test_settings_are_sent_once(
    allocation: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Workers inherit them from their agent. Loading `logging` would take each of them longer than a call."""
    sent: list[set[str]] = []
    put = Relays.put

    def note(self: Relays, relay: Any, number: int, header: list[Any], frames: Any = ()) -> None:
        if header[0] == "setup":
            sent.append(set(header[1].get("settings", ())))
        put(self, relay, number, header, frames)

    monkeypatch.setattr(Relays, "put", note)
    talkative, before = logging.getLogger("talkative"), sys.getrecursionlimit()
    request.addfinalizer(lambda: (talkative.setLevel(logging.NOTSET), sys.setrecursionlimit(before)))
    talkative.setLevel(logging.DEBUG)
    executor = allocation()
    assert executor.submit(limits).result(SECONDS) == (before, logging.DEBUG)
    sys.setrecursionlimit(before + 1)
    assert executor.submit(limits).result(SECONDS) == (before + 1, logging.DEBUG)
    assert sent == [set(), {"recursion_limit"}]


def test_workers_that_are_steps_outlive_exceptions(allocation: Callable[..., Any]) -> None:
    executor = allocation(block_allocation=True, max_workers=1, resource_dict={"slurm_cmd_args": ["--quiet"]})
    first = executor.submit(os.getpid).result(SECONDS)
    with pytest.raises(ValueError, match="an ordinary one"):
        executor.submit(fail).result(SECONDS)
    assert executor.submit(os.getpid).result(SECONDS) == first


def test_call_that_is_a_step_and_fails(allocation: Callable[..., Any]) -> None:
    executor = allocation(resource_dict={"slurm_cmd_args": ["--quiet"]})
    with pytest.raises(ValueError, match="an ordinary one"):
        executor.submit(fail).result(SECONDS)
    executor.shutdown()  # its step ends, with no need to be killed


@pytest.mark.parametrize(
    ("sent", "passed_on"),
    [([signal.SIGTERM], signal.SIGTERM), ([signal.SIGINT, signal.SIGKILL, signal.SIGTERM], signal.SIGKILL)],
    ids=str,
)
def test_signals_before_a_worker_is_there(sent: list[int], passed_on: int) -> None:
    """It gets the last one, unless an earlier one was stronger."""
    agent = AgentClient(
        fakes.Events(),
        spawn=False,
        lifetime=Lifetime.CALL,
        stock=0,
        preload=[],
        threads=1,
        on_exit=lambda *_: None,
    )
    orders: list[Any] = []
    agent._put = orders.append  # type: ignore[method-assign]
    agent._flush = lambda: None  # type: ignore[method-assign]
    process = fakes.process()
    agent._wanted[7] = process
    for number in sent:
        agent.kill(process, number)
    assert orders == []
    reading, writing = os.pipe()
    agent._on_started(7, 4711, [reading])
    assert orders == [["kill", 7, passed_on]]
    for fd in (reading, writing):
        os.close(fd)


def test_worker_that_cannot_be_launched_on_its_node() -> None:
    """Its node goes on without it."""

    class Launcher:
        def launch(self, process: Process) -> None:
            raise OSError(28, "No space left on device")

    relay = Relay.__new__(Relay)
    launcher: Any = Launcher()
    relay._workers, relay._launcher = {}, launcher
    relay._parts, relay._frames = [], []
    assert relay._obey(1, ["start", {"resources": {}, "single": True}], []) is None
    ((number, (kind, about), _),) = relay._parts
    assert (number, kind, relay._workers) == (1, "exit", {})
    assert "could not be started: OSError: [Errno 28] No space left" in about["text"]


def test_many_arguments(allocation: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A command line with more files than Linux takes as one argument reaches relays and steps, too."""
    monkeypatch.setattr(sys, "argv", [*sys.argv, *(f"data/{number:06}.xyz" for number in range(12_000))])
    executor = allocation()
    for needs in ({}, {"slurm_cmd_args": ["--quiet"]}):
        assert executor.submit(arguments, resource_dict=needs).result(SECONDS) == sys.argv


@pytest.mark.mpi
def test_many_arguments_of_ranks(allocation: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [*sys.argv, *(f"data/{number:06}.xyz" for number in range(12_000))])
    assert allocation().submit(arguments, resource_dict={"cores": 2}).result(SECONDS) == [sys.argv] * 2


def test_workers_of_a_block_are_as_many_as_there_are_gpus(
    allocation: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_GPUS", "0")
    needs = {"gpus_per_core": 1}
    assert allocation(block_allocation=True, resource_dict=needs).info["max_workers"] == 2
    with pytest.raises(ValueError, match="room for 2"):
        allocation(block_allocation=True, resource_dict=needs, max_workers=3)


def test_a_plain_call_is_on_one_node(allocation: Callable[..., Any]) -> None:
    """Over several it would have several ranks, and so several results."""
    with pytest.raises(ValueError, match="num_nodes=2 with cores=1"):
        allocation().submit(node, resource_dict={"num_nodes": 2})


def test_options_of_srun_without_ranks_of_srun(allocation: Callable[..., Any]) -> None:
    """mpiexec would ignore them."""
    with pytest.raises(ValueError, match="Give the executor a pmi_mode"):
        allocation().submit(node, resource_dict={"cores": 2, "slurm_cmd_args": ["--mem=1G"]})


@pytest.mark.parametrize("needs", [{}, {"slurm_cmd_args": ["--quiet"]}], ids=["relay", "step"])
def test_signals_that_the_session_does_not_get(allocation: Callable[..., Any], needs: dict[str, Any]) -> None:
    """Workers get them anyway, and their deaths are noticed."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        executor = allocation(resource_dict=needs)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    assert executor.submit(signal.pthread_sigmask, signal.SIG_BLOCK, ()).result(SECONDS) == set()
    assert isinstance(executor.submit(os._exit, 3).exception(SECONDS), ExecutorlibSocketError)


def test_shutdown_with_a_suspended_agent_on_a_node(allocation: Callable[..., Any], tmp_path: Path) -> None:
    executor = allocation(block_allocation=True, max_workers=1)
    agent, _ = executor.submit(agent_and_relay).result(SECONDS)
    future = executor.submit(begin, str(tmp_path), 0)
    while not (tmp_path / "0").exists():
        time.sleep(0.01)
    os.kill(agent, signal.SIGSTOP)
    (tmp_path / "end").touch()
    executor.shutdown()
    assert future.result()[1] == 0


def test_nodes_are_told_apart(allocation: Callable[..., Any]) -> None:
    executor = allocation()
    needs = {"threads_per_core": 2}
    assert {executor.submit(node, resource_dict=needs).result(SECONDS) for _ in range(2)} <= {"a", "b"}
    assert set(executor.info["nodes"]) == {"a", "b"}


def test_death_in_a_block_takes_one_call(allocation: Callable[..., Any], tmp_path: Path) -> None:
    """All other calls that the worker held run exactly once, wherever they were."""
    executor = allocation(block_allocation=True, max_workers=2, restart_limit=20)
    log = str(tmp_path / "log")
    # Short ones first, so that workers are handed many at once.
    assert len(list(executor.map(same, range(1000), timeout=SECONDS))) == 1000
    futures = [executor.submit(append_and_die if number % 100 == 50 else append, log, number) for number in range(1000)]
    failed = [number for number, future in enumerate(futures) if future.exception(SECONDS) is not None]
    assert failed == list(range(50, 1000, 100))
    assert isinstance(futures[50].exception(), ExecutorlibSocketError)
    with open(log) as file:
        assert sorted(map(int, file)) == list(range(1000))


def test_calls_behind_a_long_one_run_elsewhere_and_once(allocation: Callable[..., Any], tmp_path: Path) -> None:
    executor = allocation(block_allocation=True, max_workers=2)
    log = str(tmp_path / "log")
    assert len(list(executor.map(same, range(1000), timeout=SECONDS))) == 1000
    long = executor.submit(begin, str(tmp_path), 0)
    futures = [executor.submit(append, log, number) for number in range(1000)]
    assert [future.result(SECONDS) for future in futures] == list(range(1000))
    assert not long.done()
    (tmp_path / "end").touch()
    assert long.result(SECONDS)[1] == 0
    with open(log) as file:
        assert sorted(map(int, file)) == list(range(1000))


@pytest.mark.parametrize("data", [b"garbage" * 10, b"\xff" * 100], ids=["text", "bytes"])
def test_worker_that_writes_garbage(allocation: Callable[..., Any], data: bytes) -> None:
    """Only its own call fails, although the garbage is read only at the executor's end."""
    executor = allocation(block_allocation=True, max_workers=2, restart_limit=1)
    bad, good = executor.submit(write_to_sockets, data), executor.submit(abs, -1)
    assert good.result(SECONDS) == 1
    assert "file descriptor" in str(bad.exception(SECONDS))
    assert executor.submit(abs, -2).result(SECONDS) == 2


def test_result_that_cannot_be_received_on_the_node(allocation: Callable[..., Any]) -> None:
    """It is a large result whose memory file is damaged."""
    executor = allocation(block_allocation=True, max_workers=1)
    assert executor.submit(same, 1).result(SECONDS) == 1
    resource_limit = executor.submit(_limit_files_of_relay)
    assert resource_limit.result(SECONDS) is True
    large = executor.submit(bytes, 1 << 20)
    assert "too many open files" in str(large.exception(SECONDS))
    assert executor.submit(same, 2).result(SECONDS) == 2


@pytest.mark.parametrize("limit", [0, 1])
def test_call_of_a_lost_node_runs_again(allocation: Callable[..., Any], tmp_path: Path, limit: int) -> None:
    """It does if `restart_limit` allows it. The death of a process is not the loss of a node."""
    executor = allocation(restart_limit=limit)
    dying = executor.submit(append_and_die, str(tmp_path / "log"), 1)
    assert isinstance(dying.exception(SECONDS), ExecutorlibSocketError)
    futures = [executor.submit(begin, str(tmp_path), number) for number in range(4)]
    paths = [tmp_path / str(number) for number in range(4)]
    give_up = time.monotonic() + SECONDS
    while not all(path.exists() for path in paths):
        assert time.monotonic() < give_up
        time.sleep(0.01)
    pids, places = zip(*(path.read_text().split() for path in paths), strict=True)
    os.kill(int(pids[0]), signal.SIGKILL)
    there = [number for number in range(4) if places[number] == places[0]]
    if limit:
        for number in there:  # they run again when there is room
            assert not futures[number].done()
    else:
        assert all(f"node {places[0]} was lost" in str(futures[number].exception(SECONDS)) for number in there)
    (tmp_path / "end").touch()
    left = ({"a", "b"} - {places[0]}).pop()
    for number in range(4):
        if limit or number not in there:
            assert futures[number].result(SECONDS) == (left, number)
    assert (tmp_path / "log").read_text() == "1\n"


def _limit_files_of_relay() -> bool:
    """The relay can open no more files from now on."""
    import resource

    pid = relay()
    used = {int(fd) for fd in os.listdir(f"/proc/{pid}/fd")}
    lowest = next(fd for fd in range(len(used) + 1) if fd not in used)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (lowest, lowest))
    return True
