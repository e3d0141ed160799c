"""Futures as inputs, and futures made from futures."""

from __future__ import annotations

import collections
import dataclasses
import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, wait
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from executorlib.futures.derived import batched, derived_future, get_item_from_future, split_future, when_done
from executorlib.futures.inputs import fill_in, find_futures, find_futures_in_call, input_error
from executorlib.futures.lean import LeanFuture
from unit.properties import repeatable


def done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


def failed(error: BaseException) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_exception(error)
    return future


def cancelled() -> Future[Any]:
    future: Future[Any] = Future()
    assert future.cancel()
    return future


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclasses.dataclass
class Record:
    value: Any
    log: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.log.append("made")


@dataclasses.dataclass(frozen=True)
class Frozen:
    value: Any


@dataclasses.dataclass
class Slotted:
    __slots__ = ("absent", "value")
    value: Any
    absent: Any


@dataclasses.dataclass
class NotInInit:
    value: Any
    derived: Any = dataclasses.field(init=False)
    shared: dataclasses.InitVar[int] = 3

    def __post_init__(self, shared: int) -> None:
        self.derived = [self.value, shared]


class Settings(dict):  # type: ignore[type-arg]
    """A dictionary with something of its own."""


class Holder:
    """No container: what it holds is its own."""

    def __init__(self, value: Any) -> None:
        self.value = value


# Searching and filling.

SHAPES: list[tuple[str, Callable[[Any], Any]]] = [
    ("itself", lambda x: x),
    ("list", lambda x: [1, x]),
    ("tuple", lambda x: (x, 2)),
    ("set", lambda x: {x, 2}),
    ("frozenset", lambda x: frozenset({x, 2})),
    ("dict value", lambda x: {"a": x, "b": 2}),
    ("dict key", lambda x: {x: 1, "b": 2}),
    ("named tuple", lambda x: Pair(x, 2)),
    ("dataclass", Record),
    ("frozen dataclass", Frozen),
    ("deep", lambda x: [({"a": [Pair(1, {"b": Record([x])})]},)]),
    ("subclass of dict", lambda x: Settings(a=x)),
    ("ordered dict", lambda x: collections.OrderedDict([("z", x), ("a", 2)])),
    ("defaultdict", lambda x: collections.defaultdict(list, a=x)),
    ("init=False", NotInInit),
]


@pytest.mark.parametrize("make", [row[1] for row in SHAPES], ids=[row[0] for row in SHAPES])
def test_found_and_filled_in(make: Callable[[Any], Any]) -> None:
    future = done(7)
    value, expected = make(future), make(7)
    assert find_futures(value) == [future]
    assert find_futures_in_call((1, value), {}) == [future]
    assert find_futures_in_call((), {"key": value}) == [future]
    filled = fill_in(value)
    assert type(filled) is type(expected)
    assert filled == expected
    assert find_futures(value) == [future]  # the caller's own object is as it was


def test_attributes_of_a_container_are_kept() -> None:
    default = fill_in(collections.defaultdict(list, a=done(1)))
    assert default["new"] == []
    ordered = fill_in(collections.OrderedDict([("z", done(1)), ("a", 2)]))
    assert list(ordered) == ["z", "a"]
    recorded = fill_in(Record(done(1)))
    assert recorded.log == ["made"]  # not made a second time
    own = Settings(a=done(1))
    own.note = "kept"  # type: ignore[attr-defined]
    assert fill_in(own).note == "kept"


def test_dataclass_with_slots_and_an_absent_field() -> None:
    value = Slotted(done(1), 2)
    del value.absent
    assert find_futures(value) == [value.value]
    filled = fill_in(value)
    assert filled.value == 1
    assert not hasattr(filled, "absent")


@pytest.mark.parametrize("value", [[1, [2]], {"a": {"b": 1}}, ({1},), Pair(1, 2), Record(1), Holder(1), "text", Record])
def test_values_without_futures_stay_the_same_objects(value: Any) -> None:
    assert find_futures(value) == []
    assert fill_in(value) is value


def test_futures_in_other_objects_are_not_found() -> None:
    holder = Holder(done(1))
    assert find_futures([holder]) == []
    assert fill_in([holder])[0] is holder


def test_each_future_once_in_order() -> None:
    a, b, c = Future[Any](), Future[Any](), Future[Any]()
    assert find_futures([b, {"x": a, "y": [b]}, a, (c, b)]) == [b, a, c]


def test_subclass_of_future() -> None:
    class Mine(Future):  # type: ignore[type-arg]
        pass

    mine = Mine()
    mine.set_result(3)
    assert find_futures([mine]) == [mine]
    assert fill_in([mine]) == [3]


def test_result_that_is_or_holds_a_future_is_left_alone() -> None:
    inner = done(1)
    assert fill_in([done(inner)]) == [inner]
    assert fill_in([done([inner])]) == [[inner]]


def test_filling_fails_with_the_future_and_with_the_container() -> None:
    with pytest.raises(ZeroDivisionError):
        fill_in([failed(ZeroDivisionError())])
    with pytest.raises(TypeError, match="unhashable"):
        fill_in({done([])})


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_cycle_with_a_future(depth: int) -> None:
    cycle: list[Any] = [Future()]
    inner = cycle
    for _ in range(depth):
        inner = [inner]
    cycle.append({"again": inner})
    with pytest.raises(ValueError, match="contains itself"):
        find_futures(cycle)
    with pytest.raises(ValueError, match="contains itself"):
        find_futures_in_call((), {"key": cycle})


def test_cycle_without_a_future() -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    assert find_futures(cycle) == []
    assert fill_in(cycle) is cycle


def test_cycle_beside_a_future() -> None:
    """The future is in another argument, so it can be filled in."""
    cycle: list[Any] = []
    cycle.append(cycle)
    future = done(1)
    assert find_futures_in_call((cycle, future), {}) == [future]
    assert fill_in((cycle, future))[0] is cycle
    assert fill_in((cycle, future))[1] == 1


def test_container_that_occurs_twice_is_not_a_cycle() -> None:
    shared = [done(1)]
    assert find_futures([shared, shared]) == [shared[0]]
    assert fill_in([shared, shared]) == [[1], [1]]


def test_cost_of_shared_containers() -> None:
    """Each is looked at a few times, and not once for each path to it."""
    looked = 0

    class Counting(Future):  # type: ignore[type-arg]
        def result(self, timeout: float | None = None) -> Any:
            nonlocal looked
            looked += 1
            return super().result(timeout)

    counting = Counting()
    counting.set_result(1)
    level: Any = counting
    for _ in range(14):
        level = [level, level]
    assert find_futures(level) == [counting]
    fill_in(level)
    assert looked < 100


leaves = st.integers() | st.text(max_size=3) | st.just(None)
shapes = st.recursive(
    st.tuples(st.just("future"), leaves) | st.tuples(st.just("leaf"), leaves),
    lambda inner: st.tuples(
        st.sampled_from(["list", "tuple", "dict", "record", "pair"]), st.lists(inner, min_size=2, max_size=3)
    ),
    max_leaves=12,
)


def build(shape: tuple[str, Any], make_future: Callable[[Any], Any]) -> Any:
    kind, content = shape
    if kind == "leaf":
        return content
    if kind == "future":
        return make_future(content)
    items = [build(item, make_future) for item in content]
    if kind == "tuple":
        return tuple(items)
    if kind == "dict":
        return dict(enumerate(items))
    if kind == "record":
        return Record(items)
    return Pair(items[0], items[1:]) if kind == "pair" else items


@repeatable
@given(shapes)
def test_any_shape(shape: tuple[str, Any]) -> None:
    made: list[Future[Any]] = []

    def future(value: Any) -> Future[Any]:
        made.append(done(value))
        return made[-1]

    value = build(shape, future)
    assert find_futures(value) == made
    filled = fill_in(value)
    assert filled == build(shape, lambda result: result)
    assert made or filled is value


# Failed inputs.


def test_input_error() -> None:
    error = ZeroDivisionError()
    assert input_error(done(1)) is None
    assert input_error(failed(error)) is error
    assert isinstance(input_error(cancelled()), CancelledError)


# Derived futures.


def test_item_before_and_after() -> None:
    source: Future[Any] = Future()
    item = get_item_from_future(source, "a")
    assert not item.done()
    source.set_result({"a": 1})
    assert item.result(0) == 1
    assert get_item_from_future(source, "a").result(0) == 1
    assert isinstance(item, Future)


@pytest.mark.parametrize(("key", "error"), [("b", KeyError), (0, KeyError)])
def test_item_that_is_not_there(key: Any, error: type[Exception]) -> None:
    assert isinstance(get_item_from_future(done({"a": 1}), key).exception(0), error)


def test_item_of_a_result_that_cannot_be_indexed() -> None:
    assert isinstance(get_item_from_future(done(5), 0).exception(0), TypeError)


def test_item_of_a_failed_and_of_a_cancelled_future() -> None:
    error = ZeroDivisionError()
    assert get_item_from_future(failed(error), 0).exception(0) is error
    with pytest.raises(CancelledError):
        get_item_from_future(cancelled(), 0).result(0)


def test_cancelled_item_leaves_its_source_alone() -> None:
    source: Future[Any] = Future()
    item, other = split_future(source, 2)
    assert item.cancel()
    source.set_result([1, 2])
    assert item.cancelled()
    assert other.result(0) == 2


def test_split() -> None:
    source: Future[Any] = Future()
    parts = split_future(source, 3)
    told: list[int] = []
    for part in parts:
        part.add_done_callback(lambda part: told.append(part.result()))
    source.set_result("abcd")
    assert told == ["a", "b", "c"]
    assert wait(parts, 0).not_done == set()


def test_split_of_too_few() -> None:
    one, other = split_future(done([1]), 2)
    assert one.result(0) == 1
    assert isinstance(other.exception(0), IndexError)


@pytest.mark.parametrize("n", [0, -1])
def test_bad_n(n: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        split_future(done([1]), n)
    with pytest.raises(ValueError, match="at least 1"):
        batched([done(1)], n)


def test_compute_runs_once_and_only_with_a_result() -> None:
    computed: list[Any] = []
    source: Future[Any] = Future()
    derived = derived_future(source, computed.append)
    derived_future(failed(ZeroDivisionError()), computed.append)
    source.set_result(5)
    assert derived.result(0) is None
    assert computed == [5]


def test_derived_futures_can_be_waited_for_from_another_thread() -> None:
    source: Future[Any] = Future()
    item = get_item_from_future(source, 0)
    waiting = threading.Event()
    results: list[Any] = []

    def look() -> None:
        waiting.set()
        results.append(item.result(10))

    thread = threading.Thread(target=look)
    thread.start()
    assert waiting.wait(10)
    source.set_result([4])
    thread.join(10)
    assert results == [4]


# Batches.


@repeatable
@given(
    outcomes=st.lists(st.sampled_from(["result", "error", "cancel"]), max_size=12),
    already=st.integers(0, 12),
    n=st.integers(1, 5),
    data=st.data(),
)
def test_batches(outcomes: list[str], already: int, n: int, data: st.DataObject) -> None:
    """Results in the order in which they come, groups resolved as soon as they are full, failed inputs last."""
    count = len(outcomes)
    futures: list[Future[Any]] = [Future() for _ in range(count)]
    order = data.draw(st.permutations(range(count)))
    results: list[int] = []
    errors: list[type[BaseException]] = []

    def finish(index: int) -> None:
        if outcomes[index] == "result":
            futures[index].set_result(index)
            results.append(index)
        elif outcomes[index] == "error":
            futures[index].set_exception(ZeroDivisionError(index))
            errors.append(ZeroDivisionError)
        else:
            futures[index].cancel()
            errors.append(CancelledError)

    # Those that are done before are taken in the order of the argument.
    for index in sorted(order[:already]):
        finish(index)
    groups = batched(futures, n)
    assert len(groups) == -(-count // n)
    for index in order[already:]:
        full = len(results) // n
        assert [group.done() for group in groups] == [number < full for number in range(len(groups))]
        finish(index)
    assert all(group.done() for group in groups)
    expected = [results[start : start + n] for start in range(0, count, n)]
    for start, (group, values) in enumerate(zip(groups, expected, strict=True)):
        if len(values) == min(n, count - start * n):
            assert group.result(0) == values
        else:
            assert type(group.exception(0)) in errors


def test_batches_of_nothing() -> None:
    assert batched([], 3) == []


def test_batches_of_values() -> None:
    later: Future[Any] = Future()
    first, second = batched([1, later, 2], 2)  # type: ignore[list-item]
    assert first.result(0) == [1, 2]
    later.set_result(3)
    assert second.result(0) == [3]


def test_batches_of_an_iterator() -> None:
    assert [group.result(0) for group in batched(iter([done(1), done(2), done(3)]), 2)] == [[1, 2], [3]]


def test_the_same_future_twice() -> None:
    assert batched([done(1)] * 3, 2)[1].result(0) == [1]


def test_each_failed_input_fails_one_group() -> None:
    errors = [ZeroDivisionError(number) for number in range(3)]
    groups = batched([done(0), *map(failed, errors), done(1)], 2)
    assert groups[0].result(0) == [0, 1]
    assert groups[1].exception(0) is errors[0]
    assert groups[2].exception(0) is errors[2]


def test_cancelled_group_leaves_the_others_alone() -> None:
    futures: list[Future[Any]] = [Future() for _ in range(4)]
    first, second = batched(futures, 2)
    assert first.cancel()
    for number, future in enumerate(futures):
        future.set_result(number)
    assert first.cancelled()
    assert second.result(0) == [2, 3]


def test_callback_that_finishes_further_inputs() -> None:
    futures: list[Future[Any]] = [Future() for _ in range(4)]
    first, second = batched(futures, 2)

    def finish_the_rest(_: Future[Any]) -> None:
        futures[2].set_result(2)
        futures[3].set_result(3)

    first.add_done_callback(finish_the_rest)
    futures[0].set_result(0)
    futures[1].set_result(1)
    assert second.result(0) == [2, 3]


def test_batches_from_many_threads() -> None:
    futures: list[Future[Any]] = [Future() for _ in range(400)]
    groups = batched(futures, 7)
    start = threading.Barrier(4)

    def finish(part: int) -> None:
        start.wait(10)
        for number in range(part, 400, 4):
            futures[number].set_result(number)

    threads = [threading.Thread(target=finish, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    together = [number for group in groups for number in group.result(0)]
    assert sorted(together) == list(range(400))
    assert {len(group.result(0)) for group in groups} == {7, 1}


def test_batches_keep_no_results() -> None:
    futures: list[Future[Any]] = [Future() for _ in range(2)]
    groups = batched(futures, 1)
    holder = Holder(1)
    reference = weakref.ref(holder)
    futures[0].set_result(holder)
    assert groups[0].result(0) == [holder]
    del holder, futures[0], groups[0]
    gc.collect()
    assert reference() is None
    futures[0].set_result(2)


@pytest.mark.parametrize(
    "derive", [lambda source: get_item_from_future(source, 0), lambda source: batched([source], 1)[0]]
)
def test_source_keeps_no_result_of_derived_futures(derive: Callable[[Future[Any]], Future[Any]]) -> None:
    source: Future[Any] = Future()
    reference = weakref.ref(derive(source))
    assert reference() is not None  # its callbacks may be all that anybody wants of it
    source.set_result([1])
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("key", [0, "not there"])
def test_derived_future_keeps_no_source(key: Any) -> None:
    """Its exception does not either, although the traceback has seen the source's result."""
    source: Future[Any] = Future()
    item = get_item_from_future(source, key)
    holder = Holder(1)
    references = weakref.ref(source), weakref.ref(holder)
    source.set_result([1, holder])
    assert item.done()
    del source, holder
    gc.collect()
    assert [reference() for reference in references] == [None, None]


# Callbacks that raise what is no Exception.


class Leave(BaseException):
    """Stands for SystemExit and KeyboardInterrupt."""


def leave(_: Future[Any]) -> None:
    raise Leave


@pytest.mark.parametrize("make", [Future, LeanFuture])
def test_all_callbacks_run_whatever_one_raises(make: Callable[[], Future[Any]]) -> None:
    source = make()
    source.add_done_callback(leave)
    told: list[Future[Any]] = []
    for receiver in (told.append, leave, told.append):
        when_done(source, receiver)
    with pytest.raises(Leave):
        source.set_result(1)
    assert told == [source, source]
    when_done(source, told.append)  # at once
    assert len(told) == 3


@pytest.mark.parametrize("make", [Future, LeanFuture])
def test_futures_of_one_source_do_not_depend_on_each_others_callbacks(make: Callable[[], Future[Any]]) -> None:
    source, other = make(), make()
    items = split_future(source, 3)
    groups = batched([other, source], 1)
    for future in (items[0], groups[1]):
        future.add_done_callback(leave)
    with pytest.raises(Leave):
        source.set_result("abc")
    with pytest.raises(Leave):
        other.set_exception(ZeroDivisionError())
    assert [item.result(0) for item in items] == ["a", "b", "c"]
    assert groups[0].result(0) == ["abc"]
    assert isinstance(groups[1].exception(0), ZeroDivisionError)


def test_callbacks_of_a_class_with_its_own_way_to_add_them() -> None:
    class Relayed(Future[Any]):
        def add_done_callback(self, fn: Callable[[Future[Any]], object]) -> None:
            relayed.append(fn)

    relayed: list[Callable[[Future[Any]], object]] = []
    future = Relayed()
    told: list[Future[Any]] = []
    when_done(future, told.append)
    [callback] = relayed
    callback(future)
    assert told == [future]
