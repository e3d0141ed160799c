"""Blocks of workers: what a worker keeps, what fills a call's parameters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from contract.functions import CustomError, Gate, add, fail, lines, numbered, record
from executorlib.core import sending

WAIT = 30
block = pytest.mark.rows(block=True)
pytestmark = pytest.mark.essential


@block
def test_worker_numbers(make_executor: Callable[..., Any], gate: Callable[..., Gate]) -> None:
    held = gate()
    with make_executor(max_workers=3) as executor:
        futures = [executor.submit(numbered, held) for _ in range(3)]
        held.pids(3)
        held.open()
        assert sorted(future.result(WAIT) for future in futures) == [0, 1, 2]


@pytest.mark.rows(block=False)
def test_worker_number_without_a_block(executor: Any) -> None:
    def number(executorlib_worker_id: int) -> int:
        return executorlib_worker_id

    assert [executor.submit(number).result(WAIT) for _ in range(2)] == [0, 0]


@pytest.mark.rows(jobs=False)
def test_few_pickles_of_functions_are_kept(
    make_executor: Callable[..., Any], row: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By number and by bytes: functions may hold data. Where a worker runs one call, none are."""
    monkeypatch.setattr(sending, "_PIECE_BYTES_PER_WORKER", 20_000)
    monkeypatch.setattr(sending, "_DIGEST_BYTES", 5_000)

    def holding(data: bytes) -> Callable[[], int]:
        return lambda: len(data)

    sizes = [4_000, 6_000, 6_001, 30_000, 4_001, 6_000]
    functions = [holding(bytes(size)) for size in sizes]
    with make_executor(max_workers=1) as executor:
        for _ in range(2):
            assert [executor.submit(function).result(WAIT) for function in functions] == sizes
        # The executor's record of what workers keep.
        kept = executor._loop._delivery._known_pieces
        keys = executor._loop._delivery._piece_numbers
        assert len(keys) == (5 if row.block else 0)
        assert all(len(key) <= 5_000 for key in keys)
        assert all(sum(known.values()) <= 30_000 + 1_000 for known in kept.values())
        assert bool(kept) == row.block


def test_worker_number_that_the_caller_gives(executor: Any) -> None:
    def number(executorlib_worker_id: int = 5) -> int:
        return executorlib_worker_id

    assert executor.submit(number, executorlib_worker_id=7).result(WAIT) == 7
    assert executor.submit(number, 8).result(WAIT) == 8


@block
def test_init_function_fills_parameters(make_executor: Callable[..., Any]) -> None:
    def prepare() -> dict[str, Any]:
        return {"a": 1, "b": 2, "unused": 3}

    def use(x: int, a: int, b: int = 100, c: int = 1000) -> tuple[int, int, int, int]:
        return x, a, b, c

    with make_executor(init_function=prepare) as executor:
        assert executor.submit(use, 0).result(WAIT) == (0, 1, 2, 1000)
        assert executor.submit(use, 0, b=5).result(WAIT) == (0, 1, 5, 1000)
        assert executor.submit(use, 0, 7).result(WAIT) == (0, 7, 2, 1000)
        assert executor.submit(use, a=8, x=9).result(WAIT) == (9, 8, 2, 1000)
        # Parameters are all that is filled: calls that have none of these names are untouched.
        assert executor.submit(add, 1, 2).result(WAIT) == 3
        assert executor.submit(max, 1, 2).result(WAIT) == 2


@block
def test_init_function_and_variable_keywords(make_executor: Callable[..., Any]) -> None:
    """Only parameters that the function names are filled."""

    def collect(**kwargs: Any) -> dict[str, Any]:
        return kwargs

    with make_executor(init_function=lambda: {"a": 1}) as executor:
        assert executor.submit(collect, x=2).result(WAIT) == {"x": 2}


@block
def test_init_function_runs_once_in_each_worker(
    make_executor: Callable[..., Any], gate: Callable[..., Gate], tmp_path: Path
) -> None:
    log, held = str(tmp_path / "log"), gate()

    def prepare() -> dict[str, Any]:
        import os

        record(log, os.getpid())
        return {"kept": [0]}

    def count(kept: list[int]) -> int:
        kept[0] += 1
        return kept[0]

    with make_executor(init_function=prepare) as executor:
        both = [executor.submit(held) for _ in range(2)]
        workers = held.pids(2)
        held.open()
        for future in both:
            future.result(WAIT)
        counts = [executor.submit(count).result(WAIT) for _ in range(6)]
        executor.submit(add, 1, 2).result(WAIT)
    assert sorted(lines(log)) == sorted(map(str, workers))
    # The value lives on in its worker: together the two counted to six.
    assert max(counts) >= 3


@block
def test_init_function_of_one_worker_is_kept_by_it(make_executor: Callable[..., Any]) -> None:
    def count(kept: list[int]) -> int:
        kept.append(0)
        return len(kept)

    with make_executor(max_workers=1, init_function=lambda: {"kept": []}) as executor:
        assert [executor.submit(count).result(WAIT) for _ in range(4)] == [1, 2, 3, 4]


@block
def test_init_function_that_cannot_be_sent_back(make_executor: Callable[..., Any]) -> None:
    """Its values stay in the worker; they need not be pickled."""

    def prepare() -> dict[str, Any]:
        import threading

        return {"lock": threading.Lock()}

    def locked(lock: Any) -> bool:
        with lock:
            return True

    with make_executor(init_function=prepare) as executor:
        assert executor.submit(locked).result(WAIT) is True


@block
def test_init_function_that_fails(make_executor: Callable[..., Any]) -> None:
    with make_executor(init_function=lambda: fail("in the beginning")) as executor:
        futures = [executor.submit(add, i, 1) for i in range(5)]
        for future in futures:
            error = future.exception(WAIT)
            assert error is not None
            text = f"{error!r} {error.__cause__} {getattr(error, '__notes__', '')}"
            assert "in the beginning" in text
            assert "CustomError" in text
            assert "init_function" in text
            assert "no call of this executor can run" in text


@block
@pytest.mark.parametrize("returned", [None, 3, [("a", 1)]], ids=repr)
def test_init_function_that_returns_no_dictionary(make_executor: Callable[..., Any], returned: Any) -> None:
    """Nothing to fill is fine; anything else is an error that says what is expected."""
    with make_executor(init_function=lambda: returned) as executor:
        future = executor.submit(add, 1, 2)
        if returned is None and future.exception(WAIT) is None:
            assert future.result() == 3
        else:
            assert "init_function" in str(future.exception(WAIT))


@block
def test_state_of_a_worker_lives_on(make_executor: Callable[..., Any]) -> None:
    def mark() -> int:
        import sys

        sys.times_marked = getattr(sys, "times_marked", 0) + 1  # type: ignore[attr-defined]
        return sys.times_marked  # type: ignore[attr-defined,no-any-return]

    with make_executor(max_workers=1) as executor:
        assert [executor.submit(mark).result(WAIT) for _ in range(3)] == [1, 2, 3]


@block
def test_a_failed_call_leaves_the_worker_alive(make_executor: Callable[..., Any]) -> None:
    import os

    with make_executor(max_workers=1) as executor:
        before = executor.submit(os.getpid).result(WAIT)
        assert isinstance(executor.submit(fail).exception(WAIT), CustomError)
        assert executor.submit(os.getpid).result(WAIT) == before


@pytest.mark.rows("block-fork")
def test_init_function_without_a_key(make_executor: Callable[..., Any], tmp_path: Path) -> None:
    """Results that depend on it cannot be kept. Each call fails with the reason."""
    held = open(__file__)  # noqa: SIM115  # for the closure

    def prepare() -> dict[str, Any]:
        return {"y": 0 if held is None else 1}

    def one(x: int) -> int:
        return x

    with held, make_executor(init_function=prepare, cache_directory=str(tmp_path)) as executor:
        for number in range(2):
            error = executor.submit(one, number).exception(WAIT)
            assert isinstance(error, TypeError)
            assert "because they depend on its init_function, for which no key can be derived" in str(error)
            assert "closure variable 'held'" in str(error)
