"""Whatever dies, every future resolves in bounded time and no process outlives its executor."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any

import pytest

from conftest import children
from contract.functions import (
    Gate,
    add,
    alive,
    identity,
    put,
    rank_sum,
    record,
    until,
    wait_for,
    wait_until_gone,
)
from executorlib.core import loop
from executorlib.worker.family import descendants
from faults.functions import die, die_or_add

WAIT = 30
pytestmark = pytest.mark.rows(single_node=True)
block = pytest.mark.rows(block=True)


# Workers.


def test_text_of_the_error(make_executor: Callable[..., Any]) -> None:
    """It names the process, its end, the host and the last lines of its output, but not endless output."""

    def talk_and_die() -> None:
        for i in range(2000):
            os.write(2, f"line {i} of stderr\n".encode())
        os.write(2, b"\xff no utf-8, no line end")
        die(signal.SIGTERM)

    with make_executor() as executor:
        error = executor.submit(talk_and_die).exception(WAIT)
        assert isinstance(error, BrokenExecutor)
        text = str(error)
        assert "SIGTERM" in text
        assert socket.gethostname() in text
        assert "line 1999 of stderr" in text
        assert "no utf-8" in text
        assert len(text) < 20_000
        assert "talk_and_die" in text


@pytest.mark.parametrize(("method", "advice"), [("kill_workers", False), ("terminate_workers", False), (None, True)])
def test_advice_of_the_error(
    make_executor: Callable[..., Any], gate: Callable[..., Gate], method: str | None, advice: bool
) -> None:
    """If the executor was ended, it does not advise submitting the call again."""
    held = gate()
    executor = make_executor()
    future = executor.submit(held)
    if method is None:
        os.kill(held.pid(), signal.SIGKILL)
    else:
        held.pid()
        getattr(executor, method)()
    text = str(future.exception(WAIT))
    assert ("again" in text) == advice
    assert method is None or f"{method}()" in text
    executor.shutdown()


def test_error_names_the_process(make_executor: Callable[..., Any], tmp_path: Path) -> None:
    def die_known() -> None:
        put(tmp_path / "pid", str(os.getpid()))
        os._exit(3)

    with make_executor() as executor:
        error = executor.submit(die_known).exception(WAIT)
        assert str(int(wait_for(tmp_path / "pid"))) in str(error)
        assert "code 3" in str(error)


def test_exit_with_success_is_a_death_too(make_executor: Callable[..., Any]) -> None:
    with make_executor() as executor:
        error = executor.submit(os._exit, 0).exception(WAIT)
        assert isinstance(error, BrokenExecutor)
        assert "code 0" in str(error)


def test_worker_that_is_stopped_can_still_be_ended(
    make_executor: Callable[..., Any], gate: Callable[..., Gate]
) -> None:
    held = gate()
    executor = make_executor()
    future = executor.submit(held)
    pid = held.pid()
    os.kill(pid, signal.SIGSTOP)
    executor.kill_workers()
    assert isinstance(future.exception(WAIT), BrokenExecutor)
    executor.shutdown()
    wait_until_gone(pid)


def test_worker_that_closes_its_files(make_executor: Callable[..., Any], row: Any) -> None:
    """A call that closes every descriptor has cut its own line; the call fails, nothing hangs."""
    options = {"restart_limit": 1} if row.block else {}
    with make_executor(max_workers=1, **options) as executor:
        future = executor.submit(os.closerange, 3, 256)
        assert future.exception(WAIT) is not None or future.result() is None
        assert executor.submit(add, 1, 2).result(WAIT) == 3


def test_call_that_forks(make_executor: Callable[..., Any], row: Any, tmp_path: Path) -> None:
    """A child that the call leaves behind has copies of its descriptors, but cannot answer for it."""
    log = str(tmp_path / "log")

    def fork_and_return() -> int:
        child = os.fork()
        if child:
            return child
        record(log, os.getpid())
        time.sleep(20)
        os._exit(0)

    with make_executor() as executor:
        child = executor.submit(fork_and_return).result(WAIT)
        assert executor.submit(add, 1, 2).result(WAIT) == 3
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)


def test_call_that_returns_twice(make_executor: Callable[..., Any]) -> None:
    """A forked copy of the call that returns must not be taken for a second result."""

    def both_return() -> str:
        return "parent" if os.fork() else "child"

    with make_executor(max_workers=1) as executor:
        assert executor.submit(both_return).result(WAIT) in ("parent", "child")
        results = [executor.submit(add, i, 1).result(WAIT) for i in range(5)]
        assert results == [i + 1 for i in range(5)]


# Restarting workers.


@block
def test_restart_limit_exhausted(make_executor: Callable[..., Any]) -> None:
    """The last worker is gone: what remains fails, new calls are refused, nothing hangs."""
    with make_executor(max_workers=1, restart_limit=2) as executor:
        for i in range(3):
            assert isinstance(executor.submit(die).exception(WAIT), BrokenExecutor), i
            if i < 2:
                assert executor.submit(add, 1, 2).result(WAIT) == 3
        with pytest.raises(BrokenExecutor, match="restart_limit"):
            executor.submit(add, 1, 2).result(WAIT)


@block
def test_calls_that_wait_when_the_last_worker_dies(
    make_executor: Callable[..., Any], gate: Callable[..., Gate]
) -> None:
    held = gate()
    with make_executor(max_workers=1) as executor:
        first = executor.submit(held)
        futures = [executor.submit(add, i, 1) for i in range(50)]
        dependent = executor.submit(add, futures[-1], 1)
        os.kill(held.pid(), signal.SIGKILL)
        for future in [first, *futures, dependent]:
            assert isinstance(future.exception(WAIT), BrokenExecutor)


@block
def test_the_pool_works_on_as_long_as_one_worker_lives(
    make_executor: Callable[..., Any], gate: Callable[..., Gate]
) -> None:
    first, second = gate("first"), gate("second")
    with make_executor(max_workers=2) as executor:
        kept, lost = executor.submit(first, "kept"), executor.submit(second)
        first.pid()
        os.kill(second.pid(), signal.SIGKILL)
        assert isinstance(lost.exception(WAIT), BrokenExecutor)
        first.open()
        assert kept.result(WAIT) == "kept"
        assert [executor.submit(add, i, 1).result(WAIT) for i in range(5)] == [1, 2, 3, 4, 5]


@block
def test_an_idle_worker_dies(make_executor: Callable[..., Any], gate: Callable[..., Gate]) -> None:
    """It is replaced, and no call is lost."""
    held = gate()
    with make_executor(max_workers=1, restart_limit=1) as executor:
        first = executor.submit(held, 1)
        pid = held.pid()
        held.open()
        assert first.result(WAIT) == 1
        os.kill(pid, signal.SIGKILL)
        wait_until_gone(pid)
        # Its death may be noticed only with this call, which then is lost with it.
        future = executor.submit(add, 1, 2)
        assert isinstance(future.exception(WAIT), (BrokenExecutor, type(None)))
        assert executor.submit(add, 1, 2).result(WAIT) == 3


@block
def test_init_function_that_kills_the_worker(make_executor: Callable[..., Any]) -> None:
    with make_executor(init_function=die, restart_limit=2) as executor:
        futures = [executor.submit(add, i, 1) for i in range(5)]
        for future in futures:
            assert isinstance(future.exception(WAIT), BrokenExecutor)


# The number of calls, and of calls for each death: 10,000 with a death every 100 if calls are quick.
ATTRITION = {
    "fork": (500, 50),
    "spawn": (40, 10),
    "block-fork": (10_000, 100),
    "block-spawn": (1_000, 100),
}


def check_attrition(executor: Any, count: int, every: int) -> None:
    """Exactly the calls that killed their worker are lost."""
    futures = [executor.submit(die_or_add, i, every) for i in range(count)]
    for i, future in enumerate(futures):
        if i % every == every - 1:
            assert isinstance(future.exception(WAIT), BrokenExecutor), i
        else:
            assert future.result(WAIT) == i + 1


@pytest.mark.timeout(180)  # some ten seconds of work; a loaded machine may take long
def test_attrition(make_executor: Callable[..., Any], row: Any) -> None:
    count, every = ATTRITION[row.name]
    options = {"restart_limit": count} if row.block else {}
    with make_executor(**options) as executor:
        check_attrition(executor, count, every)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.rows("fork")
def test_long_attrition(make_executor: Callable[..., Any]) -> None:
    with make_executor() as executor:
        check_attrition(executor, 10_000, 100)


# The agent.


@pytest.mark.linux
@pytest.mark.rows("fork", "block-fork")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_agent_dies(make_executor: Callable[..., Any], row: Any, gate: Callable[..., Gate], number: int) -> None:
    """Its workers end with it, and the errors of their calls say so. A new agent goes on."""
    held = gate()
    before = children()
    options = {"restart_limit": 1} if row.block else {}
    with make_executor(**options) as executor:
        running = [executor.submit(held, i) for i in range(2)]
        workers = held.pids(2)
        waiting = [executor.submit(add, i, 1) for i in range(10)]
        (agent,) = children() - before - set(workers)
        os.kill(agent, number)
        for future in running:
            assert isinstance(future.exception(WAIT), BrokenExecutor)
        for future in waiting:
            assert isinstance(future.exception(WAIT), (BrokenExecutor, type(None)))
        wait_until_gone(agent, *workers)
        assert executor.submit(add, 1, 2).result(WAIT) == 3


@pytest.mark.linux
@pytest.mark.rows("fork")
def test_agent_dies_while_idle(make_executor: Callable[..., Any]) -> None:
    before = children()
    with make_executor() as executor:
        assert executor.submit(add, 1, 2).result(WAIT) == 3
        (agent,) = children() - before
        os.kill(agent, signal.SIGKILL)
        wait_until_gone(agent)
        # Its death may be noticed only with this call.
        first = executor.submit(add, 1, 2).exception(WAIT)
        assert isinstance(first, (BrokenExecutor, type(None)))
        assert executor.submit(identity, 5).result(WAIT) == 5


@pytest.mark.linux
@pytest.mark.rows("fork", "block-fork")
def test_agent_is_stopped_for_a_while(make_executor: Callable[..., Any]) -> None:
    before = children()
    with make_executor() as executor:
        assert executor.submit(add, 1, 2).result(WAIT) == 3
        for pid in children() - before:
            os.kill(pid, signal.SIGSTOP)
        futures = [executor.submit(add, i, 1) for i in range(5)]
        for pid in children() - before:
            os.kill(pid, signal.SIGCONT)
        assert [future.result(WAIT) for future in futures] == [1, 2, 3, 4, 5]


def suspend(*pids: int) -> None:
    """Suspend processes, and wait until they are."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
        until(lambda pid=pid: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")


# A rank's MPI library: it makes the memory that its world shares, then waits for the others.
_STARTING_MPI = """
import mmap, os, time
from pathlib import Path
fd = os.open({memory!r}, os.O_CREAT | os.O_RDWR, 0o600)
os.ftruncate(fd, 4096)
shared = mmap.mmap(fd, 4096)
os.close(fd)
Path({folder!r}, f"rank.{{os.getpid()}}").touch()
time.sleep(600)
"""


@pytest.mark.linux
@pytest.mark.rows("fork")
@pytest.mark.parametrize(
    ("victim", "is_parent_suspended"),
    [(0, False), (1, False), (-2, False), (-1, False), (-1, True)],
    ids=["rank", "its parent", "mpiexec", "agent", "agent, and its parent is suspended"],
)
def test_world_dies_while_it_starts(
    make_executor: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    victim: int,
    is_parent_suspended: bool,
) -> None:
    """Whichever of its ancestors is killed, neither its ranks nor their shared memory is left."""
    memory = Path(f"/dev/shm/mpich_shm_{secrets.token_hex(4)}_0")
    package = tmp_path / "mpi4py"
    package.mkdir()
    put(package / "__init__.py")
    put(package / "MPI.py", _STARTING_MPI.format(memory=str(memory), folder=str(tmp_path)))
    monkeypatch.syspath_prepend(str(tmp_path))
    with (
        contextlib.ExitStack() as at_end,
        make_executor(max_cores=2, resource_dict={"cores": 2, "openmpi_oversubscribe": True}) as executor,
    ):
        at_end.callback(memory.unlink, missing_ok=True)
        future = executor.submit(add, 1, 2)
        until(lambda: len(list(tmp_path.glob("rank.*"))) == 2, WAIT)
        ranks = [int(path.suffix[1:]) for path in tmp_path.glob("rank.*")]
        line = [ranks[0]]
        while (parent := int(Path(f"/proc/{line[-1]}/stat").read_text().rpartition(")")[2].split()[1])) != os.getpid():
            line.append(parent)
        assert memory.exists()
        if is_parent_suspended:
            suspend(line[1])
        os.kill(line[victim], signal.SIGKILL)
        assert isinstance(future.exception(WAIT), BrokenExecutor)
        until(lambda: not memory.exists(), WAIT)
        wait_until_gone(*ranks, *(pid for pid in line if pid != line[-1] or victim == -1))


def command(pid: int) -> bytes:
    """Return the command line of a process, if it still exists."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.linux
@pytest.mark.mpi
@pytest.mark.rows("fork")
def test_agent_dies_after_its_worlds(make_executor: Callable[..., Any]) -> None:
    """The files of ranks that outlive both are removed at the end, long after the world's end was reported."""
    memory = Path(f"/dev/shm/mpich_shm_{secrets.token_hex(4)}_0")
    before = children()
    with contextlib.ExitStack() as at_end:
        at_end.callback(memory.unlink, missing_ok=True)
        with make_executor(max_cores=2, resource_dict={"cores": 2, "openmpi_oversubscribe": True}) as executor:
            assert executor.submit(rank_sum, 1.0).result(WAIT) == [3.0, 3.0]
            (agent,) = children() - before
            until(lambda: not any(b"mpiexec" in command(pid) for pid in descendants(agent)))
            # The agent has told of the world's end before.
            assert executor.submit(add, 1, 2, resource_dict={"cores": 1}).result(WAIT) == 3
            memory.write_bytes(bytes(4096))
            os.kill(agent, signal.SIGKILL)
            wait_until_gone(agent)
        assert not memory.exists()


@pytest.mark.linux
@pytest.mark.parametrize("method", ["kill_workers", "terminate_workers"])
@pytest.mark.rows("fork", "block-fork")
def test_workers_of_a_suspended_agent_are_ended(
    make_executor: Callable[..., Any], gate: Callable[..., Gate], method: str
) -> None:
    held = gate()
    before = children()
    executor = make_executor(max_workers=1)
    future = executor.submit(held)
    pid = held.pid()
    suspend(*(children() - before - {pid}))
    getattr(executor, method)()
    assert isinstance(future.exception(WAIT), BrokenExecutor)
    executor.shutdown()
    wait_until_gone(pid)


@pytest.mark.linux
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.rows("fork", "spawn", "block-fork")
def test_shutdown_with_a_suspended_agent(
    make_executor: Callable[..., Any], gate: Callable[..., Gate], when: str
) -> None:
    """Pending calls finish and it returns, whether the agent was suspended before or while it waits."""
    held = gate()
    before = children()
    executor = make_executor(max_workers=1)
    future = executor.submit(held, "finished")
    agents = children() - before - {held.pid()}
    if when == "before":
        suspend(*agents)
    else:
        executor.shutdown(wait=False)
        for pid in agents:  # and continued soon
            os.kill(pid, signal.SIGSTOP)
    held.open()
    executor.shutdown()
    assert future.result(WAIT) == "finished"
    assert not children() - before


@pytest.mark.linux
@block
def test_shutdown_with_a_suspended_idle_worker(make_executor: Callable[..., Any]) -> None:
    executor = make_executor(max_workers=1)
    suspend(executor.submit(os.getpid).result(WAIT))
    executor.shutdown()


@pytest.mark.rows("fork", "spawn", "block-fork")
def test_leftovers_of_a_call_have_its_time_limit(
    make_executor: Callable[..., Any],
    row: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An exit handler that never returns must not block the call's core or `shutdown` forever."""

    def leave() -> int:
        import atexit

        atexit.register(time.sleep, 600)
        return os.getpid()

    monkeypatch.setattr(loop, "_GRACE_SECONDS", 0.05)
    with make_executor(max_workers=1, resource_dict={"run_time_max": 2}) as executor:
        pid = executor.submit(leave).result(WAIT)
        assert executor.submit(add, 1, 2).result(WAIT) == 3
    wait_until_gone(pid)
    assert f"process {pid}" in caplog.text
    assert "run_time_max of 2 s" in caplog.text


# The user's process.

WORK = """
    import time
    from pathlib import Path

    def work(i):
        Path(f"pid-{i}.draft").write_text(f"{os.getpid()} {os.getppid()}")
        os.replace(f"pid-{i}.draft", f"pid-{i}")
        time.sleep(60)

    def start(executor):
        futures = [executor.submit(work, i) for i in range(2)]
        for i in range(2):
            while not Path(f"pid-{i}").exists():
                time.sleep(0.002)
        print("running", flush=True)
        return futures
"""
RUNNING = (
    WORK
    + """
    executor = Executor(**OPTIONS)
    futures = start(executor)
"""
)


def processes_of(folder: Path, own: int) -> set[int]:
    """Workers and their parents, as far as they are not the script itself."""
    pids = {int(pid) for path in folder.glob("pid-?") for pid in wait_for(path).split()}
    return pids - {own, 1}


def test_users_process_is_killed(row: Any, scripts: Any, tmp_path: Path) -> None:
    """Every worker is gone within 5 s, with whatever started it."""
    process = scripts.start(RUNNING + "    time.sleep(60)\n", row.arguments())
    assert process.stdout.readline() == "running\n"
    pids = processes_of(tmp_path, process.pid)
    assert len(pids) >= 2
    process.kill()
    wait_until_gone(*pids, seconds=5)


@pytest.mark.linux
def test_users_process_is_killed_with_a_suspended_agent(row: Any, scripts: Any, tmp_path: Path) -> None:
    process = scripts.start(RUNNING + "    time.sleep(60)\n", row.arguments())
    assert process.stdout.readline() == "running\n"
    pids = processes_of(tmp_path, process.pid)
    suspend(*{int(wait_for(tmp_path / f"pid-{i}").split()[1]) for i in range(2)})
    process.kill()
    wait_until_gone(*pids, seconds=5)


@pytest.mark.rows("fork", "block-fork")
def test_users_process_is_killed_with_busy_workers(row: Any, scripts: Any, tmp_path: Path) -> None:
    """Also workers that never look up: ones that compute, ones that ignore signals."""
    process = scripts.start(
        """
        import signal, time
        from pathlib import Path

        def busy():
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            Path("pid-0.draft").write_text(f"{os.getpid()} {os.getppid()}")
            os.replace("pid-0.draft", "pid-0")
            while True:
                pass

        executor = Executor(**OPTIONS)
        executor.submit(busy)
        time.sleep(60)
        """,
        row.arguments(),
    )
    wait_for(tmp_path / "pid-0")
    pids = processes_of(tmp_path, process.pid)
    process.kill()
    wait_until_gone(*pids, seconds=5)


@pytest.mark.mpi
@pytest.mark.rows("fork")
def test_users_process_is_killed_with_ranks(row: Any, scripts: Any, tmp_path: Path, for_all: Path) -> None:
    """Neither ranks nor files are left."""
    folder = for_all  # whose path is short enough for a socket's, unlike that of others
    process = scripts.start(
        """
        import time
        from pathlib import Path

        def work():
            from mpi4py import MPI
            rank = MPI.COMM_WORLD.Get_rank()
            Path(f"pid-{rank}.draft").write_text(f"{os.getpid()} {os.getppid()}")
            os.replace(f"pid-{rank}.draft", f"pid-{rank}")
            time.sleep(60)

        executor = Executor(max_cores=2)
        executor.submit(work, resource_dict={"cores": 2})
        time.sleep(60)
        """,
        env={"TMPDIR": str(folder)},
    )
    for i in range(2):
        wait_for(tmp_path / f"pid-{i}")
    pids = processes_of(tmp_path, process.pid)
    assert any(folder.iterdir())
    process.kill()
    wait_until_gone(*pids, seconds=5)
    until(lambda: not any(folder.iterdir()), WAIT)  # the agent's last deed


def test_users_process_is_terminated(row: Any, scripts: Any, tmp_path: Path) -> None:
    process = scripts.start(RUNNING + "    time.sleep(60)\n", row.arguments())
    assert process.stdout.readline() == "running\n"
    pids = processes_of(tmp_path, process.pid)
    process.terminate()
    assert process.wait(10) == -signal.SIGTERM
    wait_until_gone(*pids, seconds=5)


# Ctrl-C.

INTERRUPTED = (
    WORK
    + """
    try:
        with Executor(**OPTIONS) as executor:
            start(executor)[0].result()
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        raise
"""
)


def test_interrupt_from_the_keyboard(row: Any, scripts: Any, tmp_path: Path) -> None:
    """A terminal signals the whole group: calls end, the program ends, nobody is left."""
    process = scripts.start(INTERRUPTED, row.arguments(), start_new_session=True)
    assert process.stdout.readline() == "running\n"
    pids = processes_of(tmp_path, process.pid)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert "interrupted" in out
    assert process.returncode != 0
    assert err.rstrip().endswith("KeyboardInterrupt")
    wait_until_gone(*pids, seconds=5)


def test_interrupt_of_the_main_thread_only(row: Any, scripts: Any, tmp_path: Path) -> None:
    """As a debugger or notebook does it: calls go on, the executor stays usable."""
    process = scripts.start(
        """
        import time
        from pathlib import Path

        def work():
            Path("running").touch()
            while not Path("go").exists():
                time.sleep(0.002)
            return "done"

        with Executor(**OPTIONS) as executor:
            future = executor.submit(work)
            while not Path("running").exists():
                time.sleep(0.002)
            try:
                print("running", flush=True)
                future.result()
            except KeyboardInterrupt:
                Path("go").touch()
                print(future.result(20), executor.submit(abs, -1).result(20))
        """,
        row.arguments(),
    )
    assert process.stdout.readline() == "running\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=WAIT)
    assert (out, err, process.returncode) == ("done 1\n", "", 0)


def test_interrupt_during_shutdown(row: Any, scripts: Any, tmp_path: Path) -> None:
    """Waiting for calls can be given up; a second interrupt is not needed to end them."""
    source = (
        RUNNING
        + """
    try:
        executor.shutdown()
    except KeyboardInterrupt:
        print("given up", flush=True)
        executor.kill_workers()
"""
    )
    process = scripts.start(source, row.arguments())
    assert process.stdout.readline() == "running\n"
    pids = processes_of(tmp_path, process.pid)
    # The signal may come before shutdown waits; then it is the plain end of the program.
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    wait_until_gone(*pids, seconds=5)


# Fork in the user's process.


def in_a_forked_child(work: Callable[[], str], path: Path) -> str:
    """Run this in a fork of the test's process and return what it says."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(20)
            put(path, work())
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert status == 0, f"the child ended with status {status}"
    return path.read_text()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fork_in_the_users_process(
    make_executor: Callable[..., Any], gate: Callable[..., Gate], tmp_path: Path
) -> None:
    """The child's copy of the executor is of no use and says so; the parent's works on."""
    held = gate()
    with make_executor() as executor:
        running = executor.submit(held, 1)
        held.pid()

        def use() -> str:
            try:
                return str(executor.submit(add, 1, 2).result(10))
            except RuntimeError as error:
                return f"RuntimeError: {error}"

        assert in_a_forked_child(use, tmp_path / "use").startswith(("3", "RuntimeError"))

        def shut_down() -> str:
            executor.shutdown(wait=True)
            return "shut down"

        assert in_a_forked_child(shut_down, tmp_path / "shut") == "shut down"
        assert executor.submit(add, 1, 2).result(WAIT) == 3
        assert not running.done()
        held.open()
        assert running.result(WAIT) == 1


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_child_makes_an_executor_of_its_own(make_executor: Callable[..., Any], tmp_path: Path) -> None:
    with make_executor() as executor:
        assert executor.submit(add, 1, 2).result(WAIT) == 3

        def use() -> str:
            with make_executor() as own:
                return str(own.submit(add, 3, 4).result(15))

        assert in_a_forked_child(use, tmp_path / "use") == "7"
        assert executor.submit(add, 1, 2).result(WAIT) == 3


def test_forked_child_ends_normally(row: Any, scripts: Any) -> None:
    """Interpreter exit in a forked child neither hangs nor touches the parent's workers."""
    out = scripts.run(
        """
        import time, warnings
        warnings.simplefilter("ignore", DeprecationWarning)

        executor = Executor(**OPTIONS)
        print(executor.submit(abs, -1).result(), flush=True)
        future = executor.submit(time.sleep, 0.3)
        if os.fork() == 0:
            sys.exit(0)
        print(os.WEXITSTATUS(os.wait()[1]), future.result(), executor.submit(abs, -2).result())
        """,
        row.arguments(),
    )
    assert out == "1\n0 None 2\n"


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_that_lives_on_does_not_hold_up_the_end(
    make_executor: Callable[..., Any], gate: Callable[..., Gate]
) -> None:
    """It has copies of all descriptors, so an end of file would never be seen."""
    held = gate()
    executor = make_executor()
    running = executor.submit(held, 1)
    worker = held.pid()
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    try:
        held.open()
        assert running.result(WAIT) == 1
        assert isinstance(executor.submit(die).exception(WAIT), BrokenExecutor)
        executor.shutdown()
        wait_until_gone(worker)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_programs_that_the_user_starts_hold_nothing_up(make_executor: Callable[..., Any], row: Any) -> None:
    executor = make_executor()
    assert executor.submit(add, 1, 2).result(WAIT) == 3
    program = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        executor.shutdown()
        assert alive(program.pid)
    finally:
        program.kill()
        program.wait()
