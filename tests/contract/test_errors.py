"""The errors of a call arrive with their traceback, go to the log file, and harm no other call."""

from __future__ import annotations

import asyncio
import ctypes
import linecache
import logging
import os
import pickle
import random
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import pytest

from contract.functions import CustomError, Gate, add, fail, identity
from executorlib import get_item_from_future
from executorlib.api import ExecutorlibSocketError
from executorlib.launchers.last_output import tail_text

WAIT = 30
pytestmark = pytest.mark.essential


def test_remote_traceback(executor: Any) -> None:
    error = executor.submit(fail, "far away").exception(WAIT)
    assert isinstance(error, CustomError)
    assert error.args == ("far away",)
    remote = str(error.__cause__)
    assert "Traceback (most recent call last)" in remote
    assert "functions.py" in remote
    assert "in fail" in remote
    assert "CustomError: far away" in remote


def test_remote_traceback_shows_the_users_lines(executor: Any) -> None:
    """The lines of the call itself, not of its callers."""

    def outer() -> None:
        inner()

    def inner() -> None:
        raise KeyError("deep down")

    error = executor.submit(outer).exception(WAIT)
    assert isinstance(error, KeyError)
    remote = str(error.__cause__)
    assert "in outer" in remote
    assert "in inner" in remote
    assert remote.index("in outer") < remote.index("in inner")


@pytest.mark.rows("fork", "block-fork")
def test_exception_with_a_text_that_is_too_long_for_a_traceback(executor: Any) -> None:
    """The exception arrives whole. Its text in the traceback says how much was left out."""

    def complain() -> None:
        raise ValueError("x" * 18_000_000 + "the end")

    error = executor.submit(complain).exception(WAIT)
    assert isinstance(error, ValueError)
    assert str(error) == "x" * 18_000_000 + "the end"
    remote = str(error.__cause__)
    assert len(remote) < 1_100_000
    assert "in complain" in remote
    left_out = re.search(r"(\d+) characters were left out", remote)
    assert left_out is not None
    assert 16_000_000 < int(left_out[1]) < 18_000_000
    assert remote.rstrip('"\n ').endswith("the end")
    assert executor.submit(add, 1, 2).result(WAIT) == 3


def test_remote_traceback_of_chained_errors(executor: Any) -> None:
    def chained() -> None:
        try:
            fail("the first")
        except CustomError as error:
            raise RuntimeError("the second") from error

    remote = str(executor.submit(chained).exception(WAIT).__cause__)
    assert "the first" in remote
    assert "the second" in remote


def test_traceback_of_the_program_shows_it(row: Any, scripts: Any) -> None:
    process = scripts.start(
        """
        def broken():
            return [][1]

        with Executor(**OPTIONS) as executor:
            executor.submit(broken).result()
        """,
        row.arguments(),
    )
    _, err = process.communicate(timeout=WAIT)
    assert process.returncode == 1
    assert "in broken" in err
    assert err.rstrip().endswith("IndexError: list index out of range")


def test_exceptions_of_the_users_own_classes(executor: Any) -> None:
    class LocalError(Exception):
        def __init__(self, code: int, text: str) -> None:
            super().__init__(code, text)
            self.code = code

    def raise_it() -> None:
        raise LocalError(5, "with attributes")

    error = executor.submit(raise_it).exception(WAIT)
    assert type(error) is LocalError
    assert error.code == 5


class UsersOwn(BaseException):
    pass


def test_base_exceptions(executor: Any) -> None:
    """An exception that would end the waiting program becomes an error, and no process ends."""

    def raise_it(error: BaseException) -> None:
        raise error

    for error, told in (
        (KeyboardInterrupt("text"), "the function raised KeyboardInterrupt"),
        (GeneratorExit(), "the function raised GeneratorExit"),
        (SystemExit(), "the function called sys.exit()"),
        (SystemExit("bye"), "the function called sys.exit('bye')"),
        (asyncio.CancelledError(), "the function raised CancelledError"),
    ):
        seen = executor.submit(raise_it, error).exception(WAIT)
        assert type(seen) is ExecutorlibSocketError
        assert told in str(seen)
        assert type(error).__name__ in str(seen.__cause__)
        assert "in raise_it" in str(seen.__cause__)
    for error in (StopIteration(), BaseException("text"), UsersOwn("text")):
        seen = executor.submit(raise_it, error).exception(WAIT)
        assert type(seen) is type(error)
    assert executor.submit(add, 1, 2).result(WAIT) == 3


class Exits:
    """Ends the program that unpickles it, unless that is the one that is left out."""

    def __init__(self, spared: int = 0) -> None:
        self.spared = spared

    def __reduce__(self) -> Any:
        return _exit_unless, (self.spared,)


def _exit_unless(spared: int) -> Any:
    if os.getpid() == spared:
        return None
    sys.exit(1)


class ExitsAsItIsPickled:
    def __reduce__(self) -> Any:
        sys.exit(2)


def test_sys_exit_while_something_is_unpickled(executor: Any) -> None:
    def return_it() -> Any:
        import os

        return Exits(os.getpid())

    error = executor.submit(identity, Exits()).exception(WAIT)
    assert type(error) is ExecutorlibSocketError
    assert "unpickling the arguments of the function called sys.exit(1)" in str(error)
    assert "in _exit_unless" in str(error.__cause__)
    error = executor.submit(return_it).exception(WAIT)
    assert type(error) is ExecutorlibSocketError
    assert "unpickling the result of the function called sys.exit(1)" in str(error)
    assert "in _exit_unless" in str(error.__cause__)
    assert executor.submit(add, 1, 2).result(WAIT) == 3


def test_sys_exit_while_something_is_pickled(executor: Any) -> None:
    for call in ((identity, ExitsAsItIsPickled()), (ExitsAsItIsPickled,)):
        error = executor.submit(*call).exception(WAIT)
        assert type(error) is pickle.PicklingError
        assert "called sys.exit(2)" in str(error)
    assert executor.submit(add, 1, 2).result(WAIT) == 3


def test_an_error_can_be_pickled_on(executor: Any) -> None:
    error = executor.submit(fail, "far away").exception(WAIT)
    copy = pickle.loads(pickle.dumps(error))
    assert copy.args == error.args


def test_one_failure_leaves_the_others_alone(executor: Any) -> None:
    futures = [executor.submit(fail if i % 3 == 0 else identity, i) for i in range(12)]
    for i, future in enumerate(futures):
        if i % 3 == 0:
            assert isinstance(future.exception(WAIT), CustomError)
        else:
            assert future.result(WAIT) == i


def test_wrong_arguments(executor: Any) -> None:
    error = executor.submit(add).exception(WAIT)
    assert isinstance(error, TypeError)
    assert "add" in str(error)
    assert isinstance(executor.submit(add, 1, 2, 3).exception(WAIT), TypeError)
    assert isinstance(executor.submit(add, 1, c=3).exception(WAIT), TypeError)


# error_log_file


def test_error_log_file(make_executor: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "errors.log"
    with make_executor(resource_dict={"error_log_file": str(path)}) as executor:
        assert executor.submit(add, 1, 2).result(WAIT) == 3
        assert not path.exists() or not path.read_text()
        assert isinstance(executor.submit(fail, "first").exception(WAIT), CustomError)
        text = path.read_text()
        assert re.search(r"^function: .*fail", text, re.MULTILINE)
        assert re.search(r"^args: .*first", text, re.MULTILINE)
        assert re.search(r"^kwargs: \{\}", text, re.MULTILINE)
        assert "Traceback (most recent call last)" in text
        assert "CustomError: first" in text
        assert text.index("function:") < text.index("args:") < text.index("kwargs:")
        assert text.index("kwargs:") < text.index("Traceback")
        executor.submit(fail, message="second").exception(WAIT)
        longer = path.read_text()
        assert longer.startswith(text)
        assert re.search(r"^kwargs: .*'message': 'second'", longer[len(text) :], re.MULTILINE)


@pytest.mark.rows(block=False)
def test_error_log_file_of_one_call(executor: Any, tmp_path: Path) -> None:
    path = tmp_path / "errors.log"
    executor.submit(fail, "quiet").exception(WAIT)
    own = {"error_log_file": str(path)}
    error = executor.submit(fail, "logged", resource_dict=own).exception(WAIT)
    assert isinstance(error, CustomError)
    assert "logged" in path.read_text()
    assert "quiet" not in path.read_text()


@pytest.mark.rows(block=False)
def test_error_log_file_that_cannot_be_written(executor: Any, tmp_path: Path) -> None:
    """The function's error still arrives."""
    own = {"error_log_file": str(tmp_path / "no" / "such" / "folder" / "file")}
    error = executor.submit(fail, "real", resource_dict=own).exception(WAIT)
    assert isinstance(error, CustomError)
    assert "real" in str(error)
    assert executor.submit(add, 1, 2).result(WAIT) == 3


# log_obj_size


def test_sizes_are_logged(make_executor: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    block = random.Random(0).randbytes(50_000)  # which the file of a call cannot make smaller
    with (
        caplog.at_level(logging.WARNING, logger="executorlib"),
        make_executor(log_obj_size=True) as executor,
    ):
        assert executor.submit(identity, block).result(WAIT) == block
    records = [record for record in caplog.records if record.name == "executorlib"]
    assert all(record.levelno == logging.WARNING for record in records)
    sizes = [int(number) for record in records for number in re.findall(r"\d+", record.getMessage())]
    assert len([size for size in sizes if 50_000 <= size < 60_000]) >= 2


def test_sizes_are_not_logged_without_asking(executor: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="executorlib"):
        executor.submit(identity, bytes(50_000)).result(WAIT)
    assert not caplog.records


# Where it was.


@pytest.fixture
def cell() -> Iterator[Callable[[str], dict[str, Any]]]:
    """Runs code as a notebook does: its lines are known to this process alone."""
    names = []

    def run(source: str) -> dict[str, Any]:
        name = f"ipykernel_1/{len(names)}.py"
        names.append(name)
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        namespace: dict[str, Any] = {"__name__": "__main__"}
        exec(compile(source, name, "exec"), namespace)
        return namespace

    yield run
    for name in names:
        del linecache.cache[name]


def test_remote_traceback_of_a_notebook_has_its_lines(executor: Any, cell: Any) -> None:
    inner = cell("def inner(x):\n    return 1 / x  # the culprit\n")["inner"]
    outer = cell("def outer(inner, x):\n\n    return inner(x)  # its caller\n")["outer"]
    remote = str(executor.submit(outer, inner, 0).exception(WAIT).__cause__)
    assert re.search(r'File "ipykernel_1/1.py", line 3, in outer\n    return inner\(x\)  # its caller\n', remote)
    assert re.search(r'File "ipykernel_1/0.py", line 2, in inner\n    return 1 / x  # the culprit\n', remote)


def crash() -> None:
    ctypes.string_at(0)


def crash_below(depth: int) -> None:
    if depth:
        crash_below(depth - 1)
    else:
        crash()


def test_a_crash_says_where_it_was(make_executor: Callable[..., Any]) -> None:
    with make_executor() as executor:
        text = str(executor.submit(crash_below, 40).exception(WAIT))
    assert re.search(r"Segmentation fault(.|\n)*test_errors.py\", line \d+ in crash\n.* in crash_below\n", text)
    assert "executorlib/worker" not in text.partition("most recent call first")[2]


def test_a_time_limit_says_where_it_was(make_executor: Callable[..., Any], tmp_path: Path) -> None:
    began = str(tmp_path / "began")

    def wait_for_ever() -> None:  # takes no module of the tests along, which takes its time to be imported
        import time

        with open(began, "x"):
            time.sleep(1000)

    with make_executor(resource_dict={"run_time_max": 2.5}) as executor:
        error = executor.submit(wait_for_ever).exception(WAIT)
    assert isinstance(error, TimeoutError)
    assert os.path.exists(began)
    assert re.search(r"test_errors.py\", line \d+ in wait_for_ever", str(error))


def test_error_texts_keep_the_innermost_calls_of_a_stack() -> None:
    """The innermost calls and the lines printed before them, without frames of executorlib."""
    told = [f"said {index}" for index in range(30)]
    told += ["Fatal Python error: Segmentation fault", "", "Stack (most recent call first):"]
    told += [f'  File "/home/me/model.py", line {line} in f' for line in range(40)]
    told += ['  File "/opt/lib/executorlib/worker/call.py", line 173 in run', '  File "<string>", line 1 in <module>']
    told += ["", "Extension modules: numpy, scipy (total: 2)"]
    kept = tail_text("\n".join(told).encode()).splitlines()
    assert kept[:5] == [
        "    said 27",
        "    said 28",
        "    said 29",
        "    Fatal Python error: Segmentation fault",
        "    ",
    ]
    assert kept[5:8] == [
        "    Stack (most recent call first):",
        '      File "/home/me/model.py", line 0 in f',
        '      File "/home/me/model.py", line 1 in f',
    ]
    assert len(kept) == 20
    assert tail_text(b"\n".join(b"line %d" % index for index in range(50))).splitlines()[0] == "    line 30"


@pytest.mark.rows(jobs=True)
def test_error_texts_do_not_repeat_each_other(make_executor: Callable[..., Any]) -> None:
    """The queue's own error about a job repeats nothing."""
    with make_executor() as executor:
        text = str(executor.submit(crash).exception(WAIT))
    for once in ("has no result", "Only this call fails", "SIGSEGV"):
        assert text.count(once) == 1, text


# Which call it was.


def notes(error: BaseException) -> str:
    """Notes of an exception; before Python 3.11 its cause has them."""
    return "\n".join(getattr(error, "__notes__", [])) or str(error.__cause__)


def test_the_chain_of_calls_is_named(executor: Any, gate: Callable[..., Gate]) -> None:
    """All calls fail with the first one's exception, which names the chain of inputs."""
    held = gate()
    failing = executor.submit(fail, executor.submit(held, "first"))
    middle = executor.submit(identity, {"in a dict": failing})
    item = get_item_from_future(middle, 0)
    last = executor.submit(identity, item)
    held.open()
    error = last.exception(WAIT)
    assert error is failing.exception(WAIT)
    assert re.search(r"call \d+ of fail -> call \d+ of identity -> call \d+ of identity$", notes(error), re.MULTILINE)
    assert "".join(getattr(pickle.loads(pickle.dumps(error)), "__notes__", [])) in notes(error)


def test_a_long_chain_and_many_dependents(executor: Any, gate: Callable[..., Gate]) -> None:
    """The note stays short, however many calls there are."""
    held = gate()
    chain = [executor.submit(fail, executor.submit(held, "first"))]
    for _ in range(50):
        chain.append(executor.submit(identity, chain[-1]))
    for source in (chain[0], chain[10]):
        chain += [executor.submit(identity, source) for _ in range(20)]
    held.open()
    for future in chain:
        error = future.exception(WAIT)
    assert isinstance(error, CustomError)
    text = notes(error)
    assert "(43 more)" in text
    assert "and 38 more" in text
    assert len(text) < 1500


def test_the_chain_of_an_input_from_elsewhere(executor: Any) -> None:
    other: Future[Any] = Future()
    call = executor.submit(identity, other)
    other.set_exception(CustomError("elsewhere"))
    assert re.search(r"an input -> call \d+ of identity", notes(call.exception(WAIT)))


UNASKED = """
    import logging, gc
    from concurrent.futures import wait

    logging.basicConfig(format="%(name)s %(levelname)s: %(message)s", stream=sys.stdout)

    def bad(text):
        raise ValueError(text)

    def same(x):
        return x

    if __name__ == "__main__":
        with Executor(**OPTIONS) as executor:
            asked = executor.submit(bad, "asked before")
            assert asked.exception() is not None
            wait([executor.submit(bad, "forgotten")])
            executor.submit(same, executor.submit(bad, "input"))
            later = executor.submit(bad, "asked later")
            kept = executor.submit(bad, "kept")
            cancelled = executor.submit(bad, "cancelled").cancel()
        print("after the executor", flush=True)
        assert later.exception() is not None
"""


def test_unasked_failures_are_reported_once(row: Any, scripts: Any) -> None:
    """At the executor's end if their futures are gone by then, otherwise at exit, unless somebody has asked."""
    told = scripts.run(UNASKED, row.arguments())
    before, _, after = told.partition("after the executor")
    assert re.search(r"executorlib WARNING: .* failed, and nobody has asked for the result", before)
    assert re.search(r"call \d+ of same: ValueError: input", before)
    assert "of bad: ValueError: input" not in told
    assert told.count("ValueError: forgotten") == 1
    assert told.count("ValueError: kept") == 1
    assert "ValueError: kept" in after
    assert "ValueError: asked" not in told


UNASKED_BUT_USED = """
    import logging
    from executorlib import get_item_from_future
    from executorlib.futures.derived import batched

    logging.basicConfig(format="%(message)s", stream=sys.stdout)

    def bad(text):
        raise ValueError(text)

    if __name__ == "__main__":
        with Executor(**OPTIONS) as executor:
            get_item_from_future(executor.submit(bad, "lost item"), 0)
            batched([executor.submit(bad, "lost group")], 1)
            item = get_item_from_future(executor.submit(bad, "item asked later"), 0)
            (group,) = batched([executor.submit(bad, "group asked later")], 1)
            source = executor.submit(bad, "source asked")
            unread = get_item_from_future(source, 0)
            get_item_from_future(source, 1).cancel()
            assert source.exception() is not None
        print("after the executor", flush=True)
        assert item.exception() is not None
        assert group.exception() is not None
"""


@pytest.mark.rows("fork", "block-fork")
def test_failures_of_inputs_of_derived_futures_are_reported(row: Any, scripts: Any) -> None:
    """Items and groups share the failure: it is reported unless somebody asks one of them, or the call itself."""
    told = scripts.run(UNASKED_BUT_USED, row.arguments())
    assert told.count("ValueError: lost item") == 1
    assert told.count("ValueError: lost group") == 1
    assert "asked" not in told.replace("nobody has asked", "")


@pytest.mark.rows("fork", "block-fork")
def test_failed_input_of_a_cancelled_call_is_reported(
    make_executor: Callable[..., Any], gate: Callable[..., Gate], caplog: Any
) -> None:
    """No other future would report it."""
    held = gate()

    def bad() -> None:
        held(0)
        raise ValueError("lost input")

    with make_executor(max_workers=1) as executor:
        source = executor.submit(bad)
        assert executor.submit(fail, source).cancel()
        del source
        held.open()
    assert "ValueError: lost input" in caplog.text


@pytest.mark.rows("fork")
def test_many_unasked_failures(make_executor: Callable[..., Any], caplog: Any) -> None:
    with make_executor(block_allocation=True) as executor:
        wait([executor.submit(fail, index) for index in range(300)])
    (record,) = [record for record in caplog.records if record.name == "executorlib"]
    text = record.getMessage()
    assert text.startswith("300 calls failed")
    assert text.endswith("and 295 more")
    assert len(text) < 1500
