"""The states of a call, its record, and its future."""

from __future__ import annotations

import functools
import gc
import itertools
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from executorlib.core.task import (
    CANCELLED,
    DONE,
    FAILED,
    LAUNCHING,
    LEGAL_MOVES,
    READY,
    RUNNING,
    WAITING,
    CallFuture,
    State,
    Task,
    function_name,
)
from executorlib.resources import Demand, Resources

# Written out a second time: who changes the table must want to.
MOVES = {
    (WAITING, READY),
    (WAITING, DONE),
    (WAITING, FAILED),
    (WAITING, CANCELLED),
    (READY, LAUNCHING),
    (READY, RUNNING),
    (READY, FAILED),
    (READY, CANCELLED),
    (LAUNCHING, RUNNING),
    (LAUNCHING, READY),
    (LAUNCHING, FAILED),
    (LAUNCHING, CANCELLED),
    (RUNNING, READY),
    (RUNNING, DONE),
    (RUNNING, FAILED),
    (RUNNING, CANCELLED),
}


def make(fn: Callable[..., Any] = abs, *args: Any, **kwargs: Any) -> Task:
    return Task(7, fn, args, kwargs, Future(), Resources(), Demand(1))


def test_table_of_moves() -> None:
    assert set(LEGAL_MOVES) == set(State)
    assert {(before, after) for before, moves in LEGAL_MOVES.items() for after in moves} == MOVES


@pytest.mark.parametrize(
    ("before", "after"),
    [pytest.param(*pair, id=f"{pair[0].name}-{pair[1].name}") for pair in itertools.product(State, State)],
)
def test_move(before: State, after: State) -> None:
    """Legal moves change the state; all others raise, and leave it."""
    task = make()
    task.state = before
    if (before, after) in MOVES:
        task.move(after)
        assert task.state is after
    else:
        with pytest.raises(RuntimeError, match=f"(?i)call 7 of abs, {before.name}.*illegal move to {after.name}"):
            task.move(after)
        assert task.state is before


@pytest.mark.parametrize("state", State, ids=lambda state: state.name)
def test_over(state: State) -> None:
    task = make()
    task.state = state
    assert task.over == (state in (DONE, FAILED, CANCELLED))


def test_new_call() -> None:
    task = make(divmod, 7, 2)
    assert task.state is WAITING
    assert (task.missing, task.announced, task.cache_path) == (0, False, None)
    assert repr(task) == "<call 7 of divmod, waiting>"


def test_release_keeps_nothing_of_the_call() -> None:
    class Thing:
        def __call__(self, *args: object, **kwargs: object) -> None: ...

    function, argument, keyword = Thing(), Thing(), Thing()
    task = make(function, argument, key=keyword)
    references = [weakref.ref(each) for each in (function, argument, keyword)]
    del function, argument, keyword
    task.release()
    gc.collect()
    assert [reference() for reference in references] == [None] * 3
    assert repr(task) == "<call 7 of NoneType, waiting>"


class Callee:
    def __call__(self, *args: object) -> None: ...

    def method(self) -> None: ...


@pytest.mark.parametrize(
    ("fn", "name"),
    [
        (make, "make"),
        (Callee.method, "Callee.method"),
        (Callee().method, "Callee.method"),
        (Callee(), "Callee"),
        (Callee, "Callee"),
        (len, "len"),
        (time.sleep, "sleep"),
        ([].append, "list.append"),
        (functools.partial(abs, 1), "partial of abs"),
        (functools.partial(functools.partial(Callee(), 1), 2), "partial of Callee"),
        (functools.lru_cache(make), "make"),
        (lambda: None, "<lambda>"),
    ],
)
def test_function_name(fn: object, name: str) -> None:
    assert function_name(fn) == name


# The future.


def test_the_future_shows_what_a_standard_future_shows() -> None:
    """The executor's notes are not public attributes of the user's future."""
    assert {name for name in dir(CallFuture()) if name[0] != "_"} == {name for name in dir(Future()) if name[0] != "_"}


def test_cancel_tells_at_once() -> None:
    told: list[bool] = []
    future = CallFuture()
    future._on_cancel = lambda: told.append(future.cancelled())
    assert future.cancel()
    assert told == [True]  # and only once it is cancelled


def test_cancel_that_comes_too_late_is_not_reported() -> None:
    told: list[str] = []
    future = CallFuture()
    future._on_cancel = lambda: told.append("cancelled")
    assert future.set_running_or_notify_cancel()
    assert not future.cancel()
    future.set_result(1)
    assert not future.cancel()
    assert told == []


def test_cancel_without_an_executor() -> None:
    future = CallFuture()
    assert future.cancel()
    assert future.cancelled()


def test_cancel_tells_although_its_callback_lets_go_of_the_executor() -> None:
    """The executor forgets a finished future, maybe while the future is being cancelled."""
    told: list[str] = []
    future = CallFuture()

    def forget(_: Future[Any]) -> None:
        future._on_cancel = None

    future._on_cancel = lambda: told.append("cancelled")
    future.add_done_callback(forget)
    assert future.cancel()
    assert told == ["cancelled"]
