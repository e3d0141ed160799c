"""One Ctrl-C, at every point where Python could run its handler: nothing stays locked, and nothing is left."""

from __future__ import annotations

import concurrent.futures
import contextlib
import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, as_completed, wait
from pathlib import Path
from typing import Any

import pytest

from contract.functions import until
from executorlib.core.fresh import FreshScheduler
from executorlib.core.ledger import Ledger, Node
from executorlib.core.lookup import Lookup
from executorlib.core.loop import Loop, running_loops
from executorlib.core.sending import Messages
from executorlib.core.task import CallFuture
from executorlib.futures.lean import LeanFuture
from executorlib.launchers.contract import Events
from executorlib.resources import Demand, Resources
from fakes import NoWorkers

WAIT = 30


class Interrupt(BaseException):
    """Stands for KeyboardInterrupt."""


def strikes(at: int, operation: Callable[[], Any]) -> bool:
    """Interrupt an operation when it comes to its ``at``-th point; False if it is over before.

    Handlers of signals run where a Python function begins and where any call has returned. Python also tells profilers
    of these points, and an exception of a profiler goes the way of one that a handler raises.
    """
    left = at
    # Only on Python 3.14 do handlers run when `with` has entered what is written in C, and before its block begins;
    # later ones tell profilers of that point, too.
    whole = "__enter__" if sys.version_info[:2] != (3, 14) else None

    def profile(frame: Any, event: str, arg: Any) -> None:
        nonlocal left
        # Python prints exceptions of callbacks of weak references instead of raising them.
        if frame.f_code.co_filename.endswith("_weakrefset.py"):
            return
        if event == "call" or (event == "c_return" and arg.__name__ != whole):
            left -= 1
            if left == -1:
                raise Interrupt

    gc.disable()  # what its callbacks raise is not raised further either
    try:
        sys.setprofile(profile)
        operation()
    except Interrupt:
        pass
    finally:
        sys.setprofile(None)
        gc.enable()
    return left < 0


def strike_everywhere(case: Callable[[], tuple[Callable[[], Any], Callable[[], Any]]]) -> None:
    """Interrupt an operation at each of its points, one at a time.

    Args:
        case: Prepares the operation; returns it, and what checks that all is well after it.
    """
    at = 0
    while True:
        operation, check = case()
        struck = strikes(at, operation)
        check()
        if not struck:
            break
        at += 1
    assert at > 3, "the operation has hardly any point, so the test shows nothing"


def in_thread(function: Callable[[], Any]) -> None:
    """Call a function in another thread, which must not wait for anything that is left locked."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    thread.join(WAIT)
    assert not thread.is_alive(), "waits for a lock that an interrupted thread has left"


# Futures.


USES: dict[str, Callable[[Future[int], Future[int]], Any]] = {
    "done": lambda first, second: [first.done(), second.done()],
    "running": lambda first, second: [first.running(), second.cancelled()],
    "result": lambda first, second: first.result(0),
    "result-soon": lambda first, second: first.result(0.001),
    "exception": lambda first, second: first.exception(0),
    "callback": lambda first, second: first.add_done_callback(lambda _: None),
    "wait": lambda first, second: wait([first, second], 0),
    "wait-soon": lambda first, second: wait([first, second], 0.001),
    "wait-first": lambda first, second: wait([first, second], 0, FIRST_COMPLETED),
    "as-completed": lambda first, second: list(as_completed([first, second], 0)),
    "as-completed-soon": lambda first, second: list(as_completed([first, second], 0.001)),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_future_can_be_resolved_after_an_interrupt(use: Callable[..., Any]) -> None:
    def case() -> tuple[Callable[[], Any], Callable[[], Any]]:
        futures: list[LeanFuture[int]] = [LeanFuture(), LeanFuture()]

        def operation() -> None:
            with contextlib.suppress(concurrent.futures.TimeoutError):
                use(*futures)

        def resolve() -> None:
            for value, future in enumerate(futures):
                assert future.set_running_or_notify_cancel()
                future.set_result(value)

        def check() -> None:
            in_thread(resolve)
            assert [future.result(0) for future in futures] == [0, 1]

        return operation, check

    strike_everywhere(case)


def test_future_is_not_resolved_while_it_is_read() -> None:
    """`wait` counts the pending futures, then registers with each. None may become done in between."""
    future: LeanFuture[int] = LeanFuture()
    read, told = threading.Event(), threading.Event()

    def reader() -> None:
        future._condition.acquire()
        read.set()
        told.wait(WAIT)
        seen.append(future._state)
        future._condition.release()

    def call_reader() -> None:
        reader()

    seen: list[str] = []
    thread = threading.Thread(target=call_reader)
    thread.start()
    assert read.wait(WAIT)
    resolving = threading.Thread(target=future.set_result, args=(1,))
    resolving.start()
    assert future.cancelled() is False  # others may look at it meanwhile
    told.set()
    thread.join()
    resolving.join()
    assert seen == ["PENDING"]
    assert future.result(0) == 1


@pytest.mark.parametrize("return_when", ["ALL_COMPLETED", "FIRST_COMPLETED", "FIRST_EXCEPTION"])
def test_wait_for_futures_of_both_kinds(return_when: str) -> None:
    ours: LeanFuture[int] = LeanFuture()
    other: Future[int] = Future()
    threads = [threading.Thread(target=future.set_result, args=(1,)) for future in (ours, other)]
    for thread in threads:
        thread.start()
    done, _ = wait([ours, other], WAIT, return_when)
    assert done
    assert set(as_completed([ours, other], WAIT)) == {ours, other}
    for thread in threads:
        thread.join()


# The loop.


def make_loop(make_launcher: Callable[[Events], Any] = NoWorkers) -> Loop:
    return Loop(
        FreshScheduler(Ledger([Node("n", range(1), [])])),
        make_launcher,
        Messages(Lookup()),
        block_resources=None,
        log_sizes=False,
        name="tested",
    )


def test_start_that_is_interrupted_leaves_nothing() -> None:
    """The leak guard of all tests looks for the threads and descriptors."""

    def case() -> tuple[Callable[[], Any], Callable[[], Any]]:
        loop = make_loop()
        return loop.start, lambda: loop.shutdown(True)

    strike_everywhere(case)


def test_wake_up_that_comes_too_late_reaches_no_other_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The loop ends, and others open files, between the steps of a thread that is about to wake it."""
    loop = make_loop()
    loop.start()
    write = os.write
    numbers: list[int] = []
    files: list[int] = []

    def late(fd: int, data: bytes) -> int:
        monkeypatch.undo()
        numbers.append(fd)
        loop.shutdown(True)
        loop.join()
        files.extend(os.open(tmp_path / str(index), os.O_CREAT | os.O_WRONLY) for index in range(50))
        return write(fd, data)

    monkeypatch.setattr(os, "write", late)
    while not numbers:  # the loop may not have gone to sleep yet
        loop.post(lambda: None)
    for file in files:
        os.close(file)
    assert [entry.name for entry in os.scandir(tmp_path) if entry.stat().st_size] == []
    with pytest.raises(OSError, match="Bad file descriptor"):  # it was closed, after all
        os.fstat(numbers[0])


def test_start_that_fails_leaves_nothing() -> None:
    def make_launcher(events: Events) -> Any:
        raise MemoryError("no room for a launcher")

    loop = make_loop(make_launcher)
    files = len(os.listdir("/dev/fd"))
    with pytest.raises(MemoryError, match="no room"):
        loop.start()
    loop.join()
    assert len(os.listdir("/dev/fd")) == files
    assert loop not in running_loops()


@pytest.mark.parametrize("name", ["start_new_thread", "threading.Thread.start"])
def test_thread_that_cannot_start(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(f"executorlib.core.loop.{name}", fail)
    loop = make_loop()
    files = len(os.listdir("/dev/fd"))
    with pytest.raises(RuntimeError, match="can't start new thread"):
        loop.start()
    monkeypatch.undo()
    assert len(os.listdir("/dev/fd")) == files
    assert loop not in running_loops()
    loop.join()  # which does not wait for a thread that never was


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = make_loop()
    made.start()
    yield made
    made.shutdown(True)
    made.join()


def submit(loop: Loop, future: Future[Any], *inputs: Future[Any]) -> None:
    loop.submit(abs, inputs or (-1,), {}, future, Resources(), Demand(1), list(inputs))


def test_submit_that_is_interrupted_is_not_counted(loop: Loop) -> None:
    """The call may or may not be accepted. The loop accepts further calls, and counts none forever."""
    never: Future[Any] = Future()

    def case() -> tuple[Callable[[], Any], Callable[[], Any]]:
        future = CallFuture()

        def check() -> None:
            future.cancel()
            last = CallFuture()
            submit(loop, last)
            assert "there are no workers" in str(last.exception(WAIT))
            assert loop.waiting == 0

        return lambda: submit(loop, future, never), check

    strike_everywhere(case)


def test_post_that_is_interrupted_wakes_the_loop(loop: Loop) -> None:
    def case() -> tuple[Callable[[], Any], Callable[[], Any]]:
        until(lambda: loop._sleeping and not loop._inbox)
        posted = threading.Event()
        made: list[object] = []

        def check() -> None:
            # It is there, or was never put there; but it does not lie there with the loop asleep.
            until(lambda: not loop._inbox)
            assert posted.is_set() or not made

        def operation() -> None:
            loop.post(posted.set)
            made.append(True)

        return operation, check

    strike_everywhere(case)
