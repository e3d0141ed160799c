"""A call goes out, its result comes back: every kind of callable, argument and result."""

from __future__ import annotations

import functools
import math
import operator
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from contract.functions import CustomError, Gate, Thing, add, fail, identity, keywords, put, total

WAIT = 30


def test_result(executor: Any) -> None:
    future = executor.submit(add, 1, b=2)
    assert isinstance(future, Future)
    assert future.result(WAIT) == 3


def test_keywords_of_any_name(executor: Any) -> None:
    """Names that the executor's own methods use for parameters are free for calls."""
    given = {"self": 1, "fn": 2, "args": 3, "kwargs": 4, "future": 5, "task": 6, "cores": 7}
    assert executor.submit(keywords, **given).result(WAIT) == given


def test_function_is_positional_only(executor: Any) -> None:
    with pytest.raises(TypeError):
        executor.submit(fn=add)
    with pytest.raises(TypeError):
        executor.submit()


def _cached() -> Callable[..., Any]:
    @functools.lru_cache
    def fib(n: int) -> int:
        return n if n < 2 else fib(n - 1) + fib(n - 2)

    return lambda n: (fib(n), fib.cache_info().currsize)


def _dispatching() -> Callable[..., Any]:
    @functools.singledispatch
    def kind(x: object) -> str:
        return "something"

    @kind.register
    def _(x: int) -> str:
        return "whole"

    return kind


CALLABLES: dict[str, tuple[Callable[..., Any], tuple[Any, ...], Any]] = {
    "function": (add, (1, 2), 3),
    "lambda": (lambda x: x + 1, (1,), 2),
    "partial": (functools.partial(add, 1), (2,), 3),
    "uses a cached function": (_cached(), (10,), (55, 11)),
    "dispatches by type": (_dispatching(), (1,), "whole"),
    "partial of a lambda": (functools.partial(lambda a, b: a - b, b=1), (3,), 2),
    "bound method": (Thing(3).method, (2,), 6),
    "class method": (Thing.make, (5,), Thing(5)),
    "static method": (Thing.double, (4,), 8),
    "callable object": (Thing(1), (2,), 3),
    "class": (Thing, (7,), Thing(7)),
    "built-in": (len, ([1, 2],), 2),
    "built-in without a signature": (max, (1, 2), 2),
    "built-in type": (int, ("12",), 12),
    "method of a built-in": ("a-b".split, ("-",), ["a", "b"]),
    "unbound method of a built-in": (str.upper, ("a",), "A"),
    "C function": (math.sqrt, (9.0,), 3.0),
    "operator": (operator.itemgetter(1), ([1, 2],), 2),
    "time.sleep": (time.sleep, (0,), None),
}


@pytest.mark.parametrize("kind", CALLABLES)
def test_callables(executor: Any, kind: str) -> None:
    function, args, expected = CALLABLES[kind]
    assert executor.submit(function, *args).result(WAIT) == expected


def test_closure_and_local_class(executor: Any) -> None:
    factor = 3

    class Local:
        def __init__(self, value: int) -> None:
            self.value = value

        def scaled(self) -> int:
            return factor * self.value

    def scaled(value: int) -> Local:
        return Local(Local(value).scaled())

    result = executor.submit(scaled, 2).result(WAIT)
    assert type(result) is Local
    assert result.value == 6
    assert executor.submit(Local(5).scaled).result(WAIT) == 15


def test_changed_closure_is_a_changed_function(executor: Any) -> None:
    state = [1]

    def first() -> int:
        return state[0]

    assert executor.submit(first).result(WAIT) == 1
    state[0] = 2
    assert executor.submit(first).result(WAIT) == 2


def test_changed_global_is_a_changed_function(executor: Any) -> None:
    space: dict[str, Any] = {"__name__": "__main__", "constant": 1}
    exec("def use():\n    return constant", space)
    assert executor.submit(space["use"]).result(WAIT) == 1
    space["constant"] = 2
    assert executor.submit(space["use"]).result(WAIT) == 2


def test_redefined_function(executor: Any) -> None:
    space: dict[str, Any] = {"__name__": "__main__"}
    exec("def f():\n    return 'old'", space)
    assert executor.submit(space["f"]).result(WAIT) == "old"
    exec("def f():\n    return 'new'", space)
    assert executor.submit(space["f"]).result(WAIT) == "new"


@pytest.mark.parametrize(
    "value",
    [
        None,
        0,
        b"\0" * 100,
        {"a": (1, {2}, [3])},
        float,
        Ellipsis,
        NotImplemented,
        add,
        CustomError("x"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_any_value_makes_the_round_trip(executor: Any, value: Any) -> None:
    result = executor.submit(identity, value).result(WAIT)
    if isinstance(value, CustomError):
        assert result.args == value.args
    else:
        assert result == value


def test_an_exception_as_a_value_is_a_result(executor: Any) -> None:
    assert isinstance(executor.submit(identity, ValueError("x")).result(WAIT), ValueError)


@pytest.mark.essential
def test_large_values_in_both_directions_at_once(executor: Any) -> None:
    """More than a pipe holds, both ways, with no side waiting for the other."""
    block = bytes(range(256)) * 16_000  # 4 MB
    futures = [executor.submit(identity, block) for _ in range(6)]
    assert all(future.result(WAIT) == block for future in futures)


def test_large_argument_while_all_workers_are_busy(executor: Any, gate: Callable[..., Gate]) -> None:
    held = gate()
    block = bytes(4_000_000)
    futures = [executor.submit(held, 0), executor.submit(held, 1)]
    futures += [executor.submit(len, block) for _ in range(4)]
    held.pids(2)
    held.open()
    assert [future.result(WAIT) for future in futures] == [0, 1] + [len(block)] * 4


@pytest.mark.essential
def test_numpy_arrays(executor: Any) -> None:
    numpy = pytest.importorskip("numpy")
    array = numpy.arange(300_000.0).reshape(300, 1000)
    result = executor.submit(identity, array).result(WAIT)
    assert numpy.array_equal(result, array)
    # A result is the user's own: it can be written to, as after any unpickling.
    result += 1
    strided = executor.submit(identity, array[::2, ::3]).result(WAIT)
    assert numpy.array_equal(strided, array[::2, ::3])


def test_arguments_can_be_written_to_in_the_call(executor: Any) -> None:
    numpy = pytest.importorskip("numpy")
    array = numpy.zeros(200_000)

    def bump(values: Any) -> float:
        values += 1
        return float(values.sum())

    assert executor.submit(bump, array).result(WAIT) == 200_000
    assert array.sum() == 0


@pytest.mark.essential
def test_many_calls(executor: Any, row: Any) -> None:
    futures = [executor.submit(add, i, i) for i in range(row.many)]
    assert [future.result(WAIT) for future in futures] == [2 * i for i in range(row.many)]


def test_submit_from_threads(executor: Any) -> None:
    results: list[int] = []

    def work(start: int) -> None:
        futures = [executor.submit(add, start, i) for i in range(4)]
        results.extend(future.result(WAIT) for future in futures)

    threads = [threading.Thread(target=work, args=(100 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [100 * i + j for i in range(4) for j in range(4)]


def test_a_long_call_holds_up_no_other(executor: Any, row: Any, gate: Callable[..., Gate]) -> None:
    """Calls that a busy worker holds go to a free one, so that no call waits behind a long one."""
    held = gate()
    long = executor.submit(held, "long")
    quick = [executor.submit(add, i, 1) for i in range(row.many)]
    assert [future.result(WAIT) for future in quick] == [i + 1 for i in range(row.many)]
    assert long.running()
    held.open()
    assert long.result(WAIT) == "long"


@pytest.mark.rows(block=True)
def test_a_burst_after_quick_calls_does_not_wait_behind_a_long_one(executor: Any, gate: Callable[..., Gate]) -> None:
    """Even if earlier calls were so quick that workers were handed many at once."""
    list(executor.map(abs, range(20)))
    held = gate()
    futures = [executor.submit(add, i, 1) for i in range(5)]
    long = executor.submit(held, "long")
    futures += [executor.submit(add, i, 1) for i in range(5, 20)]
    assert [future.result(WAIT) for future in futures] == [i + 1 for i in range(20)]
    held.open()
    assert long.result(WAIT) == "long"


def test_calls_run_in_other_processes(executor: Any) -> None:
    assert executor.submit(os.getpid).result(WAIT) != os.getpid()


@pytest.mark.essential
@pytest.mark.rows(block=False)
def test_every_call_has_a_fresh_process(executor: Any) -> None:
    def leave_a_mark(_number: int) -> tuple[int, bool]:
        seen = hasattr(sys, "mark_of_an_earlier_call")
        sys.mark_of_an_earlier_call = True  # type: ignore[attr-defined]
        return os.getpid(), seen

    results = [executor.submit(leave_a_mark, i).result(WAIT) for i in range(4)]
    assert not any(seen for _, seen in results)
    assert len({pid for pid, _ in results}) == 4


@pytest.mark.rows(block=True)
def test_a_block_is_a_fixed_set_of_processes(executor: Any, row: Any, gate: Callable[..., Gate]) -> None:
    held = gate()
    futures = [executor.submit(held), executor.submit(held)]
    workers = set(held.pids(2))
    held.open()
    for future in futures:
        future.result(WAIT)
    assert {executor.submit(os.getpid).result(WAIT) for _ in range(10)} <= workers


def test_two_calls_run_at_once(executor: Any, gate: Callable[..., Gate]) -> None:
    held = gate()
    futures = [executor.submit(held, i) for i in range(2)]
    held.pids(2)
    held.open()
    assert [future.result(WAIT) for future in futures] == [0, 1]


def test_submit_does_not_wait(executor: Any, row: Any, gate: Callable[..., Gate]) -> None:
    held = gate()
    futures = [executor.submit(held, i) for i in range(2)]
    futures += [executor.submit(add, i, 0) for i in range(row.many)]
    assert not any(future.done() for future in futures[:2])
    held.open()
    assert [future.result(WAIT) for future in futures] == [0, 1, *range(row.many)]


def test_calls_may_start_processes_and_threads(executor: Any) -> None:
    def shell() -> tuple[str, list[int]]:
        out = subprocess.run(["echo", "from a shell"], capture_output=True, text=True, check=True)
        found: list[int] = []
        threads = [threading.Thread(target=found.append, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return out.stdout, sorted(found)

    assert executor.submit(shell).result(WAIT) == ("from a shell\n", [0, 1, 2])


def test_calls_may_use_multiprocessing(executor: Any) -> None:
    def pool() -> list[int]:
        import multiprocessing

        with multiprocessing.get_context("spawn").Pool(1) as workers:
            return workers.map(abs, [-1, -2])

    assert executor.submit(pool).result(WAIT) == [1, 2]


@pytest.mark.essential
def test_an_executor_in_a_call(executor: Any, row: Any) -> None:
    def nested() -> int:
        with row.make() as inner:
            return inner.submit(total, 1, 2, 3).result(WAIT)  # type: ignore[no-any-return]

    assert executor.submit(nested).result(WAIT) == 6


def test_standard_signal_behaviour_in_calls(executor: Any) -> None:
    """The executor's own signal handling does not reach the user's code."""

    def state() -> list[Any]:
        import signal

        return [
            signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL,
            signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
            signal.getsignal(signal.SIGPIPE) == signal.SIG_IGN,  # as Python sets it
            signal.pthread_sigmask(signal.SIG_BLOCK, []),
        ]

    assert executor.submit(state).result(WAIT) == [True, True, True, set()]


@pytest.mark.linux
@pytest.mark.rows(block=False)
def test_a_call_inherits_no_files_of_the_executor(row: Any, executor: Any, tmp_path: Any) -> None:
    """Neither what the user's program has open nor what other calls talk over."""
    secret = tmp_path / "open in the parent"
    with secret.open("w"):

        def open_files() -> list[str]:
            return [os.readlink(f"/proc/self/fd/{name}") for name in range(3, 64) if exists(name)]

        def exists(name: int) -> bool:
            return os.path.lexists(f"/proc/self/fd/{name}")

        found = executor.submit(open_files).result(WAIT)
    assert str(secret) not in found
    # Its own channel, no listening sockets, no second channel; Flux's shell offers PMI beside.
    assert len([name for name in found if name.startswith(("socket:", "pipe:"))]) <= (4 if row.flux else 3)


def test_random_numbers_differ_between_calls(executor: Any) -> None:
    def draw(_number: int) -> float:
        import random

        return random.random()

    drawn = {executor.submit(draw, i).result(WAIT) for i in range(4)}
    assert len(drawn) == 4


# The user's surroundings at launch.


@pytest.mark.essential
@pytest.mark.rows(block=False)
def test_environment_of_the_moment(executor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def seen(_when: int) -> tuple[str | None, bool]:
        return os.environ.get("SURROUNDINGS"), "SURROUNDINGS" in os.environ

    assert executor.submit(seen, 1).result(WAIT) == (None, False)
    monkeypatch.setenv("SURROUNDINGS", "set after the executor was made")
    assert executor.submit(seen, 2).result(WAIT) == ("set after the executor was made", True)
    monkeypatch.delenv("SURROUNDINGS")
    assert executor.submit(seen, 3).result(WAIT) == (None, False)


@pytest.mark.essential
@pytest.mark.rows(block=False)
def test_working_directory_of_the_moment(executor: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    def folder(_when: int) -> str:
        return os.getcwd()

    assert executor.submit(folder, 1).result(WAIT) == os.getcwd()
    monkeypatch.chdir(tmp_path)
    assert executor.submit(folder, 2).result(WAIT) == os.getcwd()


@pytest.mark.essential
@pytest.mark.rows(block=False)
def test_module_path_of_the_moment(executor: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "found_late.py").write_text("def where():\n    return __file__\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import found_late  # type: ignore[import-not-found]

    assert executor.submit(found_late.where).result(WAIT) == str(tmp_path / "found_late.py")


def test_surroundings_at_construction(
    make_executor: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """A block's workers, too, start with the environment that the user's program had set by then."""
    (tmp_path / "found_early.py").write_text("def where():\n    return __file__\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("SURROUNDINGS", "early")
    monkeypatch.chdir(tmp_path)
    import found_early  # type: ignore[import-not-found]

    def seen() -> tuple[str, str]:
        return os.environ["SURROUNDINGS"], os.getcwd()

    with make_executor() as executor:
        assert executor.submit(found_early.where).result(WAIT) == str(tmp_path / "found_early.py")
        assert executor.submit(seen).result(WAIT) == ("early", os.getcwd())


# Programs of their own.

MAIN = """
    class Local:
        def __init__(self, value):
            self.value = value
        def __call__(self, other):
            return Local(self.value + other)

    scale = 2

    def scaled(value):
        return scale * helper(value)

    def helper(value):
        return value + 1

    with Executor(**OPTIONS) as executor:
        print(executor.submit(scaled, 1).result())
        scale = 3
        print(executor.submit(scaled, 1).result())
        result = executor.submit(Local(1), 2).result()
        print(type(result) is Local, result.value)
        print(executor.submit(lambda: [helper(i) for i in range(3)]).result())
"""


@pytest.mark.essential
def test_functions_of_main_without_a_guard(row: Any, scripts: Any) -> None:
    """A script needs no ``if __name__ == "__main__"``: it is not imported again."""
    out = scripts.run(MAIN, row.arguments())
    assert out.splitlines() == ["4", "6", "True 3", "[1, 2, 3]"]


def test_program_from_standard_input(row: Any) -> None:
    source = (
        f"from {row.executor_class.__module__} import {row.executor_class.__name__} as Executor\n"
        f"with Executor(**{row.arguments()!r}) as executor:\n"
        "    def f(x): return x + 1\n"
        "    print(executor.submit(f, 1).result())\n"
    )
    done = subprocess.run([sys.executable], input=source, capture_output=True, text=True, timeout=WAIT, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "2\n", "")


@pytest.mark.rows(prints_here=True)
def test_standard_output_of_calls_reaches_the_program(row: Any, scripts: Any) -> None:
    """Everything that a call prints arrives, even from Python's buffer and without a line end."""
    out = scripts.run(
        """
        with Executor(**OPTIONS) as executor:
            executor.submit(print, "one").result()
            executor.submit(lambda: sys.stdout.write("two")).result()
            executor.submit(lambda: os.write(1, b"three") and None).result()
        """,
        row.arguments(),
    )
    assert sorted(out) == sorted("one\ntwothree")


def test_output_of_c_code_arrives_with_the_result(row: Any, scripts: Any) -> None:
    """On standard output and in files of its own, which C's stdio buffers until a flush or exit."""
    out = scripts.run(
        """
        def say(text, path):
            import ctypes

            libc = ctypes.CDLL(None)
            libc.printf(text)  # a job's goes to its file
            libc.fopen.restype = ctypes.c_void_p
            libc.fputs(text, ctypes.c_void_p(libc.fopen(path, b"w")))

        with Executor(**OPTIONS) as executor:
            for name in (b"one", b"two"):
                executor.submit(say, name, name).result()
                with open(name) as file:
                    print(file.read(), end="", flush=True)
        """,
        row.arguments(),
    )
    assert sorted(out) == sorted(("one" + "two") * (2 if row.prints_here else 1))


@pytest.mark.rows(prints_here=True)
def test_standard_error_of_calls_reaches_the_program(row: Any, scripts: Any) -> None:
    process = scripts.start(
        """
        with Executor(**OPTIONS) as executor:
            executor.submit(lambda: print("a warning", file=sys.stderr)).result()
        """,
        row.arguments(),
    )
    _, err = process.communicate(timeout=WAIT)
    assert process.returncode == 0
    assert "a warning" in err


def test_one_thread_per_executor(make_executor: Callable[..., Any]) -> None:
    before = threading.active_count()
    with make_executor() as executor:
        futures = [executor.submit(add, i, 0) for i in range(10)]
        assert threading.active_count() <= before + 1
        for future in futures:
            future.result(WAIT)
        assert threading.active_count() <= before + 1


def test_failed_call(executor: Any) -> None:
    future = executor.submit(fail, "this went wrong")
    assert isinstance(future.exception(WAIT), CustomError)
    with pytest.raises(CustomError, match="this went wrong"):
        future.result()
    assert executor.submit(add, 1, 2).result(WAIT) == 3


def test_file_event_helper(tmp_path: Any) -> None:
    """It tests a helper of the tests."""
    held = Gate(str(tmp_path), "own")
    put(f"{held.folder}/own-open")
    assert held("through") == "through"
    assert held.pid() == os.getpid()
