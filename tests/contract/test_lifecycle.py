"""From construction to the last process: shutdown, interpreter exit, garbage, memory."""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, CancelledError, Future
from pathlib import Path
from typing import Any

import pytest

from contract.functions import (
    CustomError,
    Gate,
    Thing,
    add,
    alive,
    fail,
    identity,
    lines,
    record,
    until,
    wait_until_gone,
)

WAIT = 30


# Shutdown.


@pytest.mark.essential
def test_leaving_the_block_finishes_everything(make_executor: Callable[..., Any]) -> None:
    with make_executor() as executor:
        futures = [executor.submit(add, i, 1) for i in range(20)]
        futures.append(executor.submit(add, futures[-1], 1))
    assert all(future.done() for future in futures)
    assert futures[-1].result() == 21


def test_shutdown_without_calls(make_executor: Callable[..., Any]) -> None:
    make_executor().shutdown()
    with make_executor():
        pass


def test_shutdown_twice(make_executor: Callable[..., Any]) -> None:
    executor = make_executor()
    assert executor.submit(add, 1, 2).result(WAIT) == 3
    executor.shutdown()
    executor.shutdown()
    executor.shutdown(wait=False, cancel_futures=True)
    with executor:
        pass


@pytest.mark.parametrize("wait", [True, False])
def test_no_call_is_accepted_after_shutdown(make_executor: Callable[..., Any], row: Any, wait: bool) -> None:
    executor = make_executor()
    done = executor.submit(add, 1, 2)
    if row.jobs and not wait:
        done.result(WAIT)  # else it would be left behind
    executor.shutdown(wait=wait)
    with pytest.raises(RuntimeError, match="shutdown"):
        executor.submit(add, 1, 2)
    with pytest.raises(RuntimeError, match="shutdown"):
        executor.map(add, [1], [2])
    assert done.result(WAIT) == 3


@pytest.mark.rows(jobs=False)
def test_shutdown_without_waiting(make_executor: Callable[..., Any], gate: Callable[..., Gate]) -> None:
    """It returns at once, and submitted calls still finish."""
    held = gate()
    executor = make_executor()
    futures = [executor.submit(held, 1), executor.submit(add, 1, 2)]
    futures.append(executor.submit(add, futures[0], 1))
    executor.shutdown(wait=False)
    assert not futures[0].done()
    held.open()
    assert [future.result(WAIT) for future in futures] == [1, 3, 2]


def test_shutdown_waits_from_any_thread(make_executor: Callable[..., Any], row: Any, gate: Callable[..., Gate]) -> None:
    held = gate()
    executor = make_executor()
    future = executor.submit(held, 1)
    held.pid()
    if not row.jobs:
        executor.shutdown(wait=False)  # jobs would be left
    waiting = [threading.Thread(target=executor.shutdown) for _ in range(3)]
    for thread in waiting:
        thread.start()
    held.open()
    for thread in waiting:
        thread.join(WAIT)
        assert not thread.is_alive()
    assert future.done()


@pytest.mark.essential
def test_shutdown_that_cancels(
    make_executor: Callable[..., Any], row: Any, gate: Callable[..., Gate], tmp_path: Path
) -> None:
    held, log = gate(), tmp_path / "log"
    executor = make_executor()
    running = [executor.submit(held, i) for i in range(2)]
    until(lambda: all(future.running() for future in running), WAIT)
    waiting = [executor.submit(record, log, i) for i in range(row.backlog)]
    dependent = executor.submit(add, running[0], 1)
    never: Future[int] = Future()
    foreign = executor.submit(add, never, 1)
    executor.shutdown(wait=False, cancel_futures=True)
    for future in (waiting[-1], dependent, foreign):
        with pytest.raises(CancelledError):
            future.result(WAIT)
    held.open()
    executor.shutdown()
    assert [future.result(WAIT) for future in running] == [0, 1]
    assert all(future.done() for future in waiting)
    ran = {int(line) for line in lines(log)}
    assert ran == {i for i, future in enumerate(waiting) if not future.cancelled()}
    assert len(ran) < row.backlog / 2


@pytest.mark.essential
def test_no_process_outlives_its_executor(make_executor: Callable[..., Any], gate: Callable[..., Gate]) -> None:
    held = gate()
    with make_executor() as executor:
        futures = [executor.submit(held, i) for i in range(2)]
        pids = held.pids(2)
        held.open()
        for future in futures:
            future.result(WAIT)
    wait_until_gone(*pids)


def test_processes_that_calls_left_behind_do_not_hold_up_shutdown(
    make_executor: Callable[..., Any], tmp_path: Path
) -> None:
    """A daemon that a call starts keeps the call's channel open, and must not be waited for."""

    def start_a_daemon() -> int:
        import subprocess
        import sys

        source = "import time; time.sleep(20)"
        return subprocess.Popen([sys.executable, "-c", source], close_fds=False).pid

    started = time.monotonic()
    with make_executor() as executor:
        pid = executor.submit(start_a_daemon).result(WAIT)
    assert time.monotonic() - started < 15
    if alive(pid):
        os.kill(pid, 9)


def test_executors_side_by_side(make_executor: Callable[..., Any]) -> None:
    with make_executor() as one, make_executor() as two:
        futures = [executor.submit(add, i, 1) for i in range(6) for executor in (one, two)]
        one.shutdown()
        assert two.submit(add, 1, 2).result(WAIT) == 3
        assert [future.result(WAIT) for future in futures] == [i // 2 + 1 for i in range(12)]


def test_one_after_the_other(make_executor: Callable[..., Any]) -> None:
    for i in range(5):
        with make_executor() as executor:
            assert executor.submit(add, i, 1).result(WAIT) == i + 1


def test_constructor_does_not_wait_for_workers(make_executor: Callable[..., Any]) -> None:
    """Construction does not wait for workers."""
    started = time.monotonic()
    executor = make_executor()
    assert time.monotonic() - started < 1.0
    executor.shutdown()


# Ending at once: terminate_workers and kill_workers, as Python 3.14 has them.


@pytest.mark.essential
@pytest.mark.parametrize("method", ["terminate_workers", "kill_workers"])
def test_end_at_once(make_executor: Callable[..., Any], row: Any, gate: Callable[..., Gate], method: str) -> None:
    held = gate()
    executor = make_executor()
    running = [executor.submit(held, i) for i in range(2)]
    pids = held.pids(2)
    until(lambda: all(future.running() for future in running))
    waiting = [executor.submit(add, i, 1) for i in range(row.backlog)]
    getattr(executor, method)()
    for future in running:
        assert isinstance(future.exception(WAIT), BrokenExecutor)
    executor.shutdown()
    for future in waiting:
        assert future.cancelled() or isinstance(future.exception(0), BrokenExecutor)
    wait_until_gone(*pids)
    with pytest.raises(RuntimeError, match="shutdown"):
        executor.submit(add, 1, 2)


@pytest.mark.parametrize("method", ["terminate_workers", "kill_workers"])
def test_end_at_once_without_calls(make_executor: Callable[..., Any], method: str) -> None:
    idle = make_executor()
    getattr(idle, method)()
    used = make_executor()
    assert used.submit(add, 1, 2).result(WAIT) == 3
    getattr(used, method)()
    getattr(used, method)()
    used.shutdown()


@pytest.mark.rows(block=True)
@pytest.mark.parametrize("method", ["terminate_workers", "kill_workers"])
def test_end_at_once_before_workers_have_started(make_executor: Callable[..., Any], method: str) -> None:
    """Their init function may never return, so nothing waits for it."""

    def last() -> dict[str, Any]:
        import time

        time.sleep(60)
        return {}

    executor = make_executor(init_function=last)
    future = executor.submit(add, 1, 2)
    getattr(executor, method)()
    executor.shutdown()
    assert future.cancelled() or isinstance(future.exception(0), BrokenExecutor)


def test_kill_ends_calls_that_ignore_signals(make_executor: Callable[..., Any], tmp_path: Path) -> None:
    log = tmp_path / "log"

    def stubborn() -> None:
        import signal
        import time

        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        record(str(log), os.getpid())
        time.sleep(60)

    executor = make_executor()
    future = executor.submit(stubborn)
    # Also the executor has to know that it runs, or it cancels the call.
    until(lambda: lines(log) and future.running(), WAIT)
    executor.kill_workers()
    assert isinstance(future.exception(WAIT), BrokenExecutor)
    executor.shutdown()
    wait_until_gone(int(lines(log)[0]))


# Garbage.


def test_garbage_collected_executor(make_executor: Callable[..., Any], gate: Callable[..., Gate]) -> None:
    """Pending futures finish although nobody has the executor any longer."""
    held = gate()
    executor = make_executor()
    gone = weakref.ref(executor)
    futures = [executor.submit(held, 1), executor.submit(add, 1, 2)]
    futures.append(executor.submit(add, futures[0], 1))
    del executor
    gc.collect()
    assert gone() is None
    held.open()
    assert [future.result(WAIT) for future in futures] == [1, 3, 2]


def test_garbage_collected_executor_without_calls(make_executor: Callable[..., Any]) -> None:
    make_executor()
    executor = make_executor()
    assert executor.submit(add, 1, 2).result(WAIT) == 3
    del executor
    gc.collect()


def until_collected(reference: weakref.ref[Any], what: str) -> None:
    def collected() -> bool:
        gc.collect()
        return reference() is None

    try:
        until(collected)
    except AssertionError:
        pytest.fail(f"{what} is still referred to")


def test_nothing_keeps_arguments(executor: Any) -> None:
    argument, keyword = Thing(1), Thing(2)
    references = weakref.ref(argument), weakref.ref(keyword)
    future = executor.submit(add, argument.value, b=keyword.value)
    kept = executor.submit(identity, [argument, {"a": keyword}])
    del argument, keyword
    assert future.result(WAIT) == 3
    kept.result(WAIT)
    for reference in references:
        until_collected(reference, "an argument")


def test_nothing_keeps_the_function(executor: Any) -> None:
    function = Thing(1)
    reference = weakref.ref(function)
    future = executor.submit(function, 2)
    del function
    assert future.result(WAIT) == 3
    until_collected(reference, "the function")


def test_nothing_keeps_the_result(executor: Any) -> None:
    future = executor.submit(Thing, 1)
    dependent = executor.submit(identity, future)
    reference = weakref.ref(future.result(WAIT))
    dependent.result(WAIT)
    del future
    until_collected(reference, "the result")


def test_nothing_keeps_the_future(executor: Any) -> None:
    future = executor.submit(add, 1, 2)
    future.result(WAIT)
    reference = weakref.ref(future)
    del future
    until_collected(reference, "the future")


def test_nothing_keeps_the_inputs_of_a_failed_call(executor: Any) -> None:
    argument = Thing(1)
    reference = weakref.ref(argument)
    future = executor.submit(fail, argument)
    del argument
    assert isinstance(future.exception(WAIT), CustomError)
    del future
    until_collected(reference, "the argument")


def test_nothing_keeps_the_inputs_of_a_cancelled_call(executor: Any) -> None:
    argument = Thing(1)
    reference = weakref.ref(argument)
    never: Future[int] = Future()
    future = executor.submit(add, argument, never)
    del argument
    assert future.cancel()
    until_collected(reference, "the argument")
    never.set_result(1)


def test_map_keeps_no_results(executor: Any) -> None:
    for result in executor.map(Thing, range(4)):
        reference = weakref.ref(result)
        del result
        until_collected(reference, "a result of map")


# Interpreter exit.

FINISHED = """
    def work(i):
        import time
        time.sleep(0.05)
        with open("log", "a") as log:
            log.write(f"{i}\\n")
        return i

    executor = Executor(**OPTIONS)
    futures = [executor.submit(work, i) for i in range(4)]
    futures.append(executor.submit(work, executor.submit(work, 4)))
"""


@pytest.mark.essential
def test_interpreter_exit_without_shutdown(row: Any, scripts: Any) -> None:
    """Submitted calls finish, then the program ends by itself."""
    scripts.run(FINISHED, row.arguments())
    assert sorted(lines(scripts.folder / "log")) == ["0", "1", "2", "3", "4", "4"]


def test_interpreter_exit_after_garbage_collection(row: Any, scripts: Any) -> None:
    scripts.run(FINISHED + "    del executor, futures\n", row.arguments())
    assert sorted(lines(scripts.folder / "log")) == ["0", "1", "2", "3", "4", "4"]


def test_interpreter_exit_after_shutdown_without_waiting(row: Any, scripts: Any) -> None:
    """Executors of jobs may leave them to their queue, which finishes them."""
    scripts.run(FINISHED + "    executor.shutdown(wait=False)\n", row.arguments())
    if row.jobs:
        until(lambda: len(lines(scripts.folder / "log")) == 6, WAIT)
    assert sorted(lines(scripts.folder / "log")) == ["0", "1", "2", "3", "4", "4"]


def test_interpreter_exit_by_an_error(row: Any, scripts: Any) -> None:
    process = scripts.start(
        """
        executor = Executor(**OPTIONS)
        print(executor.submit(abs, -5).result())
        raise KeyError("the user's own")
        """,
        row.arguments(),
    )
    out, err = process.communicate(timeout=WAIT)
    assert process.returncode == 1
    assert out == "5\n"
    assert err.rstrip().endswith('KeyError: "the user\'s own"')


def test_interpreter_exit_by_sys_exit(row: Any, scripts: Any) -> None:
    process = scripts.start(
        """
        executor = Executor(**OPTIONS)
        executor.submit(abs, -5).result()
        sys.exit(3)
        """,
        row.arguments(),
    )
    assert process.communicate(timeout=WAIT) == ("", "")
    assert process.returncode == 3


def test_submit_at_interpreter_exit(row: Any, scripts: Any) -> None:
    """Too late is an error as in the standard library, never a hang."""
    out = scripts.run(
        """
        import atexit, threading

        executor = Executor(**OPTIONS)
        executor.submit(abs, -5).result()

        @atexit.register
        def late():
            try:
                print("result", executor.submit(abs, -1).result(10))
            except RuntimeError as error:
                print("RuntimeError")
        """,
        row.arguments(),
    )
    assert out.strip() in ("RuntimeError", "result 1")


def test_executor_as_a_module_global_that_is_never_used(row: Any, scripts: Any) -> None:
    assert scripts.run("executor = Executor(**OPTIONS)\n", row.arguments()) == ""


def test_daemon_thread_submits_while_the_program_ends(row: Any, scripts: Any) -> None:
    process = scripts.start(
        """
        import threading

        executor = Executor(**OPTIONS)
        first = threading.Event()

        def forever():
            while True:
                try:
                    executor.submit(abs, -1).result()
                except BaseException:
                    return
                first.set()

        threading.Thread(target=forever, daemon=True).start()
        first.wait(20)
        """,
        row.arguments(),
    )
    process.communicate(timeout=WAIT)
    assert process.returncode == 0
