"""An executor's properties, and its size."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

import pytest

from contract.functions import Gate, add, until, wait_until_gone

WAIT = 30


def test_it_is_an_executor(executor: Any) -> None:
    from executorlib import BaseExecutor

    assert isinstance(executor, Executor)
    assert isinstance(executor, BaseExecutor)
    assert executor.__enter__() is executor


def test_it_is_true(make_executor: Callable[..., Any]) -> None:
    executor = make_executor()
    assert bool(executor) is True
    assert len(executor) == 0
    executor.shutdown()
    assert bool(executor) is True
    assert len(executor) == 0


@pytest.mark.essential
@pytest.mark.rows(block=False)
def test_length_is_the_calls_not_yet_started(make_executor: Callable[..., Any], gate: Callable[..., Gate]) -> None:
    held = gate()
    never: Future[int] = Future()
    with make_executor(max_workers=1) as executor:
        futures = [executor.submit(held, 0)]
        until(futures[0].running, WAIT)
        assert len(executor) == 0
        futures += [executor.submit(add, i, 1) for i in range(3)]
        waiting = executor.submit(add, never, 1)
        assert len(executor) == 4
        waiting.cancel()
        until(lambda: len(executor) == 3)
        held.open()
        for future in futures:
            future.result(WAIT)
        assert len(executor) == 0


@pytest.mark.rows(block=True)
def test_length_of_a_block(make_executor: Callable[..., Any], gate: Callable[..., Gate]) -> None:
    """Calls that a worker holds but has not begun count as far as the executor knows of them."""
    held = gate()
    with make_executor() as executor:
        futures = [executor.submit(held, i) for i in range(2)]
        held.pids(2)
        futures += [executor.submit(add, i, 1) for i in range(300)]
        assert 150 < len(executor) <= 300
        held.open()
        for future in futures:
            future.result(WAIT)
        assert len(executor) == 0


@pytest.mark.essential
def test_info(make_executor: Callable[..., Any]) -> None:
    with make_executor(resource_dict={"threads_per_core": 1}, max_cores=3) as executor:
        info = executor.info
        assert isinstance(info, dict)
        assert info["max_cores"] == 3
        info["max_cores"] = 4
        assert executor.info["max_cores"] == 3


@pytest.mark.essential
def test_max_workers(make_executor: Callable[..., Any]) -> None:
    with make_executor(max_workers=3) as executor:
        assert executor.max_workers == 3
        assert executor._max_workers == 3


def test_max_workers_is_an_int_by_default(row: Any) -> None:
    options = row.arguments()
    del options["max_workers"]
    with row.make() as given, type(given)(**options) as executor:
        assert type(executor.max_workers) is int
        assert type(executor._max_workers) is int
        if hasattr(os, "sched_getaffinity") and not row.flux:
            assert executor.max_workers == len(os.sched_getaffinity(0))


def test_future_queue(executor: Any) -> None:
    assert hasattr(executor, "future_queue")


@pytest.mark.rows(block=False)
def test_max_workers_is_fixed_without_a_block(executor: Any) -> None:
    before = executor.max_workers
    for kind in (NotImplementedError, ValueError):
        with pytest.raises(kind, match="block_allocation"):
            executor.max_workers = 5
    assert executor.max_workers == before
    assert executor.submit(add, 1, 2).result(WAIT) == 3


def test_properties_are_none_after_shutdown(make_executor: Callable[..., Any]) -> None:
    with make_executor() as executor:
        assert executor.info["max_workers"] == executor.max_workers
        assert isinstance(executor.max_workers, int)
    assert executor.max_workers is None
    assert executor._max_workers is None
    assert executor.info is None
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.max_workers = 2


# The size of a block.

block = pytest.mark.rows(block=True)


@block
def test_growing(make_executor: Callable[..., Any], gate: Callable[..., Gate]) -> None:
    held = gate()
    with make_executor(max_workers=1) as executor:
        futures = [executor.submit(held, i) for i in range(3)]
        held.pids(1)
        executor.max_workers = 3
        assert executor.max_workers == 3
        assert len(set(held.pids(3))) == 3
        held.open()
        assert [future.result(WAIT) for future in futures] == [0, 1, 2]


@block
def test_shrinking(make_executor: Callable[..., Any], gate: Callable[..., Gate]) -> None:
    """Workers finish what they run, then the surplus ends."""
    first, second = gate("first"), gate("second")
    with make_executor(max_workers=3) as executor:
        futures = [executor.submit(first, i) for i in range(3)]
        pids = first.pids(3)
        executor.max_workers = 1
        assert executor.max_workers == 1
        later = [executor.submit(second, i) for i in range(2)]
        first.open()
        assert [future.result(WAIT) for future in futures] == [0, 1, 2]
        (left,) = second.pids(1)
        assert left in pids
        wait_until_gone(*(pid for pid in pids if pid != left))
        assert second.pids(1) == [left]
        second.open()
        assert [future.result(WAIT) for future in later] == [0, 1]


@block
def test_shrinking_and_growing_with_work_under_way(make_executor: Callable[..., Any]) -> None:
    with make_executor(max_workers=2) as executor:
        futures = []
        for size in (1, 3, 2, 1, 2):
            futures += [executor.submit(add, i, size) for i in range(30)]
            executor.max_workers = size
        assert [future.result(WAIT) for future in futures] == [i + size for size in (1, 3, 2, 1, 2) for i in range(30)]


@block
@pytest.mark.parametrize("size", [0, -1, "2", 1.5])
def test_size_below_one(make_executor: Callable[..., Any], size: Any) -> None:
    with make_executor() as executor:
        with pytest.raises((TypeError, ValueError), match="max_workers"):
            executor.max_workers = size
        assert executor.max_workers == 2
        assert executor.submit(add, 1, 2).result(WAIT) == 3


@block
def test_more_workers_than_max_cores_allow(make_executor: Callable[..., Any]) -> None:
    with make_executor(max_workers=2, max_cores=2) as executor:
        with pytest.raises(ValueError, match="max_cores"):
            executor.max_workers = 3
        assert executor.max_workers == 2
        assert executor.submit(add, 1, 2).result(WAIT) == 3
