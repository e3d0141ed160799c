"""Mistakes that type checkers find: an error in each line that says so, and in no other. It is not run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import Future

from executorlib import (
    ResourceDict,
    SingleNodeExecutor,
    SlurmClusterExecutor,
    SlurmJobExecutor,
    get_item_from_future,
    split_future,
)


def add(a: float, b: float = 0.0) -> float:
    return a + b


def four(a: int, b: str, c: float, d: bool) -> bool:
    return d


def nothing() -> int:
    return 1


def many(count: int) -> list[float]:
    return count * [1.0]


class Cell:
    def __init__(self, size: float) -> None:
        self.size = size

    def scaled(self, by: float) -> Cell:
        return Cell(by * self.size)


executor = SingleNodeExecutor()
number = executor.submit(add, 1, 2)

# Wrong arguments, and too many.
executor.submit(add, "x", 2)  # E
executor.submit(add, 1, "x")  # E
executor.submit(add, "x", b=2)  # E
executor.submit(add, "x", b=number)  # E
executor.submit(add, "x", resource_dict={"priority": 1, "core": 1})  # E
executor.submit(add, 1, 2, 3)  # E
executor.submit(nothing, 1)  # E
executor.submit(four, 1, 2, 3.5, True)  # E
executor.submit(four, 1, "x", "y", True)  # E
executor.submit(math.sqrt, "x")  # E
executor.submit(Cell, "x")  # E
executor.submit(Cell(1).scaled, "x")  # E
executor.submit("add", 1)  # E
executor.submit()  # E
SlurmClusterExecutor().submit(add, "x")  # E

# Wrong keys and values of resource_dict.
executor.submit(add, 1, resource_dict={"core": 2})  # E
executor.submit(add, 1, 2, resource_dict={"cores": 2, "thread_per_core": 2})  # E
executor.submit(add, number, resource_dict={"core": 2})  # E
executor.submit(add, a=number, resource_dict={"core": 2})  # E
executor.submit(add, 1, resource_dict={"cores": "2"})  # E
executor.submit(add, 1, resource_dict={"run_time_max": "1:00"})  # E
executor.submit(add, 1, resource_dict={"slurm_cmd_args": "--quiet"})  # E
executor.submit(add, 1, resource_dict={"partition": "main"})  # E
executor.submit(add, 1, resource_dict=[("cores", 2)])  # E
SingleNodeExecutor(resource_dict={"core": 2})  # E
SingleNodeExecutor(resource_dict={"threads_per_core": 1.5})  # E
SlurmJobExecutor(resource_dict={"memory_max": 4})  # E
needs: ResourceDict = {"gpu_per_core": 1}  # E
SingleNodeExecutor(max_worker=2)  # E
SingleNodeExecutor(max_workers="2")  # E
SlurmClusterExecutor(resource_dict=[("cores", 2)])  # E

# Results that are used as what they are not.
text: str = executor.submit(add, 1, 2).result()  # E
texts: Future[str] = executor.submit(add, number, 2)  # E
executor.submit(add, 1, resource_dict={"threads_per_core": 2}).result().upper()  # E
mapped: Iterator[str] = executor.map(add, [1, 2])  # E
get_item_from_future(executor.submit(many, 2), 0).result().upper()  # E
split_future(executor.submit(many, 2), 2)[0].result().upper()  # E
executor.batched([number], 2)[0].result()[0].upper()  # E
executor.map(3, [1, 2])  # E
executor.batched(number, 2)  # E
