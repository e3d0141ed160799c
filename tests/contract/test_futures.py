"""The executor's futures behave as the standard library documents."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, FIRST_EXCEPTION, CancelledError, Future
from pathlib import Path
from typing import Any

import pytest

from contract.functions import CustomError, Gate, add, fail, identity, lines, record, until

WAIT = 30


@pytest.mark.essential
def test_states(executor: Any, gate: Callable[..., Gate]) -> None:
    held = gate()
    future = executor.submit(held, 1)
    held.pid()
    until(future.running)  # a queuing system says so some time later
    assert not future.done()
    with pytest.raises(concurrent.futures.TimeoutError):
        future.result(timeout=0.01)
    with pytest.raises(concurrent.futures.TimeoutError):
        future.exception(timeout=0.01)
    held.open()
    assert future.result(WAIT) == 1
    assert future.done()
    assert not future.running()
    assert not future.cancelled()
    assert future.exception() is None


@pytest.mark.essential
def test_callbacks(executor: Any, gate: Callable[..., Gate]) -> None:
    held = gate()
    called: list[Any] = []
    all_called = threading.Event()
    future = executor.submit(held, 1)
    future.add_done_callback(lambda done: called.append(("first", done.result())))
    future.add_done_callback(lambda done: (called.append("second"), all_called.set()))
    assert not called
    held.open()
    assert all_called.wait(WAIT)
    assert called == [("first", 1), "second"]
    future.add_done_callback(lambda done: called.append(done is future))
    assert called[-1] is True


def test_callbacks_of_failed_calls(executor: Any) -> None:
    called: list[BaseException | None] = []
    seen = threading.Event()
    future = executor.submit(fail, "x")
    future.add_done_callback(lambda done: (called.append(done.exception()), seen.set()))
    assert seen.wait(WAIT)
    assert isinstance(called[0], CustomError)


@pytest.mark.parametrize("error", [ValueError, CustomError])
def test_callback_that_raises(executor: Any, caplog: pytest.LogCaptureFixture, error: type[Exception]) -> None:
    """The standard library logs it; later callbacks and calls go on."""
    seen = threading.Event()

    def bad(_future: Future[Any]) -> None:
        raise error("in a callback")

    with caplog.at_level(logging.ERROR, logger="concurrent.futures"):
        source: Future[int] = Future()
        future = executor.submit(add, source, 1)
        future.add_done_callback(bad)
        future.add_done_callback(lambda _: seen.set())
        source.set_result(1)
        assert seen.wait(WAIT)
    assert "in a callback" in caplog.text
    assert executor.submit(add, 1, 2).result(WAIT) == 3


def test_submit_in_a_callback(executor: Any) -> None:
    final: Future[int] = Future()

    def again(done: Future[int]) -> None:
        if done.result() == 5:
            final.set_result(5)
        else:
            executor.submit(add, done.result(), 1).add_done_callback(again)

    executor.submit(add, 0, 0).add_done_callback(again)
    assert final.result(WAIT) == 5


def test_cancel_in_a_callback(make_executor: Callable[..., Any], row: Any, gate: Callable[..., Gate]) -> None:
    held = gate()
    cancelled: Future[bool] = Future()
    with make_executor(max_workers=1) as executor:
        first = executor.submit(held)
        rest = [executor.submit(add, i, 1) for i in range(row.backlog)]
        first.add_done_callback(lambda _: cancelled.set_result(rest[-1].cancel()))
        held.open()
        assert cancelled.result(WAIT)


def test_shutdown_in_a_callback(make_executor: Callable[..., Any]) -> None:
    """It may wait or complain, but nothing hangs and submitted calls finish."""
    executor = make_executor()
    source: Future[int] = Future()
    future = executor.submit(add, source, 1)
    other = executor.submit(add, source, 2)
    future.add_done_callback(lambda _: executor.shutdown(wait=True))
    logging.getLogger("concurrent.futures").disabled = True
    try:
        source.set_result(1)
        assert (future.result(WAIT), other.result(WAIT)) == (2, 3)
        executor.shutdown()
    finally:
        logging.getLogger("concurrent.futures").disabled = False


def test_wait(executor: Any, gate: Callable[..., Gate]) -> None:
    held = gate()
    slow = executor.submit(held, 1)
    quick = executor.submit(add, 1, 2)
    first = concurrent.futures.wait([slow, quick], WAIT, return_when=FIRST_COMPLETED)
    assert first.done == {quick}
    assert concurrent.futures.wait([slow], timeout=0.01).not_done == {slow}
    bad = executor.submit(fail)
    failed = concurrent.futures.wait([slow, bad], WAIT, return_when=FIRST_EXCEPTION)
    assert failed.done == {bad}
    held.open()
    assert concurrent.futures.wait([slow, quick, bad], WAIT).not_done == set()


def test_as_completed(executor: Any, gate: Callable[..., Gate]) -> None:
    held = gate()
    slow = executor.submit(held, "slow")
    quick = [executor.submit(identity, i) for i in range(5)]
    order = []
    for future in concurrent.futures.as_completed([slow, *quick], WAIT):
        order.append(future)
        if len(order) == 5:
            held.open()
    assert order[-1] is slow
    assert set(order[:5]) == set(quick)


def test_as_completed_times_out(executor: Any, gate: Callable[..., Gate]) -> None:
    held = gate()
    future = executor.submit(held)
    with pytest.raises(concurrent.futures.TimeoutError):
        list(concurrent.futures.as_completed([future], timeout=0.05))
    held.open()
    future.result(WAIT)


def test_await(executor: Any) -> None:
    async def main() -> list[Any]:
        loop = asyncio.get_running_loop()
        wrapped = asyncio.wrap_future(executor.submit(add, 1, 2))
        in_executor = loop.run_in_executor(executor, add, 3, 4)
        failing = asyncio.wrap_future(executor.submit(fail, "awaited"))
        results: list[Any] = list(await asyncio.gather(wrapped, in_executor))
        with pytest.raises(CustomError, match="awaited"):
            await failing
        return results

    assert asyncio.run(main()) == [3, 7]


# Cancelling.


@pytest.mark.rows(block=False)
def test_cancel_before_start(make_executor: Callable[..., Any], gate: Callable[..., Gate], tmp_path: Path) -> None:
    held, log = gate(), tmp_path / "log"
    with make_executor(max_workers=1) as executor:
        first = executor.submit(held, 1)
        held.pid()
        waiting = [executor.submit(record, log, i) for i in range(4)]
        assert waiting[1].cancel()
        assert waiting[1].cancelled()
        assert waiting[1].done()
        assert not waiting[1].running()
        with pytest.raises(CancelledError):
            waiting[1].result(WAIT)
        held.open()
        assert first.result(WAIT) == 1
    assert lines(log) == ["0", "2", "3"]


def test_cancel_calls_that_were_not_handed_out(
    make_executor: Callable[..., Any], row: Any, gate: Callable[..., Gate], tmp_path: Path
) -> None:
    """Workers may hold a few more calls than they run; calls queued behind those can be cancelled."""
    held, log = gate(), tmp_path / "log"
    with make_executor() as executor:
        first = [executor.submit(held, i) for i in range(2)]
        held.pids(2)
        waiting = [executor.submit(record, log, i) for i in range(row.backlog)]
        cancelled = [i for i, future in enumerate(waiting) if future.cancel()]
        assert len(cancelled) > row.backlog / 2
        assert set(cancelled) == {i for i, future in enumerate(waiting) if future.cancelled()}
        held.open()
        for future in first:
            future.result(WAIT)
    assert not {int(line) for line in lines(log)} & set(cancelled)
    assert all(future.done() for future in waiting)


def test_cancel_calls_back(make_executor: Callable[..., Any], row: Any, gate: Callable[..., Gate]) -> None:
    held = gate()
    called: list[bool] = []
    with make_executor() as executor:
        for i in range(2):
            executor.submit(held, i)
        held.pids(2)
        last = [executor.submit(add, i, 1) for i in range(row.backlog)][-1]
        last.add_done_callback(lambda future: called.append(future.cancelled()))
        assert last.cancel()
        assert called == [True]
        assert concurrent.futures.wait([last], WAIT).done == {last}
        held.open()


@pytest.mark.essential
def test_a_running_call_cannot_be_cancelled(executor: Any, gate: Callable[..., Gate]) -> None:
    held = gate()
    future = executor.submit(held, 1)
    until(future.running, WAIT)
    assert not future.cancel()
    assert not future.cancelled()
    held.open()
    assert future.result(WAIT) == 1
    assert not future.cancel()


def test_cancelled_calls_do_not_disturb_others(executor: Any, row: Any) -> None:
    """Cancelling races with starting; each call either runs or is cancelled."""
    futures = [executor.submit(identity, i) for i in range(row.many)]
    cancelled = [future.cancel() for future in futures[::2]]
    for i, future in enumerate(futures):
        if i % 2 == 0 and cancelled[i // 2]:
            assert future.cancelled()
        else:
            assert future.result(WAIT) == i
    assert executor.submit(add, 1, 2).result(WAIT) == 3
