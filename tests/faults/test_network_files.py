"""Two machines that share a cache directory by a network file system, each of which sees the other's files late.

The machines are `client.py`: mounts that remember for a minute which files there are, which are not, and how large
they are. All scripts first look at what they are going to ask for, so that their machine remembers its absence.
"""

from __future__ import annotations

import contextlib
import ctypes.util
import importlib.util
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import LINUX
from contract.functions import lines

MISSING = (
    "Linux"
    if not LINUX
    else "root"
    if os.geteuid() != 0
    else "/dev/fuse"
    if not os.access("/dev/fuse", os.W_OK)
    else "mfusepy (pip install mfusepy)"
    if importlib.util.find_spec("mfusepy") is None
    else "libfuse (on Debian: apt install fuse3)"
    if not any(map(ctypes.util.find_library, ("fuse3", "fuse")))
    else ""
)
WAIT = 50
pytestmark = [
    pytest.mark.cache,
    pytest.mark.linux,
    pytest.mark.skipif(bool(MISSING), reason=f"two mounts of FUSE, as of two machines, need {MISSING}"),
]

PRELUDE = """
import os, sys
from executorlib import get_cache_data, get_future_from_cache
from executorlib.api import TestClusterExecutor
from contract.functions import record, add

store, log = sys.argv[1:]
for name in (".executorlib", *(f"{key}_{kind}.h5" for key in [*map(str, range(20)), "call"] for kind in "io")):
    assert not os.path.exists(os.path.join(store, name))

def say(*words):
    print(*words, flush=True)

def wait():
    assert sys.stdin.readline()

def slow(log, value, gate):
    import time
    while not os.path.exists(gate):
        time.sleep(0.01)
    return record(log, value)

def key(name):
    return {"cache_key": str(name)}

say("ready")
wait()
"""


class Machine:
    """A script on a machine of its own.

    Args:
        process: It.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        assert self.hears() == "ready"

    def hears(self) -> str:
        """The next line that the script says."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().rstrip("\n")

    def go(self) -> None:
        """Let the script go on from where it waits."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def end(self) -> None:
        """Wait for the end of the script."""
        output, _ = self._process.communicate(timeout=WAIT)
        assert (self._process.returncode, output) == (0, "")


@pytest.fixture
def log(tmp_path: Path) -> str:
    return str(tmp_path / "log")


@pytest.fixture
def machine(tmp_path: Path, log: str) -> Iterator[Callable[[str], Machine]]:
    """Start a script on another machine."""
    source, mountpoint = tmp_path / "server", tmp_path / "mount"
    source.mkdir()
    mountpoint.mkdir()
    processes: list[subprocess.Popen[str]] = []

    def start(script: str) -> Machine:
        program = tmp_path / f"program{len(processes)}.py"
        program.write_text(PRELUDE + textwrap.dedent(script))
        client = str(Path(__file__).with_name("client.py"))
        name = f"machine{len(processes)}"
        machine = [sys.executable, client, name, str(source), str(mountpoint)]
        process = subprocess.Popen(
            [*machine, sys.executable, str(program), str(mountpoint), log],
            start_new_session=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        )
        processes.append(process)
        return Machine(process)

    yield start
    for process in processes:
        with process, contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_two_machines_submit_the_same_calls(machine: Callable[[str], Machine], log: str) -> None:
    """At the same moment, in another order: each runs once, and both get all results."""
    script = """
        order = list(range(20))
        if ORDER:
            order.reverse()
        with TestClusterExecutor(cache_directory=store) as executor:
            futures = {number: executor.submit(record, log, number, resource_dict=key(number)) for number in order}
            assert {number: future.result(40) for number, future in futures.items()} == {n: n for n in range(20)}
        say("done")
        wait()
        assert sorted(row["output"] for row in get_cache_data(store)) == list(range(20)), os.listdir(store)
    """
    machines = [machine(script.replace("ORDER", str(order))) for order in range(2)]
    for each in machines:
        each.go()
    for each in machines:
        assert each.hears() == "done"
    for each in machines:
        each.go()
        each.end()
    assert sorted(map(int, lines(log))) == list(range(20))


def test_a_call_that_another_machine_runs(machine: Callable[[str], Machine], log: str, tmp_path: Path) -> None:
    """It is followed, not taken for dead, and its result is seen."""
    gate = tmp_path / "gate"
    submit = f"""
        with TestClusterExecutor(cache_directory=store) as executor:
            future = executor.submit(slow, log, 1, {str(gate)!r}, resource_dict=key("call"))
            while not future.running() and WAITS:
                pass
            say("submitted")
            wait()
            assert future.result(40) == 1
    """
    first, second = machine(submit.replace("WAITS", "True")), machine(submit.replace("WAITS", "False"))
    third = machine(
        """
        future = get_future_from_cache(store, "call")
        say("waits")
        assert future.result(40) == 1
        """
    )
    for each, said in ((first, "submitted"), (second, "submitted"), (third, "waits")):
        each.go()
        assert each.hears() == said
    gate.touch()
    for each in (first, second):
        each.go()
    for each in (first, second, third):
        each.end()
    assert lines(log) == ["1"]


def test_a_result_that_came_after_this_machine_looked(machine: Callable[[str], Machine], log: str) -> None:
    """The file system says that it is not there; the call does not run again."""
    script = """
        with TestClusterExecutor(cache_directory=store) as executor:
            assert executor.submit(record, log, 1, resource_dict=key("call")).result(40) == 1
    """
    first, second = machine(script), machine(script)
    for each in (first, second):
        each.go()
        each.end()
    assert lines(log) == ["1"]


def test_inputs_of_another_machine(machine: Callable[[str], Machine], log: str) -> None:
    """A workflow continues elsewhere with these results."""
    first = machine(
        """
        with TestClusterExecutor(cache_directory=store) as executor:
            executor.submit(record, log, 1, resource_dict=key(0)).result(40)
        """
    )
    second = machine(
        """
        with TestClusterExecutor(cache_directory=store) as executor:
            one = executor.submit(record, log, 1, resource_dict=key(0))
            two = executor.submit(record, log, 2, resource_dict=key(1))
            assert executor.submit(add, one, two, resource_dict=key(2)).result(40) == 3
        """
    )
    for each in (first, second):
        each.go()
        each.end()
    assert lines(log) == ["1", "2"]


def test_a_machine_that_dies(machine: Callable[[str], Machine], log: str, tmp_path: Path) -> None:
    """Its session is gone, its job is not: the call is neither lost nor run twice."""
    gate = tmp_path / "gate"
    first = machine(
        f"""
        executor = TestClusterExecutor(cache_directory=store)
        future = executor.submit(slow, log, 1, {str(gate)!r}, resource_dict=key("call"))
        while not future.running():
            pass
        say("runs")
        wait()
        os.kill(os.getpid(), 9)
        """
    )
    second = machine(
        f"""
        with TestClusterExecutor(cache_directory=store) as executor:
            future = executor.submit(slow, log, 1, {str(gate)!r}, resource_dict=key("call"))
            say("submitted")
            assert future.result(40) == 1
        """
    )
    first.go()
    assert first.hears() == "runs"
    second.go()
    assert second.hears() == "submitted"
    first.go()
    gate.touch()
    second.end()
    assert lines(log) == ["1"]
