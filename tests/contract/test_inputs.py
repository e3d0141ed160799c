"""Futures among the inputs are waited for and replaced by their results."""

from __future__ import annotations

import threading
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any

import pytest

from contract.functions import (
    CustomError,
    Frozen,
    Gate,
    Pair,
    Record,
    add,
    fail,
    identity,
    keywords,
    total,
)
from executorlib import split_future

WAIT = 30


def outcome(future: Future[Any]) -> Any:
    """Wait for what a future ends with, a result or an exception."""
    try:
        return future.result(WAIT)
    except (Exception, CancelledError) as error:
        return error


def done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


def test_positional_and_keyword(executor: Any) -> None:
    one = executor.submit(add, 1, 0)
    two = executor.submit(add, one, b=one)
    assert executor.submit(add, two, b=two).result(WAIT) == 4


def nested(future: Any) -> dict[str, Any]:
    return {
        "list": [1, future],
        "tuple": (future, 1),
        "set": {future},
        "frozenset": frozenset([future]),
        "value of a dict": {"a": future},
        "key of a dict": {future: "a"},
        "named tuple": Pair(1, future),
        "dataclass": Record("a", future),
        "frozen dataclass": Frozen(future),
        "defaultdict": defaultdict(list, a=future),
        "OrderedDict": OrderedDict(a=future),
        "deep": [({"a": [Record("b", {"c": Pair(future, Frozen([future]))})]},)],
        "twice": [future, future],
    }


@pytest.mark.parametrize("kind", nested(None))
def test_in_a_container(executor: Any, kind: str) -> None:
    expected = nested(7)[kind]
    result = executor.submit(identity, nested(executor.submit(add, 3, 4))[kind]).result(WAIT)
    assert result == expected
    assert type(result) is type(expected)


def test_defaultdict_keeps_its_factory(executor: Any) -> None:
    result = executor.submit(identity, defaultdict(list, a=done(1))).result(WAIT)
    assert result["missing"] == []


def test_containers_of_the_user_are_not_changed(executor: Any) -> None:
    future = done(1)
    given: dict[str, Any] = {"a": [future], "b": Record("c", future)}
    assert executor.submit(identity, given).result(WAIT) == {"a": [1], "b": Record("c", 1)}
    assert given == {"a": [future], "b": Record("c", future)}


def test_containers_without_futures_stay_as_they_are(executor: Any) -> None:
    """Two arguments that share an object share it in the call, too."""
    shared = [1]

    def same(a: Any, b: Any) -> bool:
        return a[0] is b[0]

    assert executor.submit(same, [shared], (shared,)).result(WAIT)


def test_dataclass_with_fields_outside_its_constructor(executor: Any) -> None:
    """Fields that the constructor does not take survive, and so do attributes set later."""
    import dataclasses

    @dataclasses.dataclass
    class Grid:
        values: Any
        size: int = dataclasses.field(init=False, default=0)

        def __post_init__(self) -> None:
            self.size = 42

    grid = Grid(done(5))
    grid.size = 43
    result = executor.submit(identity, grid).result(WAIT)
    assert (result.values, result.size) == (5, 43)


def test_future_in_a_container_that_is_not_searched(executor: Any) -> None:
    """Other containers are the user's own. A future in one cannot be pickled, which fails the call."""
    pending: Future[int] = Future()
    error = executor.submit(identity, deque([pending])).exception(WAIT)
    assert error is not None
    assert executor.submit(add, 1, 2).result(WAIT) == 3


@pytest.mark.essential
def test_foreign_futures(executor: Any) -> None:
    late: Future[int] = Future()
    with ThreadPoolExecutor(1) as pool:
        result = executor.submit(total, late, pool.submit(add, 1, 2), done(4))
        assert not result.done()
        late.set_result(100)
        assert result.result(WAIT) == 107


def test_futures_of_another_executor(executor: Any, make_executor: Callable[..., Any]) -> None:
    with make_executor() as other:
        there = other.submit(add, 1, 2)
        back = executor.submit(add, there, 1)
        assert other.submit(add, back, there).result(WAIT) == 7


def test_submit_never_blocks(executor: Any) -> None:
    late: Future[int] = Future()
    futures = [executor.submit(add, late, i) for i in range(10)]
    # Calls that wait for inputs take nobody's place.
    assert executor.submit(add, 1, 2).result(WAIT) == 3
    assert not any(future.done() or future.running() for future in futures)
    late.set_result(1)
    assert [future.result(WAIT) for future in futures] == [1 + i for i in range(10)]


def test_result_of_an_input_may_be_a_container(executor: Any) -> None:
    assert executor.submit(total, *[executor.submit(identity, i) for i in range(3)]).result(WAIT) == 3
    listed = executor.submit(identity, [1, 2])
    assert executor.submit(identity, {"a": listed}).result(WAIT) == {"a": [1, 2]}


def test_none_as_the_result_of_an_input(executor: Any) -> None:
    assert executor.submit(identity, executor.submit(identity, None)).result(WAIT) is None


def test_exception_object_as_the_result_of_an_input(executor: Any) -> None:
    result = executor.submit(identity, done(ValueError("a value"))).result(WAIT)
    assert isinstance(result, ValueError)


@pytest.mark.essential
def test_failed_input(executor: Any) -> None:
    bad = executor.submit(fail, "first")
    second = executor.submit(add, bad, 1)
    third = executor.submit(keywords, deep=[{"x": second}])
    for future in (second, third):
        with pytest.raises(CustomError, match="first"):
            future.result(WAIT)
    assert third.exception() is bad.exception()


def test_failed_input_fails_the_call_at_once(executor: Any) -> None:
    """Other inputs that are still under way are not waited for."""
    late: Future[int] = Future()
    bad: Future[int] = Future()
    call = executor.submit(total, late, bad)
    bad.set_exception(CustomError("first"))
    with pytest.raises(CustomError, match="first"):
        call.result(WAIT)
    late.set_result(1)
    assert executor.submit(add, 1, 2).result(WAIT) == 3


def test_input_that_had_failed_before(executor: Any) -> None:
    bad: Future[int] = Future()
    bad.set_exception(CustomError("before"))
    with pytest.raises(CustomError, match="before"):
        executor.submit(add, bad, 1).result(WAIT)


def test_cancelled_input(executor: Any) -> None:
    before: Future[int] = Future()
    before.cancel()
    later: Future[int] = Future()
    first = executor.submit(add, before, 1)
    second = executor.submit(add, later, 1)
    third = executor.submit(add, second, 1)
    later.cancel()
    for future in (first, second, third):
        with pytest.raises(CancelledError):
            future.result(WAIT)


@pytest.mark.essential
def test_cancelling_a_call_that_waits_for_inputs(executor: Any) -> None:
    late: Future[int] = Future()
    call = executor.submit(add, late, 1)
    dependent = executor.submit(add, call, 1)
    assert call.cancel()
    assert call.cancelled()
    with pytest.raises(CancelledError):
        dependent.result(WAIT)
    late.set_result(1)
    assert executor.submit(add, 1, 2).result(WAIT) == 3


def test_base_exception_of_an_input(executor: Any) -> None:
    bad: Future[int] = Future()
    call = executor.submit(add, bad, 1)
    bad.set_exception(KeyboardInterrupt())
    assert isinstance(call.exception(WAIT), KeyboardInterrupt)
    assert executor.submit(add, 1, 2).result(WAIT) == 3


@pytest.mark.essential
def test_diamond(executor: Any) -> None:
    top = executor.submit(add, 1, 0)
    left = executor.submit(add, top, 1)
    right = executor.submit(add, top, 2)
    assert executor.submit(add, left, right).result(WAIT) == 5


def test_long_chain(executor: Any, row: Any) -> None:
    length = 500 if row.block else row.many
    future = executor.submit(identity, 0)
    for _ in range(length):
        future = executor.submit(add, future, 1)
    assert future.result(WAIT) == length


def test_failure_runs_down_a_long_chain(executor: Any) -> None:
    """Thousands of dependants fail without deep recursion."""
    late: Future[int] = Future()
    futures = [executor.submit(add, late, 1)]
    for _ in range(3000):
        futures.append(executor.submit(add, futures[-1], 1))
    late.set_exception(CustomError("first"))
    with pytest.raises(CustomError):
        futures[-1].result(WAIT)
    assert all(future.done() for future in futures)


@pytest.mark.essential
def test_two_layers(executor: Any, row: Any) -> None:
    width = row.many
    first = [executor.submit(add, i, 0) for i in range(width)]
    second = [executor.submit(add, future, 1) for future in first]
    assert executor.submit(total, *second).result(WAIT) == sum(range(width)) + width


def test_one_input_of_many_calls(executor: Any, row: Any) -> None:
    source = executor.submit(identity, 5)
    futures = [executor.submit(add, source, i) for i in range(row.many)]
    assert [future.result(WAIT) for future in futures] == [5 + i for i in range(row.many)]


def test_inputs_that_finish_in_other_threads_while_submitting(executor: Any, row: Any) -> None:
    sources: list[Future[int]] = [Future() for _ in range(row.many)]
    thread = threading.Thread(target=lambda: [future.set_result(1) for future in sources])
    thread.start()
    calls = [executor.submit(add, future, 1) for future in sources]
    thread.join()
    assert [call.result(WAIT) for call in calls] == [2] * row.many


def test_disable_dependencies(make_executor: Callable[..., Any]) -> None:
    with make_executor(disable_dependencies=True) as executor:
        assert executor.submit(add, 1, 2).result(WAIT) == 3
        for future in (
            executor.submit(add, done(1), 2),
            executor.submit(add, 1, b=Future()),
            executor.submit(identity, [{"a": done(1)}]),
        ):
            error = future.exception(WAIT)
            assert isinstance(error, ValueError)
            assert "disable_dependencies" in str(error)
        assert executor.submit(add, 1, 2).result(WAIT) == 3


def test_inputs_are_waited_for_at_exit_of_the_block(
    make_executor: Callable[..., Any], gate: Callable[..., Gate]
) -> None:
    held = gate()
    with make_executor() as executor:
        first = executor.submit(held, 1)
        second = executor.submit(add, first, 1)
        held.open()
    assert second.done()
    assert second.result() == 2


def test_foreign_input_that_is_done_after_shutdown(make_executor: Callable[..., Any], row: Any) -> None:
    """Submitted calls finish even if an input comes later, or their futures say that they will not."""
    late: Future[int] = Future()
    with make_executor() as executor:
        call = executor.submit(add, late, 1)
        executor.shutdown(wait=False)
        late.set_result(1)
        if row.jobs:
            # Nobody is left to make a job of it.
            assert isinstance(outcome(call), CancelledError)
        else:
            assert outcome(call) == 2


# Callbacks of inputs that raise what is no Exception: a future of the standard library then skips its other callbacks.


def leave(_: Future[Any]) -> None:
    raise SystemExit("a callback has had enough")


def leave_on(future: Future[Any]) -> Future[Any]:
    future.add_done_callback(leave)
    return future


@pytest.mark.parametrize("kind", ["own", "foreign"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_callback_that_exits_keeps_no_call_waiting(
    make_executor: Callable[..., Any], gate: Callable[..., Gate], kind: str, when: str
) -> None:
    held = gate()
    executor = make_executor()
    source: Future[Any] = executor.submit(held, [1, 2]) if kind == "own" else Future()
    started = executor.submit(held, 0)
    if when == "before":
        leave_on(source)
    items = [leave_on(item) for item in split_future(source, 2)]
    [group] = executor.batched([source], 1)
    leave_on(group)
    dependents = [executor.submit(identity, [each]) for each in (source, *items, group)]
    held.pids(2 if kind == "own" else 1)  # the loop has taken what was submitted, so the callbacks are in place
    if when == "after":
        leave_on(source)
    held.open()
    if kind == "foreign":
        with pytest.raises(SystemExit):
            source.set_result([1, 2])
    assert [each.result(WAIT) for each in dependents] == [[[1, 2]], [1], [2], [[[1, 2]]]]
    assert started.result(WAIT) == 0
    executor.shutdown()


def test_callback_that_exits_when_its_call_is_cancelled(
    make_executor: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """The call is given up anyway, whoever cancels it, and `shutdown` returns."""
    executor = make_executor()
    never: Future[Any] = Future()
    first, second = (leave_on(executor.submit(identity, never)) for _ in range(2))
    dependent = executor.submit(identity, first)
    with pytest.raises(SystemExit):
        first.cancel()
    with pytest.raises(CancelledError):
        dependent.result(WAIT)
    executor.shutdown(cancel_futures=True)
    assert first.cancelled()
    assert second.cancelled()
    assert "a callback of a future raised" in caplog.text
