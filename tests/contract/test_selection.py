"""``batched``, ``split_future`` and ``get_item_from_future``: futures made from futures."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, as_completed, wait
from typing import Any

import pytest

from contract.functions import CustomError, add, fail, identity, total

WAIT = 30


def futures(count: int) -> list[Future[Any]]:
    return [Future() for _ in range(count)]


# batched


@pytest.mark.essential
def test_batches_of_n(executor: Any) -> None:
    inputs = [executor.submit(identity, i) for i in range(7)]
    batches = executor.batched(inputs, 3)
    assert all(isinstance(batch, Future) for batch in batches)
    results = [batch.result(WAIT) for batch in batches]
    assert [len(result) for result in results] == [3, 3, 1]
    assert sorted(itertools.chain(*results)) == list(range(7))
    assert all(isinstance(result, list) for result in results)


def test_order_of_finishing(executor: Any) -> None:
    inputs = futures(5)
    batches = executor.batched(inputs, 2)
    inputs[3].set_result("d")
    assert not batches[0].done()
    inputs[0].set_result("a")
    assert batches[0].result(WAIT) == ["d", "a"]
    assert not batches[1].done()
    inputs[4].set_result("e")
    inputs[2].set_result("c")
    assert batches[1].result(WAIT) == ["e", "c"]
    assert not batches[2].done()
    inputs[1].set_result("b")
    assert batches[2].result(WAIT) == ["b"]


def test_failed_inputs_come_last(executor: Any) -> None:
    inputs = futures(5)
    batches = executor.batched(inputs, 2)
    inputs[1].set_exception(CustomError("second input"))
    for i in (3, 0, 2, 4):
        assert not batches[2].done()
        inputs[i].set_result(i)
    assert [batch.result(WAIT) for batch in batches[:2]] == [[3, 0], [2, 4]]
    with pytest.raises(CustomError, match="second input"):
        batches[2].result(WAIT)


def test_a_batch_with_a_failed_input_fails(executor: Any) -> None:
    inputs = futures(4)
    batches = executor.batched(inputs, 2)
    inputs[0].set_exception(CustomError("x"))
    inputs[1].set_result(1)
    inputs[2].cancel()
    inputs[3].set_result(3)
    assert batches[0].result(WAIT) == [1, 3]
    with pytest.raises((CustomError, CancelledError)):
        batches[1].result(WAIT)


def test_all_inputs_failed(executor: Any) -> None:
    inputs = [executor.submit(fail, str(i)) for i in range(3)]
    for batch in executor.batched(inputs, 2):
        with pytest.raises(CustomError):
            batch.result(WAIT)


def test_inputs_that_are_done(executor: Any) -> None:
    inputs = futures(4)
    for i, future in enumerate(inputs):
        future.set_result(i)
    assert [batch.result(WAIT) for batch in executor.batched(inputs, 4)] == [[0, 1, 2, 3]]


def test_no_inputs(executor: Any) -> None:
    assert executor.batched([], 3) == []


def test_any_iterable(executor: Any) -> None:
    batches = executor.batched((executor.submit(identity, i) for i in range(3)), 5)
    assert sorted(batches[0].result(WAIT)) == [0, 1, 2]
    assert len(batches) == 1


@pytest.mark.parametrize("n", [0, -1, "2", 1.5])
def test_size_below_one(executor: Any, n: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        executor.batched([executor.submit(identity, 1)], n)


def test_batches_as_inputs(executor: Any) -> None:
    batches = executor.batched([executor.submit(identity, i) for i in range(6)], 2)
    sums = [executor.submit(sum, batch) for batch in batches]
    assert executor.submit(total, *sums).result(WAIT) == 15


def test_a_random_order_of_finishing(executor: Any) -> None:
    inputs = futures(20)
    batches = executor.batched(inputs, 6)
    order = list(range(20))
    random.Random(1).shuffle(order)
    for i in order:
        inputs[i].set_result(i)
    assert list(itertools.chain(*(batch.result(WAIT) for batch in batches))) == order


# split_future and get_item_from_future


def split(source: Future[Any], n: int) -> list[Future[Any]]:
    from executorlib import split_future

    return split_future(source, n)


def item(source: Future[Any], key: Any) -> Future[Any]:
    from executorlib import get_item_from_future

    return get_item_from_future(source, key)


def test_split(executor: Any) -> None:
    parts = split(executor.submit(identity, (1, 2, 3)), 3)
    assert [part.result(WAIT) for part in parts] == [1, 2, 3]


@pytest.mark.parametrize(("value", "key", "expected"), [({"a": 1}, "a", 1), ([5, 6], 1, 6)])
def test_item(executor: Any, value: Any, key: Any, expected: Any) -> None:
    assert item(executor.submit(identity, value), key).result(WAIT) == expected


def test_they_are_futures() -> None:
    source: Future[Any] = Future()
    first, second = split(source, 2)
    third = item(source, 0)
    called: list[Any] = []
    for part in (first, second, third):
        assert isinstance(part, Future)
        assert not part.done()
        part.add_done_callback(lambda future: called.append(future.result()))
    assert wait([first, second], timeout=0).not_done == {first, second}
    source.set_result(("a", "b"))
    assert called == ["a", "b", "a"]
    assert {future.result() for future in as_completed([first, second, third], 1)} == {"a", "b"}
    assert all(part.done() and not part.cancelled() for part in (first, second, third))
    late = item(source, 1)
    assert late.result(timeout=0) == "b"


def test_they_can_be_awaited() -> None:
    source: Future[Any] = Future()
    parts = split(source, 2)

    async def both() -> list[Any]:
        waiting = [asyncio.wrap_future(part) for part in parts]
        asyncio.get_running_loop().call_soon(source.set_result, [3, 4])
        return list(await asyncio.wait_for(asyncio.gather(*waiting), WAIT))

    assert asyncio.run(both()) == [3, 4]


@pytest.mark.essential
def test_they_are_inputs(executor: Any, make_executor: Callable[..., Any]) -> None:
    source = executor.submit(identity, {"a": (1, 2)})
    left, right = split(item(source, "a"), 2)
    assert executor.submit(add, left, b=right).result(WAIT) == 3
    with make_executor() as other:
        assert other.submit(identity, [left, {"x": right}]).result(WAIT) == [1, {"x": 2}]


def test_failed_source(executor: Any) -> None:
    source = executor.submit(fail, "the source")
    for part in [*split(source, 2), item(source, "a")]:
        with pytest.raises(CustomError, match="the source"):
            part.result(WAIT)
        with pytest.raises(CustomError):
            executor.submit(add, part, 1).result(WAIT)


def test_cancelled_source() -> None:
    source: Future[Any] = Future()
    parts = [*split(source, 2), item(source, 0)]
    source.cancel()
    source.set_running_or_notify_cancel()
    for part in parts:
        with pytest.raises(CancelledError):
            part.result(WAIT)


@pytest.mark.parametrize(("value", "key", "error"), [({}, "a", KeyError), ([], 3, IndexError), (5, 0, TypeError)])
def test_item_that_is_not_there(executor: Any, value: Any, key: Any, error: type) -> None:
    part = item(executor.submit(identity, value), key)
    assert isinstance(part.exception(WAIT), error)
    assert executor.submit(add, 1, 2).result(WAIT) == 3


def test_split_of_too_few(executor: Any) -> None:
    parts = split(executor.submit(identity, (1, 2)), 3)
    assert [part.result(WAIT) for part in parts[:2]] == [1, 2]
    assert isinstance(parts[2].exception(WAIT), IndexError)


def test_cancelling_a_part_leaves_the_source_alone() -> None:
    source: Future[Any] = Future()
    first, second = split(source, 2)
    assert first.cancel()
    source.set_result((1, 2))
    assert first.cancelled()
    assert second.result(0) == 2
