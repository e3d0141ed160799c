"""Which call runs when: limits hold, gaps are filled, nobody starves."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from contract.functions import Gate, add, append, counted, highest, identity, lines, record

WAIT = 30
pytestmark = pytest.mark.rows(block=False)


def threads(count: int) -> dict[str, int]:
    return {"threads_per_core": count}


def test_max_cores_is_never_exceeded(make_executor: Callable[..., Any], tmp_path: Path) -> None:
    log = tmp_path / "log"
    with make_executor(max_cores=4) as executor:
        futures = [
            executor.submit(counted, log, count, number, resource_dict=threads(count))
            for number, count in enumerate((1, 3, 2, 4, 1, 1, 2, 3, 4, 1, 2, 1))
        ]
        for future in futures:
            future.result(WAIT)
    assert len(lines(log)) == 24
    assert highest(log) <= 4


def test_max_workers_is_never_exceeded(make_executor: Callable[..., Any], tmp_path: Path) -> None:
    log = tmp_path / "log"
    with make_executor(max_workers=3) as executor:
        futures = [executor.submit(counted, log, 1, i) for i in range(12)]
        for future in futures:
            future.result(WAIT)
    assert len(lines(log)) == 24
    assert 1 <= highest(log) <= 3


def test_max_workers_and_max_cores_both_hold(make_executor: Callable[..., Any], tmp_path: Path) -> None:
    calls, cores = tmp_path / "calls", tmp_path / "cores"

    def both(amount: int, _number: int) -> None:
        append(calls, "+1")
        counted(cores, amount)
        append(calls, "-1")

    with make_executor(max_workers=2, max_cores=3) as executor:
        futures = [
            executor.submit(both, count, number, resource_dict=threads(count))
            for number, count in enumerate((1, 1, 1, 2, 2, 3, 1, 2))
        ]
        for future in futures:
            future.result(WAIT)
    assert len(lines(calls)) == 16
    assert highest(calls) <= 2
    assert highest(cores) <= 3


def test_max_cores_may_exceed_the_machine(make_executor: Callable[..., Any], gate: Callable[..., Gate]) -> None:
    """A stated limit is the user's word; all of it is used."""
    held = gate()
    with make_executor(max_cores=5) as executor:
        futures = [executor.submit(held, i) for i in range(5)]
        held.pids(5)
        held.open()
        assert [future.result(WAIT) for future in futures] == list(range(5))


def test_small_calls_fill_the_gaps(make_executor: Callable[..., Any], gate: Callable[..., Gate]) -> None:
    held = gate()
    with make_executor(max_cores=2) as executor:
        first = executor.submit(held, "first")
        held.pid()
        large = executor.submit(identity, "large", resource_dict=threads(2))
        small = executor.submit(identity, "small")
        assert small.result(WAIT) == "small"
        assert not large.done()
        held.open()
        assert (first.result(WAIT), large.result(WAIT)) == ("first", "large")


def test_a_large_call_does_not_starve(make_executor: Callable[..., Any]) -> None:
    """Small calls keep coming, always more than there is room for; the large one has its turn."""
    with make_executor(max_cores=2) as executor:
        large: Future[str] = Future()
        ended = threading.Semaphore(0)
        streams, numbers = 6, itertools.count()

        def go_on(before: Future[int] | None = None) -> None:
            if before is not None and large.done():
                ended.release()
            else:
                executor.submit(add, next(numbers), 2).add_done_callback(go_on)

        for _ in range(streams):
            go_on()
        large_call = executor.submit(identity, "large", resource_dict=threads(2))
        try:
            assert large_call.result(WAIT) == "large"
        finally:
            large.set_result("")
            for _ in range(streams):
                assert ended.acquire(timeout=WAIT)


def test_order_of_submission(make_executor: Callable[..., Any], tmp_path: Path) -> None:
    log = tmp_path / "log"
    with make_executor(max_workers=1) as executor:
        futures = [executor.submit(record, log, i) for i in range(8)]
        for future in futures:
            future.result(WAIT)
    assert lines(log) == [str(i) for i in range(8)]


@pytest.mark.rows(jobs=False)  # which call comes to a queue first is for the queue to say
def test_priority(make_executor: Callable[..., Any], gate: Callable[..., Gate], tmp_path: Path) -> None:
    """Higher priorities first, among equals as submitted; no priority is 0."""
    log, held = tmp_path / "log", gate()
    with make_executor(max_workers=1) as executor:
        first = executor.submit(held)
        held.pid()
        futures = [
            executor.submit(record, log, f"{priority}:{i}", resource_dict={"priority": priority})
            for i, priority in enumerate((1, -1, 5, 1, 5))
        ]
        futures.append(executor.submit(record, log, "none"))
        held.open()
        for future in [first, *futures]:
            future.result(WAIT)
    assert lines(log) == ["5:2", "5:4", "1:0", "1:3", "none", "-1:1"]


def test_a_cancelled_call_frees_the_way(make_executor: Callable[..., Any], gate: Callable[..., Gate]) -> None:
    """A large call that holds up others no longer does once it is cancelled."""
    held = gate()
    with make_executor(max_cores=2) as executor:
        first = executor.submit(held, 1)
        held.pid()
        large = executor.submit(identity, "large", resource_dict=threads(2))
        assert large.cancel()
        rest = [executor.submit(add, i, 0) for i in range(12)]
        assert [future.result(WAIT) for future in rest] == list(range(12))
        held.open()
        assert first.result(WAIT) == 1
