"""Libraries combine executors with classes of their own; that keeps working."""

from __future__ import annotations

from typing import Any

import pytest

from contract.functions import add

WAIT = 30
pytestmark = pytest.mark.rows("fork", "block-fork", "jobs", "block-jobs")


def test_mixed_in_before_the_executor(row: Any) -> None:
    from executorlib import BaseExecutor

    class Counting(BaseExecutor):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.submitted = 0

        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
            self.submitted += 1
            return super().submit(fn, *args, **kwargs)

    class CountingExecutor(Counting, row.executor_class):
        pass

    with CountingExecutor(**row.arguments()) as executor:
        assert executor.submit(add, 1, b=2).result(WAIT) == 3
        assert executor.submitted == 1
        assert list(executor.map(add, [1], [2])) == [3]
        assert executor.max_workers == 2
        assert isinstance(executor, BaseExecutor)


def test_mixed_in_after_the_executor(row: Any) -> None:
    from executorlib import BaseExecutor

    class Named(BaseExecutor):
        name = "default"

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

    class NamedExecutor(row.executor_class, Named):
        def __init__(self, *args: Any, name: str, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.name = name

    with NamedExecutor(name="mine", **row.arguments()) as executor:
        assert executor.name == "mine"
        assert executor.submit(add, 1, 2).result(WAIT) == 3


@pytest.mark.rows(block=False)
def test_resources_added_by_a_subclass(row: Any, tmp_path: Any) -> None:
    """The keys that a subclass puts in are the call's own."""
    import os

    from executorlib import BaseExecutor

    class InFolder(BaseExecutor):
        folder = str(tmp_path / "there")

        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
            kwargs["resource_dict"] = {**kwargs.get("resource_dict", {}), "cwd": self.folder}
            return super().submit(fn, *args, **kwargs)

    class InFolderExecutor(InFolder, row.executor_class):
        pass

    with InFolderExecutor(**row.arguments()) as executor:
        future = executor.submit(os.getcwd, resource_dict={"priority": 1})
        assert future.result(WAIT) == str(tmp_path / "there")


def test_positional_arguments(row: Any) -> None:
    """The order of the constructor's first arguments is part of the contract."""
    folder = row.arguments().get("cache_directory")
    with row.executor_class(2, folder, 4, {"threads_per_core": 2}) as executor:
        assert executor.max_workers == 2
        assert executor.info["max_cores"] == 4
        assert executor.submit(add, 1, 2).result(WAIT) == 3
