"""The launcher of jobs without a loop: what it tells the loop, and in which order."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from executorlib import entries
from executorlib.launchers.base import Exit, Process
from executorlib.launchers.jobs import JobLauncher
from executorlib.launchers.queue import JobState, Phase
from executorlib.ledger import Allocation
from executorlib.resources import Resources
from executorlib.scheduler import Worker
from executorlib.task import LAUNCHING, READY, RUNNING, Task

pytestmark = pytest.mark.cache


class Events:
    """Notes what it is told; timers run when the test says so."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.timers: list[Callable[[], None]] = []

    def call_later(self, seconds: float, callback: Callable[[], None]) -> None:
        self.timers.append(callback)

    def run_timers(self) -> None:
        timers, self.timers = self.timers, []
        for timer in timers:
            timer()

    def on_connected(self, process: Process) -> None:
        self.told.append("connected")

    def on_message(self, process: Process, header: list[Any], frames: list[Any]) -> None:
        self.told.append(header[0])

    def on_exit(self, process: Process, end: Exit) -> None:
        self.told.append("exit")


class System:
    """Takes every batch; says of its jobs what the test wants."""

    name = "a queue"
    first_query = last_query = 0.0
    array_limit = 10
    has_dependencies = True
    busy = False
    answer: Any = None

    def prepare(self, on_ready: Callable[[], None]) -> None:
        on_ready()

    def setup(self) -> dict[str, Any]:
        return {}

    def submit(self, batch: Any, on_done: Callable[[Any], None]) -> None:
        on_done("7")

    def query(self, job_ids: Any, on_states: Callable[[Any], None]) -> None:
        self.answer = on_states


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Events:
    # All timers are due at once.
    monkeypatch.setattr("executorlib.launchers.submitter._LINGER", 0.0)
    monkeypatch.setattr("executorlib.launchers.jobs._LOOK_SECONDS", 0.0)
    return Events()


def launched(events: Any, system: Any, folder: Path, key: str = "a") -> tuple[JobLauncher, Task, Process]:
    resources = Resources(cache_directory=str(folder))
    task = Task(1, abs, (-1,), {}, Future(), resources, resources.demand)
    task.cache_path = str(folder / f"{key}_o.h5")
    task.move(READY)
    task.move(LAUNCHING)
    worker = Worker(1, 0, Allocation.__new__(Allocation))
    worker.calls.append(task)
    process = Process(worker, resources, single=True)
    launcher = JobLauncher(events, system, lambda _resources, program: program, False)
    launcher.prepare()
    launcher.launch(process)
    return launcher, task, process


def test_result_that_is_there_before_the_call_was_told_that_it_runs(events: Events, tmp_path: Path) -> None:
    """A job that the system says runs, and that ends at the same moment."""
    system = System()
    _launcher, task, process = launched(events, system, tmp_path)
    while system.answer is None:
        events.run_timers()
    system.answer({("7", None): JobState(Phase.RUNNING, "RUNNING")})
    assert events.told == ["connected"]
    entries.write_output(task.cache_path, function=abs, args=[-1], kwargs={}, resource_dict={}, runtime=0.1, output=1)
    assert process.transport is not None
    while process.transport._job.ending is None:
        events.run_timers()
    assert events.told == ["connected"]
    task.move(RUNNING)
    process.transport.flush()
    assert events.told == ["connected", "result", "exit"]
