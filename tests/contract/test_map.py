"""``map`` as the standard library documents it, chunks and buffers included, on every Python."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import TimeoutError as FuturesTimeoutError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from contract.functions import CustomError, Gate, add, fail, identity, lines, odd_fails, record

WAIT = 30


@pytest.mark.essential
def test_results_in_order(executor: Any) -> None:
    assert list(executor.map(add, range(10), range(10), timeout=WAIT)) == list(range(0, 20, 2))


def test_shortest_iterable_ends_it(executor: Any) -> None:
    assert list(executor.map(add, [1, 2, 3], [10, 20])) == [11, 22]


def test_nothing_to_do(executor: Any) -> None:
    assert list(executor.map(add, [], [])) == []
    assert list(executor.map(add)) == []


def test_it_is_an_iterator(executor: Any) -> None:
    results = executor.map(identity, [1, 2])
    assert iter(results) is results
    assert next(results) == 1
    assert next(results) == 2
    with pytest.raises(StopIteration):
        next(results)


def test_order_whatever_finishes_first(executor: Any, gate: Callable[..., Gate]) -> None:
    held = gate()

    def maybe_wait(number: int) -> int:
        return held(number) if number == 0 else number  # type: ignore[no-any-return]

    results = executor.map(maybe_wait, range(6))
    held.pid()
    held.open()
    assert list(results) == list(range(6))


def test_calls_are_submitted_at_once(executor: Any) -> None:
    """Before the first result is asked for, the iterables are used up."""
    taken: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(5):
            taken.append(number)
            yield number

    results = executor.map(identity, numbers())
    assert taken == list(range(5))
    assert list(results) == list(range(5))


@pytest.mark.essential
def test_error_comes_in_its_turn(executor: Any) -> None:
    results = executor.map(odd_fails, [0, 2, 3, 4])
    assert next(results) == 0
    assert next(results) == 2
    with pytest.raises(CustomError, match="3 is odd"):
        next(results)
    with pytest.raises(StopIteration):
        next(results)


def test_error_of_the_iterable(executor: Any) -> None:
    def numbers() -> Iterator[int]:
        yield 1
        raise CustomError("from the iterable")

    with pytest.raises(CustomError, match="from the iterable"):
        list(executor.map(identity, numbers()))
    assert list(executor.map(identity, [1])) == [1]


def test_timeout(make_executor: Callable[..., Any], gate: Callable[..., Gate]) -> None:
    held = gate()
    with make_executor() as executor:
        results = executor.map(held, [1, 2, 3], timeout=0.2)
        with pytest.raises(FuturesTimeoutError):
            next(results)
        held.open()


def test_timeout_counts_from_the_call_of_map(
    make_executor: Callable[..., Any], gate: Callable[..., Gate], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = gate()
    passed = 0.0
    monkeypatch.setattr("executorlib.executor.time", SimpleNamespace(monotonic=lambda: passed))

    def maybe_wait(number: int) -> int:
        return held(number) if number == 1 else number  # type: ignore[no-any-return]

    with make_executor() as executor:
        results = executor.map(maybe_wait, [0, 1], timeout=WAIT)
        assert next(results) == 0
        passed = WAIT
        with pytest.raises(FuturesTimeoutError, match=r"^$"):  # not the gate's own
            next(results)
        held.open()


def test_timeout_that_suffices(executor: Any) -> None:
    assert list(executor.map(identity, range(4), timeout=WAIT)) == list(range(4))


def test_closing_the_iterator_cancels_the_rest(
    make_executor: Callable[..., Any], row: Any, gate: Callable[..., Gate], tmp_path: Path
) -> None:
    held, log = gate(), tmp_path / "log"

    def log_and_wait(number: int) -> None:
        record(str(log), number)
        if number:
            held()

    with make_executor(max_workers=1) as executor:
        results = executor.map(log_and_wait, range(row.backlog))
        next(results)
        held.pid()
        results.close()
        held.open()
    # A block may already have handed some to its worker.
    assert len(lines(log)) < row.backlog / 2


def test_dropping_the_iterator_after_an_error_cancels_the_rest(
    make_executor: Callable[..., Any], row: Any, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    count = 10 * row.backlog

    def fail_first(number: int) -> None:
        record(str(log), number)
        if number == 0:
            fail()

    with make_executor(max_workers=1) as executor, pytest.raises(CustomError):
        list(executor.map(fail_first, range(count)))
    assert len(lines(log)) < count


# Chunks.


@pytest.mark.parametrize("chunksize", [1, 2, 3, 7, 100])
def test_chunks_change_no_result(executor: Any, chunksize: int) -> None:
    assert list(executor.map(add, range(7), range(7), chunksize=chunksize)) == [2 * i for i in range(7)]


@pytest.mark.essential
@pytest.mark.rows(block=False)
def test_a_chunk_is_one_call(executor: Any) -> None:
    def pid(_number: int) -> int:
        return os.getpid()

    pids = list(executor.map(pid, range(7), chunksize=3))
    assert pids[0] == pids[1] == pids[2]
    assert pids[3] == pids[4] == pids[5]
    assert len(set(pids)) == 3


def test_error_in_a_chunk(executor: Any) -> None:
    results = executor.map(odd_fails, [0, 2, 4, 5, 6, 8], chunksize=2)
    assert [next(results), next(results)] == [0, 2]
    with pytest.raises(CustomError, match="5 is odd"):
        next(results)


@pytest.mark.parametrize("chunksize", [0, -1])
def test_chunksize_below_one(executor: Any, chunksize: int) -> None:
    with pytest.raises(ValueError, match="chunksize"):
        executor.map(identity, [1], chunksize=chunksize)


# Buffers.


@pytest.mark.parametrize("chunksize", [1, 2])
def test_buffersize_limits_what_is_submitted(executor: Any, chunksize: int) -> None:
    """At most this many calls are under way whose results have not been taken."""
    taken: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(12):
            taken.append(number)
            yield number

    results = executor.map(identity, numbers(), buffersize=3, chunksize=chunksize)
    assert len(taken) == 3 * chunksize
    assert next(results) == 0
    assert len(taken) <= 4 * chunksize
    assert [0, *results] == list(range(12))


def test_buffersize_makes_endless_iterables_usable(executor: Any) -> None:
    results = executor.map(identity, itertools.count(), buffersize=2)
    assert list(itertools.islice(results, 6)) == list(range(6))
    results.close()


def test_buffersize_larger_than_the_input(executor: Any) -> None:
    assert list(executor.map(identity, range(3), buffersize=100)) == [0, 1, 2]


@pytest.mark.parametrize(("buffersize", "error"), [(0, ValueError), (-1, ValueError), ("2", TypeError)])
def test_buffersize_below_one(executor: Any, buffersize: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="buffersize"):
        executor.map(identity, [1], buffersize=buffersize)


# Inputs and resources.


@pytest.mark.essential
def test_futures_among_the_elements(executor: Any) -> None:
    futures = [executor.submit(add, i, 1) for i in range(4)]
    assert list(executor.map(add, futures, range(4))) == [1, 3, 5, 7]


def test_futures_among_the_elements_of_chunks(executor: Any) -> None:
    futures = [executor.submit(add, i, 1) for i in range(4)]
    assert list(executor.map(add, futures, range(4), chunksize=2)) == [1, 3, 5, 7]


def test_two_maps_at_once(executor: Any) -> None:
    pairs = zip(executor.map(identity, range(5)), executor.map(abs, range(5)), strict=True)
    assert list(pairs) == [(i, i) for i in range(5)]


def test_map_from_threads(executor: Any) -> None:
    found: dict[int, list[int]] = {}

    def work(start: int) -> None:
        found[start] = list(executor.map(add, [start] * 3, range(3)))

    threads = [threading.Thread(target=work, args=(i,)) for i in (10, 20, 30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {start: [start, start + 1, start + 2] for start in (10, 20, 30)}


# Futures of iterables.


def test_a_future_stands_for_an_iterable(executor: Any) -> None:
    numbers = executor.submit(identity, [1, 2, 3])
    assert list(executor.map(add, numbers, [10, 20, 30], timeout=WAIT)) == [11, 22, 33]
    assert list(executor.map(add, numbers, numbers, timeout=WAIT, chunksize=2)) == [2, 4, 6]


def test_a_future_of_an_iterable_that_fails(executor: Any) -> None:
    with pytest.raises(CustomError):
        executor.map(identity, executor.submit(fail, "no list"))


def test_a_future_of_an_iterable_that_takes_too_long(executor: Any, gate: Callable[..., Gate]) -> None:
    held = gate()
    late = executor.submit(held, [1])
    with pytest.raises(FuturesTimeoutError):
        executor.map(identity, late, timeout=0.01)
    held.open()
    assert list(executor.map(identity, late)) == [1]


def test_futures_of_iterables_that_cannot_be_honoured(make_executor: Callable[..., Any], tmp_path: Path) -> None:
    with make_executor(disable_dependencies=True) as executor, pytest.raises(ValueError, match="disable_dependencies"):
        executor.map(identity, executor.submit(identity, [1]))
    with (
        make_executor(plot_dependency_graph_filename=str(tmp_path / "graph.dot")) as executor,
        pytest.raises(ValueError, match="split_future"),
    ):
        executor.map(identity, executor.submit(identity, [1]))
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.map(identity, [1])
