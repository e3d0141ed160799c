"""Workers that are jobs, without a loop and a system."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from executorlib.launchers.base import Process
from executorlib.launchers.job_workers import JobWorkerLauncher
from executorlib.ledger import Allocation
from executorlib.resources import Resources
from executorlib.scheduler import Worker


class Events:
    """All timers are due at once."""

    def watch(self, fileobj: Any, callback: Callable[[], None]) -> None:
        pass

    def unwatch(self, fileobj: Any) -> None:
        pass

    def call_later(self, seconds: float, callback: Callable[[], None]) -> None:
        callback()


class System:
    """Notes what is submitted."""

    name = "a queue"
    first_query = last_query = 0.0
    array_limit = 10
    busy = False

    def __init__(self) -> None:
        self.batches: list[Any] = []

    def prepare(self, on_ready: Callable[[], None]) -> None:
        on_ready()

    def submit(self, batch: Any, on_done: Callable[[Any], None]) -> None:
        self.batches.append(batch)

    def close(self) -> None:
        pass


@pytest.fixture
def system() -> System:
    return System()


@pytest.fixture
def make(system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], JobWorkerLauncher]]:
    """Makes launchers."""
    monkeypatch.setattr("executorlib.launchers.job_workers._LINGER", 0.0)
    made: list[JobWorkerLauncher] = []

    def make() -> JobWorkerLauncher:
        made.append(
            JobWorkerLauncher(
                cast("Any", Events()), cast("Any", system), lambda _resources, program: program, str(tmp_path), True
            )
        )
        made[-1].prepare()
        return made[-1]

    yield make
    for launcher in made:
        launcher.close()


def process(number: int, **resources: Any) -> Process:
    return Process(Worker(number, 0, Allocation.__new__(Allocation)), Resources(**resources), single=False)


def test_workers_start_where_their_executor_was_made(
    make: Callable[[], JobWorkerLauncher], system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever that is, and unless they are to start elsewhere."""
    (tmp_path / "made").mkdir()
    monkeypatch.chdir(tmp_path / "made")
    launcher = make()
    monkeypatch.chdir("/")
    launcher.launch(process(1))
    launcher.launch(process(2, cwd=str(tmp_path / "given")))
    assert [batch.cwd for batch in system.batches] == [str(tmp_path / "made"), str(tmp_path / "given")]


def test_executor_that_is_made_in_a_directory_that_was_removed(
    make: Callable[[], JobWorkerLauncher], system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    make().launch(process(1))
    assert [batch.cwd for batch in system.batches] == [os.path.expanduser("~")]
