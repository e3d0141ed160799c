"""Programs that users may write. Type checkers accept them, and infer these types. It is not run."""

from __future__ import annotations

import functools
import math
import operator
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from typing_extensions import assert_type

from executorlib import (
    BaseExecutor,
    FluxClusterExecutor,
    FluxJobExecutor,
    ResourceDict,
    SingleNodeExecutor,
    SlurmClusterExecutor,
    SlurmJobExecutor,
    get_cache_data,
    get_future_from_cache,
    get_item_from_future,
    split_future,
)
from executorlib.api import ExecutorlibSocketError, TestClusterExecutor

V = TypeVar("V")


def add(a: float, b: float = 0.0) -> float:
    return a + b


def count(text: str) -> int:
    return len(text)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def average(values: Sequence[float], power: int) -> float:
    return sum(value**power for value in values) / len(values)


def extremes(values: list[float]) -> tuple[float, str]:
    return min(values), str(max(values))


def describe(values: Mapping[str, float]) -> dict[str, float]:
    return dict(values)


def many(*values: float, scale: float = 1.0) -> list[float]:
    return [scale * value for value in values]


def four(a: int, b: str, c: float, d: bool) -> bool:
    return d


def only_by_name(*, a: float, b: str) -> str:
    return b * int(a)


def same(value: V) -> V:
    return value


def untyped(a, b):  # type: ignore[no-untyped-def]
    return a


def load() -> dict[str, float]:
    return {"model": 1.5}


def predict(x: int, model: float, executorlib_worker_id: int) -> float:
    return model * x + executorlib_worker_id


@dataclass
class Cell:
    size: float

    def scaled(self, by: float) -> Cell:
        return Cell(by * self.size)

    def __call__(self, times: int) -> str:
        return str(times * self.size)


def volume(cell: Cell) -> float:
    return cell.size**3


with SingleNodeExecutor(max_workers=2) as executor:
    assert_type(executor, SingleNodeExecutor)

    # Plain values.
    number = executor.submit(add, 1, 2.5)
    assert_type(number, Future[float])
    assert_type(number.result(), float)
    assert_type(executor.submit(add, 1, b=2), Future[float])
    assert_type(executor.submit(add, a=1, b=2), Future[float])
    assert_type(executor.submit(load), Future[dict[str, float]])
    assert_type(executor.submit(four, 1, "x", 2, True), Future[bool])
    assert_type(executor.submit(many, 1, 2, 3, 4, 5, scale=2), Future[list[float]])
    assert_type(executor.submit(only_by_name, a=1, b="x"), Future[str])
    assert_type(executor.submit(same, "x"), Future[str])
    assert_type(executor.submit(mean, [1, 2.5]), Future[float])

    # Any callable.
    assert_type(executor.submit(Cell, 2), Future[Cell])
    assert_type(executor.submit(Cell(2).scaled, 3), Future[Cell])
    assert_type(executor.submit(Cell(2), 3), Future[str])
    assert_type(executor.submit(functools.partial(add, 1), 2), Future[float])
    assert_type(executor.submit(lambda: 1), Future[int])
    assert_type(executor.submit(time.sleep, 0.1), Future[None])
    assert_type(executor.submit(abs, -1), Future[int])
    assert_type(executor.submit(int, "3"), Future[int])
    assert_type(executor.submit(math.sqrt, 2), Future[float])
    assert_type(executor.submit(max, 1, 2), Future[int])
    assert_type(executor.submit(round, 2.5, 1), Future[float])
    executor.submit(lambda a, b: a + b, 1, 2)
    executor.submit(print, "a", "b", sep="")
    executor.submit(sum, (x * x for x in range(3)))
    executor.submit(untyped, 1, 2)

    # Futures in place of values, whatever stands beside them.
    length = executor.submit(count, "abc")
    assert_type(executor.submit(add, number, 2), Future[float])
    assert_type(executor.submit(add, length, number), Future[float])
    assert_type(executor.submit(add, 1, number), Future[float])
    assert_type(executor.submit(add, 1, b=number), Future[float])
    assert_type(executor.submit(add, a=number, b=1), Future[float])
    assert_type(executor.submit(only_by_name, a=number, b="x"), Future[str])
    assert_type(executor.submit(four, length, "x", number, True), Future[bool])
    assert_type(executor.submit(four, 1, "x", 2.5, executor.submit(bool, 1)), Future[bool])
    assert_type(executor.submit(many, number, 1, 2, 3, length, scale=number), Future[list[float]])
    assert_type(executor.submit(volume, executor.submit(Cell, number)), Future[float])
    assert_type(executor.submit(Cell(2).scaled, number), Future[Cell])
    assert_type(executor.submit(math.sqrt, length), Future[float])
    assert_type(executor.submit(str, number), Future[str])
    executor.submit(same, number)
    executor.submit(lambda a, b: a + b, number, 1)
    executor.submit(max, number, length)
    executor.submit(pow, number, 2)
    executor.submit(round, number, 2)
    executor.submit(operator.add, 1, number)
    executor.submit(untyped, number, 1)

    # Also inside of containers.
    assert_type(executor.submit(mean, [number, number]), Future[float])
    assert_type(executor.submit(mean, [number, 1.5]), Future[float])
    assert_type(executor.submit(mean, [executor.submit(add, x) for x in range(3)]), Future[float])
    assert_type(executor.submit(describe, {"a": number, "b": 1}), Future[dict[str, float]])
    assert_type(executor.submit(describe, values={"a": number}), Future[dict[str, float]])
    executor.submit(sum, [number, length, 100])
    executor.submit(sum, (number, number))
    executor.submit(sorted, [number, number])
    executor.submit(list, {number, length})

    # From elsewhere.
    kept: Future[Any] = get_future_from_cache("cache", "key")
    assert_type(executor.submit(add, kept, 2), Future[float])
    unknown: Any = kept
    assert_type(executor.submit(add, unknown), Future[float])
    executor.submit(unknown, 1, 2)
    positional = (1.0, 2.0)
    assert_type(executor.submit(add, *positional), Future[float])
    named: dict[str, Any] = {"a": 1}
    executor.submit(add, **named).result() + 1

    # Resources. With `cores` the result may be a list of all ranks' results.
    assert_type(executor.submit(add, 1, 2, resource_dict={"threads_per_core": 2, "cwd": Path("x")}), Future[float])
    assert_type(executor.submit(add, number, resource_dict={"run_time_max": 1, "cache_key": None}), Future[float])
    assert_type(executor.submit(add, a=number, b=1, resource_dict={"priority": 1}), Future[float])
    assert_type(executor.submit(add, 1, resource_dict={}), Future[float])
    assert_type(executor.submit(add, 1, resource_dict=None), Future[float])
    executor.submit(add, 1, resource_dict={"cores": 2}).result()[0] + 1
    ranks: Future[list[float]] = executor.submit(add, number, 1, resource_dict={"cores": 2, "exclusive": True})
    needs: ResourceDict = {"threads_per_core": 2}
    needs["cores"] = 2
    executor.submit(add, 1, resource_dict=needs).result()[0] + 1
    executor.submit(lambda a: a, 1, resource_dict={"slurm_cmd_args": ["--quiet"], "num_nodes": 1})

    # Results, and what is made of them.
    assert_type(executor.map(add, [1, 2], [3.5, 4]), Iterator[float])
    assert_type(list(executor.map(count, "abc", timeout=1, chunksize=2, buffersize=3)), list[int])
    for value in executor.map(math.sqrt, executor.submit(many, 1, 2)):
        assert_type(value, float)
    numbers = [executor.submit(add, x) for x in range(5)]
    assert_type(numbers, list[Future[float]])
    assert_type(executor.batched(numbers, 2), list[Future[list[float]]])
    assert_type([executor.submit(mean, batch) for batch in executor.batched(numbers, 2)], list[Future[float]])
    executor.batched([number, length], 2)
    executor.batched([number, 1.5], 2)
    values = executor.submit(many, 1, 2)
    assert_type(split_future(values, 2), list[Future[float]])
    assert_type(get_item_from_future(values, 0), Future[float])
    assert_type(get_item_from_future(executor.submit(describe, {"a": 1}), "a"), Future[float])
    low, high = split_future(executor.submit(extremes, [1, 2]), 2)
    low.result() + 1
    high.result().upper()
    get_item_from_future(executor.submit(extremes, [1, 2]), 1).result().upper()


# All constructors. Those of cluster executors take keys of the user's own submission template as well.
def constructors() -> Iterator[BaseExecutor]:
    yield SingleNodeExecutor(
        2,
        cache_directory=Path("cache"),
        resource_dict={"cores": 1, "threads_per_core": 2},
        block_allocation=True,
        init_function=load,
        preload=["json"],
        gpus=["0"],
        start_method="fork",
        cache_versions="key",
        log_records=True,
    )
    yield SlurmJobExecutor(max_cores=4, resource_dict=needs, pmi_mode="pmix", restart_limit=1)
    yield FluxJobExecutor(resource_dict={"queue": "debug", "cores": 2}, flux_log_files=True)
    further: dict[str, Any] = {"my_key": 1}
    yield SlurmClusterExecutor(resource_dict={"partition": "main", "memory_max": 4}, pysqa_config_directory="config")
    yield FluxClusterExecutor(resource_dict=further, wait=False)
    yield TestClusterExecutor(resource_dict={**needs, "partition": "main"})


with SlurmClusterExecutor(resource_dict={"partition": "main"}) as cluster:
    assert_type(cluster.submit(add, 1, 2), Future[float])
    assert_type(cluster.submit(add, number, resource_dict={"run_time_max": 60}), Future[float])
    executor.submit(add, cluster.submit(add, 1, 2, resource_dict={"memory_max": 4, "my_key": "x"}), 2)
    own = {"partition": "main", "memory_max": 4}
    cluster.submit(add, 1, resource_dict=own)
with FluxJobExecutor() as flux:
    flux.submit(add, 1, resource_dict={"queue": "debug"})
with TestClusterExecutor() as test:
    test.submit(add, 1, resource_dict={"queue": "debug"})


# The call leaves out the parameters that `init_function` and the worker's number fill.
with SingleNodeExecutor(block_allocation=True, init_function=load) as block:
    assert_type(block.submit(predict, 1), Future[float])
    assert_type(block.submit(predict, length), Future[float])
    assert_type(block.submit(predict, x=1), Future[float])
    block.max_workers = 3


def generic(executor: BaseExecutor, function: Callable[..., V], inputs: Sequence[Future[float]]) -> Future[V]:
    assert_type(executor.submit(mean, inputs), Future[float])
    assert_type(executor.submit(average, inputs, 2), Future[float])
    return executor.submit(function, inputs, executor.submit(many, 1))


def either(executor: BaseExecutor, value: float | Future[float], needs: ResourceDict) -> Future[float]:
    executor.submit(add, 1, value, resource_dict=needs)
    return executor.submit(add, value, 2)


def standard(executor: Executor) -> Future[float]:
    return executor.submit(add, 1, 2)


standard(SingleNodeExecutor())
wide: Future[float] = executor.submit(add, 1, 2)


class Logging(SingleNodeExecutor):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return super().submit(fn, *args, **kwargs)


assert_type(Logging().submit(add, 1), Future[Any])
assert_type(get_cache_data("cache"), list[dict[str, Any]])
try:
    number.result(timeout=1)
except ExecutorlibSocketError as error:
    assert_type(error.args, tuple[Any, ...])
