"""Stand-ins, by which one part is tested without the others: loop, launchers, queuing systems, workers, clock."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from executorlib.core.task import Task
from executorlib.launchers import contract
from executorlib.launchers.contract import Exit, Lifetime, Process
from executorlib.resources import Resources


class Clock:
    """A `time.monotonic` that goes on when a test says so.

    Args:
        patch: Installs it.
        now: What it shows at first; with ``running``, how far it is ahead of the real one.
        running: Whether it goes on by itself, too.
    """

    def __init__(self, patch: pytest.MonkeyPatch, now: float = 0.0, running: bool = False) -> None:
        self.now = now
        real = time.monotonic if running else lambda: 0.0
        patch.setattr(time, "monotonic", lambda: real() + self.now)


def process(number: int = 1, *calls: Task, lifetime: Lifetime = Lifetime.CALL, **resources: Any) -> Process:
    """A worker's process that no launcher has started."""
    return Process(number, Resources(**resources), lifetime, calls=calls)


class Events(contract.Events):
    """Stands for the loop: notes what it is told, and has inputs at hand.

    Attributes:
        told: "connected", "exit", and the names of messages.
        exits: By the worker's number: why it ended; nothing where it ended well.
        timers: What is to be called later, which `run_timers` does.
        prompt: Whether what is due in no time runs at once.
    """

    def __init__(self, prompt: bool = False) -> None:
        self.told: list[Any] = []
        self.exits: dict[int, str] = {}
        self.timers: list[Callable[[], None]] = []
        self.prompt = prompt

    def watch(self, fileobj: Any, callback: Callable[[], None]) -> None: ...

    def unwatch(self, fileobj: Any) -> None: ...

    def call_later(self, seconds: float, callback: Callable[[], None]) -> None:
        if self.prompt and not seconds:
            callback()
        else:
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
        number = process.number
        assert number not in self.exits
        self.exits[number] = "" if end.status == 0 else str(end.error or end.text)

    @property
    def ends(self) -> list[str]:
        return list(self.exits.values())

    def inputs_of(self, task: Task) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return task.args, task.kwargs

    def is_changed(self, task: Task) -> bool:
        return False


class System:
    """A queuing system that takes every batch as job 7, notes what it is asked, and says what a test has it say.

    Attributes:
        answer: Tells the states that were asked for last.
        cancels: The jobs of each request to cancel.
    """

    name = "a queue"
    first_query = last_query = 0.0
    array_limit = 10
    element_variables = ()
    busy = False

    def __init__(self) -> None:
        self.answer: Callable[[Any], None] | None = None
        self.cancels: list[list[Any]] = []

    @property
    def cancelled(self) -> list[Any]:
        return [job for jobs in self.cancels for job in jobs]

    def can_wait_for(self, dependency: Any) -> bool:
        return True

    def about(self) -> dict[str, str]:
        return {}

    def setup(self) -> dict[str, Any]:
        return {}

    def is_gone(self, owner: Any) -> bool:
        return False

    def listen(self, on_change: Callable[[], None]) -> None: ...

    def prepare(self, on_ready: Callable[[], None]) -> None:
        on_ready()

    def submit(self, batch: Any, on_done: Callable[[Any], None]) -> None:
        on_done("7")

    def query(self, job_ids: Any, on_states: Callable[[Any], None]) -> None:
        self.answer = on_states

    def say(self, states: Any) -> None:
        """Answer the last query."""
        answer, self.answer = self.answer, None
        assert answer is not None
        answer(states)

    def cancel(self, jobs: Sequence[Any]) -> None:
        self.cancels.append(list(jobs))

    def close(self) -> None: ...


class Silent:
    """A transport into nowhere."""

    def put(self, header: Any, frames: Any = ()) -> int:
        return 0

    def flush(self) -> None: ...

    def close(self) -> None: ...


class NoWorkers(contract.Launcher):
    """A launcher that cannot start any."""

    def __init__(self, events: contract.Events) -> None:
        self.events = events

    def launch(self, process: Process) -> None:
        self.events.on_exit(process, Exit(None, "there are no workers"))

    def kill(self, process: Process, signal_number: int) -> None: ...

    def close(self) -> None: ...


class InstantLauncher(contract.Launcher):
    """Connects a worker while it is being launched, then does what the test says."""

    def __init__(self, events: contract.Events, then: Callable[[contract.Events, Process], None]) -> None:
        self.events = events
        self.then = then
        self.alive: set[int] = set()

    def launch(self, process: Process) -> None:
        process.transport = Silent()
        self.alive.add(process.number)
        self.events.on_connected(process)
        self.then(self.events, process)

    def kill(self, process: Process, signal_number: int) -> None:
        self.events.call_later(0, lambda: self.exit(process))

    def exit(self, process: Process) -> None:
        if process.number in self.alive:
            self.alive.remove(process.number)
            self.events.on_exit(process, Exit(signal.SIGKILL, "it was killed"))

    def close(self) -> None: ...
