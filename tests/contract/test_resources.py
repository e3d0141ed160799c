"""Calls get the resources that they ask for: threads, directories, cores, devices, time."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from contract.functions import Gate, add, affinity, environment, identity, put, wait_for, wait_until_gone
from executorlib.api import ExecutorlibSocketError

WAIT = 30
THREADS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
DEVICES = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")


def folder(_number: int) -> str:
    return os.getcwd()


@pytest.mark.essential
def test_thread_variables(make_executor: Callable[..., Any]) -> None:
    with make_executor(max_cores=4, resource_dict={"threads_per_core": 2}) as executor:
        assert executor.submit(environment, *THREADS).result(WAIT) == ["2"] * 5


def test_one_thread_by_default(executor: Any) -> None:
    assert executor.submit(environment, *THREADS).result(WAIT) == ["1"] * 5


@pytest.mark.essential
@pytest.mark.rows(block=False)
def test_thread_variables_of_one_call(make_executor: Callable[..., Any]) -> None:
    """The call's resources override the executor's, key by key."""
    with make_executor(max_cores=4, resource_dict={"threads_per_core": 2}) as executor:
        futures = [
            executor.submit(environment, *THREADS[:count], resource_dict={"threads_per_core": count})
            for count in (1, 3, 4)
        ]
        futures.append(executor.submit(environment, *THREADS, resource_dict={"priority": 3}))
        assert [set(future.result(WAIT)) for future in futures] == [{"1"}, {"3"}, {"4"}, {"2"}]


def test_threads_are_set_before_libraries_are_loaded(
    make_executor: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "threaded_library.py").write_text("import os\nat_import = os.environ.get('OMP_NUM_THREADS')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "7")

    def seen() -> str:
        import threaded_library  # type: ignore[import-not-found]

        return threaded_library.at_import  # type: ignore[no-any-return]

    with make_executor(max_cores=4, resource_dict={"threads_per_core": 2}) as executor:
        assert executor.submit(seen).result(WAIT) == "2"


def test_directory_is_made(make_executor: Callable[..., Any], tmp_path: Path) -> None:
    wanted = tmp_path / "not" / "yet" / "there"
    with make_executor(resource_dict={"cwd": str(wanted)}) as executor:
        assert executor.submit(os.getcwd).result(WAIT) == str(wanted.resolve())


@pytest.mark.essential
@pytest.mark.rows(block=False)
def test_directory_of_one_call(executor: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = {"cwd": str(tmp_path / "new")}
    assert executor.submit(folder, 1, resource_dict=given).result(WAIT) == given["cwd"]
    assert executor.submit(folder, 2).result(WAIT) == os.getcwd()
    # A relative one starts from the user's own, and a second call finds it there.
    monkeypatch.chdir(tmp_path)
    for number in (3, 4):
        future = executor.submit(folder, number, resource_dict={"cwd": "relative"})
        assert future.result(WAIT) == str(tmp_path / "relative")


@pytest.mark.rows(block=False)
def test_files_are_written_in_the_directory(executor: Any, tmp_path: Path) -> None:
    def write() -> None:
        Path("result.txt").write_text("here")

    executor.submit(write, resource_dict={"cwd": str(tmp_path / "out")}).result(WAIT)
    assert (tmp_path / "out" / "result.txt").read_text() == "here"


def test_the_dictionaries_given_are_not_changed(make_executor: Callable[..., Any], row: Any, tmp_path: Path) -> None:
    general = {"cwd": str(tmp_path), "threads_per_core": 1}
    own: dict[str, Any] = {} if row.block else {"priority": 1, "run_time_max": 20}
    before = dict(general), dict(own)
    with make_executor(resource_dict=general) as executor:
        executor.submit(add, 1, 2, resource_dict=own).result(WAIT)
        executor.submit(add, 1, 2, resource_dict=own).result(WAIT)
    assert (general, own) == before


def test_the_dictionary_given_may_change_afterwards(make_executor: Callable[..., Any], tmp_path: Path) -> None:
    general = {"cwd": str(tmp_path)}
    with make_executor(resource_dict=general) as executor:
        general["cwd"] = "elsewhere"
        assert executor.submit(os.getcwd).result(WAIT) == str(tmp_path)


# Cores.


@pytest.mark.linux
@pytest.mark.rows(single_node=True)
def test_pinning(make_executor: Callable[..., Any], gate: Callable[..., Gate]) -> None:
    """Calls that run at once have cores of their own, within the set that the user allows."""
    ours = os.sched_getaffinity(0)
    if len(ours) < 2:
        pytest.skip("needs two cores")
    held = gate()

    def pinned() -> set[int]:
        held()
        return os.sched_getaffinity(0)

    with make_executor(max_cores=2, pin_cores=True) as executor:
        futures = [executor.submit(pinned) for _ in range(2)]
        held.pids(2)
        held.open()
        first, second = (future.result(WAIT) for future in futures)
    assert len(first) == len(second) == 1
    assert not first & second
    assert first | second <= ours
    assert os.sched_getaffinity(0) == ours


@pytest.mark.linux
@pytest.mark.rows(block=False, single_node=True)
def test_pinning_to_as_many_cores_as_threads(make_executor: Callable[..., Any]) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    with make_executor(max_cores=2, pin_cores=True) as executor:
        wide = executor.submit(affinity, resource_dict={"threads_per_core": 2})
        assert len(wide.result(WAIT)) == 2


@pytest.mark.linux
@pytest.mark.rows(single_node=True)
def test_no_pinning(make_executor: Callable[..., Any]) -> None:
    with make_executor(pin_cores=False) as executor:
        assert executor.submit(affinity).result(WAIT) == os.sched_getaffinity(0)


# GPUs.


@pytest.mark.rows(single_node=True)
def test_gpus_of_an_executor(make_executor: Callable[..., Any], gate: Callable[..., Gate]) -> None:
    """Calls that run at once see different devices."""
    held = gate()

    def devices() -> list[str | None]:
        held()
        return environment(*DEVICES)

    with make_executor(gpus=2, resource_dict={"gpus_per_core": 1}) as executor:
        futures = [executor.submit(devices) for _ in range(2)]
        held.pids(2)
        held.open()
        seen = [future.result(WAIT) for future in futures]
    assert sorted(seen) == [["0", "0"], ["1", "1"]]


@pytest.mark.rows(block=False, single_node=True)
def test_gpus_of_one_call(make_executor: Callable[..., Any]) -> None:
    with make_executor(gpus=["GPU-a", "GPU-b"]) as executor:
        one = executor.submit(environment, *DEVICES, resource_dict={"gpus_per_core": 1})
        two = executor.submit(environment, *DEVICES, resource_dict={"gpus_per_core": 2})
        assert set(one.result(WAIT)) <= {"GPU-a", "GPU-b"}
        assert two.result(WAIT) == ["GPU-a,GPU-b"] * 2


@pytest.mark.rows(block=False, single_node=True)
def test_gpus_are_waited_for(make_executor: Callable[..., Any], gate: Callable[..., Gate]) -> None:
    """Cores are free, yet the second call starts only when the device is."""
    first, second = gate("first"), gate("second")
    own = {"gpus_per_core": 1}
    with make_executor(gpus=1, max_cores=4) as executor:
        holding = executor.submit(first, 1, resource_dict=own)
        first.pid()
        waiting = executor.submit(second, 2, resource_dict=own)
        assert executor.submit(add, 1, 2).result(WAIT) == 3
        assert not waiting.running()
        first.open()
        second.open()
        assert (holding.result(WAIT), waiting.result(WAIT)) == (1, 2)


@pytest.mark.rows(single_node=True)
def test_more_gpus_than_there_are(make_executor: Callable[..., Any], row: Any) -> None:
    if row.block:
        with pytest.raises(ValueError, match=r"(?i)gpu"):
            make_executor(gpus=1, resource_dict={"gpus_per_core": 2})
        return
    with make_executor(gpus=2) as executor:
        with pytest.raises(ValueError, match=r"(?is)add.*gpu|gpu.*add"):
            executor.submit(add, 1, 2, resource_dict={"gpus_per_core": 3})
        assert executor.submit(add, 1, 2).result(WAIT) == 3


# Time.


@pytest.mark.essential
def test_run_time_max(make_executor: Callable[..., Any], gate: Callable[..., Gate]) -> None:
    held = gate()
    # Long enough for a quick call on a busy machine.
    with make_executor(resource_dict={"run_time_max": 1.25}) as executor:
        future = executor.submit(held)
        pid = held.pid()
        error = future.exception(WAIT)
        assert isinstance(error, TimeoutError)
        assert isinstance(error, ExecutorlibSocketError)
        assert "1.25" in str(error)
        wait_until_gone(pid)
        assert executor.submit(add, 1, 2).result(WAIT) == 3


def test_run_time_max_ends_calls_that_ignore_signals(make_executor: Callable[..., Any]) -> None:
    def stubborn() -> None:
        import signal

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
            signal.signal(number, signal.SIG_IGN)
        time.sleep(60)

    with make_executor(resource_dict={"run_time_max": 0.3}) as executor:
        assert isinstance(executor.submit(stubborn).exception(WAIT), TimeoutError)


def test_run_time_max_ends_programs_that_the_call_started(make_executor: Callable[..., Any], tmp_path: Path) -> None:
    """A program that the call runs does not outlive it."""

    def run_a_program() -> None:
        import subprocess

        program = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        put(tmp_path / "pid", str(program.pid))
        program.wait()

    # Enough for a busy machine to start the program.
    with make_executor(resource_dict={"run_time_max": 3}) as executor:
        future = executor.submit(run_a_program)
        pid = int(wait_for(tmp_path / "pid"))
        assert isinstance(future.exception(WAIT), TimeoutError)
        wait_until_gone(pid)


@pytest.mark.rows(jobs=False)
def test_time_limits_of_calls_that_are_over_are_not_kept(make_executor: Callable[..., Any]) -> None:
    with make_executor(resource_dict={"run_time_max": 86_400}) as executor:
        for number in range(20):
            assert executor.submit(identity, number).result(WAIT) == number
        loop = executor._loop
        # Others follow the end of a worker for some seconds.
        lasting = [due for due, *_ in loop._timers if due > time.monotonic() + 3600]
        assert len(lasting) < 20
        assert len(loop._deadlines) <= len(loop._processes) + 1


@pytest.mark.rows(block=False)
def test_run_time_max_of_one_call(executor: Any, gate: Callable[..., Gate]) -> None:
    """Neither waiting for a turn nor another call's limit counts."""
    held, late = gate(), gate("late")
    free = executor.submit(held, "free")
    limited = executor.submit(late, resource_dict={"run_time_max": 0.3})
    assert isinstance(limited.exception(WAIT), TimeoutError)
    in_time = executor.submit(identity, "in time", resource_dict={"run_time_max": 20})
    assert in_time.result(WAIT) == "in time"
    held.open()
    assert free.result(WAIT) == "free"


@pytest.mark.rows(block=False)
def test_waiting_for_a_turn_is_not_run_time(make_executor: Callable[..., Any], gate: Callable[..., Gate]) -> None:
    """While a first call runs into its limit, the clock of the queued one stands still."""
    held = gate()
    own = {"run_time_max": 1.0}
    with make_executor(max_workers=1) as executor:
        first = executor.submit(held, 1, resource_dict=own)
        queued = executor.submit(time.sleep, 0.05, resource_dict=own)
        assert isinstance(first.exception(WAIT), TimeoutError)
        assert queued.exception(WAIT) is None


# Preloaded modules.


@pytest.mark.rows("fork", "block-fork")
def test_preload(make_executor: Callable[..., Any]) -> None:
    """A module that is named is there before the call starts; another is not."""

    def loaded() -> list[bool]:
        import sys

        return [name in sys.modules for name in ("colorsys", "wave")]

    with make_executor(preload=["colorsys"]) as executor:
        assert executor.submit(loaded).result(WAIT) == [True, False]


@pytest.mark.rows(single_node=True)
def test_preload_is_accepted_by_all(make_executor: Callable[..., Any]) -> None:
    with make_executor(preload=["colorsys"]) as executor:
        assert executor.submit(lambda: "colorsys" in __import__("sys").modules).result(WAIT)


@pytest.mark.rows(single_node=True)
def test_preload_of_a_missing_module(make_executor: Callable[..., Any]) -> None:
    """It is an error that names the module, at construction or on the call. No hang."""

    def use() -> None:
        with make_executor(preload=["no_such_module_anywhere"]) as executor:
            executor.submit(add, 1, 2).result(WAIT)

    with pytest.raises(Exception, match="no_such_module_anywhere"):
        use()
