"""A user's code may fork and return in both processes: only the process that was given the call counts."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from contract.functions import Gate, fail, lines, record, wait_until_gone

WAIT = 30
pytestmark = [pytest.mark.cache, pytest.mark.essential, pytest.mark.long]


class Forking:
    """A forked copy waits until it is let go and then comes back, one way or another."""

    def __init__(self, held: Gate, way: str, log: str) -> None:
        self.held = held
        self.way = way
        self.log = log

    def both(self) -> str:
        if os.fork():
            return "parent"
        self.held()
        if self.way == "raises":
            fail("in the copy")
        if self.way == "exits":
            sys.exit(3)
        return "copy"

    def __call__(self, *args: Any) -> Any:
        record(self.log, "ran")
        atexit.register(record, self.log, "exit handler")
        if self.way == "is unpickled":
            return args[0]
        return Result(self) if self.way == "is pickled" else self.both()


class Argument:
    """Forks where it is unpickled."""

    def __init__(self, forking: Forking) -> None:
        self.forking = forking

    def __reduce__(self) -> Any:
        return Forking.both, (self.forking,)


class Result:
    """Forks where it is pickled."""

    def __init__(self, forking: Forking) -> None:
        self.forking = forking

    def __reduce__(self) -> Any:
        return str, (self.forking.both(),)


@pytest.mark.parametrize("way", ["returns", "raises", "exits", "is unpickled", "is pickled"])
def test_call_that_forks_and_returns_twice_answers_once(
    make_executor: Callable[..., Any], row: Any, gate: Callable[..., Gate], tmp_path: Path, way: str
) -> None:
    """The copy neither answers nor leaves anything in the cache or the error log, and runs no exit handler."""
    held, log, errors = gate(), str(tmp_path / "log"), tmp_path / "errors"
    forking = Forking(held, way, log)
    arguments = [Argument(forking)] if way == "is unpickled" else []
    options = {"cache_directory": tmp_path / "store", "resource_dict": {"error_log_file": errors}, "max_workers": 1}
    with make_executor(**options) as executor:
        assert executor.submit(forking, *arguments).result(WAIT) == "parent"
        copies = held.pids(1)
        held.open()
        wait_until_gone(*copies)
        assert [executor.submit(record, log, i).result(WAIT) for i in range(3)] == [0, 1, 2]
    assert lines(log).count("ran") == 1
    assert lines(log).count("exit handler") <= 1  # the worker's own, where it was not ended before
    with make_executor(**options) as executor:
        assert executor.submit(forking, *arguments).result(WAIT) == "parent"
    assert not errors.exists()


@pytest.mark.rows(block=True)
def test_init_function_that_forks_and_returns_twice(
    make_executor: Callable[..., Any], gate: Callable[..., Gate], tmp_path: Path
) -> None:
    """The copy does not become a worker."""
    held = gate()
    forking = Forking(held, "returns", str(tmp_path / "log"))

    def initialize() -> dict[str, Any]:
        return {"who": forking.both()}

    def say(number: int, who: str) -> tuple[int, str]:
        return number, who

    with make_executor(max_workers=1, init_function=initialize) as executor:
        assert executor.submit(say, 0).result(WAIT) == (0, "parent")
        held.open()
        wait_until_gone(*held.pids(1))
        assert [executor.submit(say, i).result(WAIT) for i in range(5)] == [(i, "parent") for i in range(5)]
