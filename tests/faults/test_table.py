"""The fault table: every way to fail, at every place on a call's way, in every kind of worker.

Each time the call's own future says what happened, others never notice, and the executor works on.
"""

from __future__ import annotations

import os
import re
import signal
import socket
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Future
from pathlib import Path
from typing import Any

import pytest

from contract.functions import CustomError, Gate, add, identity, wait_for
from executorlib.api import ExecutorlibSocketError
from faults.functions import (
    LAST_WORDS,
    FaultAtPickling,
    FaultAtUnpickling,
    Unloadable,
    strike,
)

WAIT = 30
pytestmark = [pytest.mark.linux, pytest.mark.rows(live=True)]

# For each fault: what the future may hold, what the text must name.
DEATHS: dict[str, tuple[str, ...]] = {
    "segfault": ("SIGSEGV",),
    "os._exit": ("code 7",),
    "SIGKILL": ("SIGKILL",),
}
ERRORS: dict[str, type[BaseException]] = {
    "sys.exit": ExecutorlibSocketError,
    "out of memory": MemoryError,
    "raise": CustomError,
}
FAULTS = [*DEATHS, *ERRORS]


def call(place: str, fault: str, path: str) -> tuple[Any, ...]:
    """A function and its arguments that meet the fault at this place."""
    return {
        "unpickling the call": (identity, FaultAtUnpickling(fault, path)),
        "running": (strike, fault, path),
        "pickling the result": (FaultAtPickling, fault, path),
    }[place]


PLACES = ["unpickling the call", "running", "pickling the result"]


def submit(executor: Any, place: str, fault: str, path: Path, **kwargs: Any) -> Future[Any]:
    future: Future[Any] = executor.submit(*call(place, fault, str(path)), **kwargs)
    if fault == "SIGKILL":
        os.kill(int(wait_for(path)), signal.SIGKILL)
    return future


def check(error: BaseException | None, fault: str, place: str, where: str) -> None:
    """Return whether this is an error that helps users."""
    if fault in DEATHS:
        assert isinstance(error, BrokenExecutor)
        assert type(error).__name__ == "ExecutorlibSocketError"
        text = str(error)
        for named in DEATHS[fault]:
            assert named in text
        assert re.search(rf"process \d+ on {where}\b", text)
        assert LAST_WORDS in text
        return
    assert error is not None
    if isinstance(error, BrokenExecutor) and fault != "sys.exit":
        # The worker could not report any more: fine on the way, and where no memory is left.
        assert place != "running" or fault == "out of memory"
        return
    shown = f"{error!r} {error} {error.__cause__}"
    assert (fault if fault == "sys.exit" else ERRORS[fault].__name__) in shown
    assert isinstance(error, Exception)
    if place == "running":
        assert isinstance(error, ERRORS[fault])


@pytest.mark.essential
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("place", PLACES)
def test_fault(
    make_executor: Callable[..., Any],
    row: Any,
    gate: Callable[..., Gate],
    tmp_path: Path,
    place: str,
    fault: str,
) -> None:
    held = gate("bystander")
    with make_executor(**row.spare) as executor:
        bystander = executor.submit(held, "unharmed")
        held.pid()
        struck = submit(executor, place, fault, tmp_path / "pid")
        dependent = executor.submit(add, struck, 1)
        error = struck.exception(WAIT)
        after = executor.submit(add, 1, 2).result(WAIT)
        held.open()
        assert bystander.result(WAIT) == "unharmed"
        assert after == 3
        assert dependent.exception(WAIT) is error
        check(error, fault, place, row.where)


@pytest.mark.rows(start="fork")
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("place", PLACES)
def test_fault_in_the_only_worker(
    make_executor: Callable[..., Any], row: Any, tmp_path: Path, place: str, fault: str
) -> None:
    """Calls that wait behind the one that fails run, and none of them is lost."""
    options = {"restart_limit": 1} if row.block else {}
    with make_executor(max_workers=1, **options) as executor:
        list(executor.map(abs, range(2)))
        before = [executor.submit(add, i, 1) for i in range(3)]
        struck = submit(executor, place, fault, tmp_path / "pid")
        after = [executor.submit(add, i, 1) for i in range(3)]
        check(struck.exception(WAIT), fault, place, row.where)
        assert [future.result(WAIT) for future in before + after] == [1, 2, 3] * 2


@pytest.mark.mpi
@pytest.mark.rows("fork")
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("place", PLACES)
def test_fault_in_ranks(make_executor: Callable[..., Any], tmp_path: Path, place: str, fault: str) -> None:
    """Whichever rank dies, the launcher exits, the call fails and the world ends."""
    with make_executor(max_cores=3) as executor:
        struck = submit(executor, place, fault, tmp_path / "pid", resource_dict={"cores": 2})
        error = struck.exception(WAIT)
        assert error is not None
        if fault in DEATHS:
            assert isinstance(error, BrokenExecutor)
            assert socket.gethostname() in str(error)
        elif place == "running" and fault != "out of memory":
            assert isinstance(error, ERRORS[fault])
        assert executor.submit(add, 1, 2).result(WAIT) == 3


PARENT_ERRORS = [CustomError("loading"), SystemExit(5), KeyboardInterrupt(), MemoryError()]


@pytest.mark.parametrize("error", PARENT_ERRORS, ids=lambda error: type(error).__name__)
def test_result_that_fails_in_the_users_process(make_executor: Callable[..., Any], error: BaseException) -> None:
    """Even an exception that would end a thread or the program is only this future's error."""
    with make_executor() as executor:
        bad = executor.submit(Unloadable, error)
        seen = bad.exception(WAIT)
        assert seen is not None
        assert type(error).__name__ in f"{seen!r} {seen} {seen.__cause__!r}"
        assert executor.submit(add, 1, 2).result(WAIT) == 3


@pytest.mark.mpi
@pytest.mark.rows("fork")
def test_result_of_ranks_that_fails_in_the_users_process(
    make_executor: Callable[..., Any],
) -> None:
    with make_executor(max_cores=2) as executor:
        bad = executor.submit(Unloadable, CustomError("loading"), resource_dict={"cores": 2})
        assert "loading" in str(bad.exception(WAIT))
        assert executor.submit(add, 1, 2).result(WAIT) == 3
