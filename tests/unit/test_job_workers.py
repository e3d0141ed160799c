"""Workers that are jobs, without a loop and a system."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

import fakes
from executorlib.jobs import workers as job_workers
from executorlib.jobs.queue import JobState, Limit, Phase
from executorlib.jobs.system import Refused
from executorlib.jobs.workers import JobWorkerLauncher
from executorlib.launchers.contract import Lifetime, Process
from fakes import Clock, Events, System


class Asked(System):
    """Notes what it is asked, and leaves the answers to the test."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[Any] = []
        self.answers: list[Callable[[Any], None]] = []
        self.asked: list[tuple[Any, Callable[[Any], None]]] = []
        self.queries: list[Callable[[Any], None]] = []

    def submit(self, batch: Any, on_done: Callable[[Any], None]) -> None:
        self.batches.append(batch)
        self.answers.append(on_done)

    def detail(self, job: Any, on_state: Callable[[Any], None]) -> None:
        self.asked.append((job, on_state))

    def query(self, job_ids: Any, on_states: Callable[[Any], None]) -> None:
        self.queries.append(on_states)


@pytest.fixture
def system() -> Asked:
    return Asked()


@pytest.fixture
def events() -> Events:
    return Events(prompt=True)


@pytest.fixture
def make(
    system: Asked, events: Events, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], JobWorkerLauncher]]:
    """Makes launchers."""
    monkeypatch.setattr("executorlib.jobs.workers._LINGER", 0.0)
    made: list[JobWorkerLauncher] = []

    def make() -> JobWorkerLauncher:
        made.append(
            JobWorkerLauncher(events, cast("Any", system), lambda _resources, program: program, str(tmp_path), True)
        )
        made[-1].prepare()
        return made[-1]

    yield make
    for launcher in made:
        launcher.close()


def process(number: int, **resources: Any) -> Process:
    return fakes.process(number, lifetime=Lifetime.BLOCK, **resources)


def test_workers_start_where_their_executor_was_made(
    make: Callable[[], JobWorkerLauncher], system: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    make: Callable[[], JobWorkerLauncher], system: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    make().launch(process(1))
    assert [batch.cwd for batch in system.batches] == [os.path.expanduser("~")]


# A worker that is gone.

PEER = b"1-0.a"
ENDED = JobState(Phase.ENDED, "FAILED", exit_code="137:0", node="node7")


def lose(launcher: JobWorkerLauncher) -> Process:
    """Have a worker connect, and lose it."""
    worker = process(1)
    launcher.launch(worker)
    launcher._on_message(PEER, ["hello", {"host": "node7", "pid": 70, "size": 1, "library": ""}], [])
    launcher._on_lost(PEER)
    return worker


def test_the_system_tells_how_a_worker_ended(
    make: Callable[[], JobWorkerLauncher], system: Asked, events: Events
) -> None:
    """That may take a moment, and a quick job may end before its id is known."""
    lose(make())
    assert system.asked == []
    system.answers[0]("17")
    events.run_timers()
    ((job, tell),) = system.asked
    assert job == ("17", None)
    tell(None)
    events.run_timers()
    system.asked[1][1](ENDED)
    assert events.ends == ["job 17 ended as FAILED (exit code 137:0 by SIGKILL, node node7)"]
    assert system.cancelled == []


def test_a_job_that_goes_on_without_its_worker_is_cancelled(
    make: Callable[[], JobWorkerLauncher], system: Asked, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its node is cut off, or it was stopped, so nobody else would end it."""
    monkeypatch.setattr(job_workers, "_KNOW_SECONDS", -1.0)
    launcher = make()
    worker = process(1)
    launcher.launch(worker)
    system.answers[0]("17")
    launcher._on_message(PEER, ["hello", {"host": "node7", "pid": 70, "size": 1, "library": ""}], [])
    launcher._on_lost(PEER)
    system.asked[0][1](JobState(Phase.RUNNING, "RUNNING"))
    assert events.ends == ["job 17 lost its connection"]
    assert system.cancelled == [("17", None)]


def test_a_worker_that_is_ended_while_the_system_is_asked(
    make: Callable[[], JobWorkerLauncher], system: Asked, events: Events
) -> None:
    """Its end is reported once, whatever the system answers afterwards."""
    launcher = make()
    worker = lose(launcher)
    system.answers[0]("17")
    events.run_timers()
    launcher.kill(worker, 9)
    for _, tell in system.asked:
        tell(ENDED)
    assert events.ends == ["its job was cancelled"]


def test_requeued_worker_that_was_given_up_is_sent_away(
    make: Callable[[], JobWorkerLauncher], system: Asked, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It went back into the queue after its worker was given up. It is sent away instead of waiting for a call."""
    launcher = make()
    sent: list[Any] = []
    monkeypatch.setattr(launcher._router, "send", lambda peer, header, frames: sent.append((peer, header)))
    launcher._on_message(b"1-0.b", ["hello", {"host": "node7", "pid": 71, "size": 1, "library": ""}], [])
    assert sent == [(b"1-0.b", ["stop"])]


def hello(launcher: JobWorkerLauncher, peer: bytes) -> None:
    launcher._on_message(peer, ["hello", {"host": "node7", "pid": 70, "size": 1, "library": ""}], [])


def test_query_that_misses_a_healthy_job(make: Callable[[], JobWorkerLauncher], system: Asked, events: Events) -> None:
    """If the system knows it when asked again, or the worker connects, it is as healthy as any other."""
    launcher = make()
    launcher.launch(process(1))
    system.answers[0]("17")
    for state, connects in ((JobState(Phase.PENDING, "PENDING"), False), (None, True)):
        events.run_timers()
        system.queries.pop()({})
        if connects:
            hello(launcher, PEER)
        system.asked.pop()[1](state)
        events.run_timers()
        assert system.asked == []
    launcher._on_lost(PEER)
    assert [job for job, _ in system.asked] == [("17", None)]
    assert events.ends == []


def test_jobs_that_are_not_needed_are_cancelled_together(
    make: Callable[[], JobWorkerLauncher], system: Asked, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system, "prepare", lambda on_ready: None)
    launcher = make()
    workers = [process(number) for number in (1, 2, 3)]
    for worker in workers:
        launcher.launch(worker)
    launcher._on_prepared()
    system.answers[0]("17")
    monkeypatch.setattr(events, "call_later", lambda seconds, callback: events.timers.append(callback))
    for worker in workers:
        launcher.kill(worker, 9)
    assert launcher.busy
    events.run_timers()
    assert system.cancels == [[("17", 0), ("17", 1), ("17", 2)]]
    assert not launcher.busy


def test_a_system_that_does_not_answer_after_a_long_time(
    make: Callable[[], JobWorkerLauncher], system: Asked, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Submissions late in a session are repeated as long as at its start. Only then are they an error."""
    clock = Clock(monkeypatch, 0.0)
    launcher = make()
    launcher.launch(process(1))
    system.answers.pop()("17")
    away = Refused("the controller cannot be reached", transient=True)
    clock.now = 10_000.0
    launcher.launch(process(2))
    for moment in (10_000.0, 10_200.0, 10_400.0):
        clock.now = moment
        assert events.ends == []
        system.answers.pop()(away)
        clock.now += 6.0
        events.run_timers()
    assert "did not accept its job: the controller cannot be reached" in events.ends[0]


def test_a_worker_that_an_administrator_holds(
    make: Callable[[], JobWorkerLauncher], system: Asked, events: Events, caplog: pytest.LogCaptureFixture
) -> None:
    """It waits, and the user is told why."""
    make().launch(process(1))
    system.answers[0]("17")
    for _ in range(3):
        events.run_timers()
        system.queries.pop()({("17", 0): JobState(Phase.PENDING, "PENDING", "JobHeldAdmin", held=True)})
    assert events.ends == system.cancelled == []
    (record,) = caplog.records
    assert "worker 1 waits: an administrator holds its job 17 (JobHeldAdmin)" in record.getMessage()


# More workers than the system lets in.

TOO_MANY = Refused("too many jobs", limit=Limit.OWN)


def submitted(system: Asked) -> tuple[list[int], Callable[[Any], None]]:
    """How many workers each request that is not answered has, and the answer to the last one."""
    sizes = [batch.count for batch in system.batches[-len(system.answers) :]] if system.answers else []
    return sizes, system.answers.pop()


def test_more_workers_than_the_system_accepts(
    make: Callable[[], JobWorkerLauncher],
    system: Asked,
    events: Events,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As many as fit start at once, and the others when there is room. The user is told at once."""
    clock = Clock(monkeypatch, 100.0)
    monkeypatch.setattr(system, "prepare", lambda on_ready: None)
    launcher = make()
    workers = [process(number) for number in range(1, 9)]
    for worker in workers:
        launcher.launch(worker)
    launcher._on_prepared()
    sizes, answer = submitted(system)
    assert sizes == [8]
    answer(TOO_MANY)
    (record,) = caplog.records
    assert "8 workers are more jobs than a queue accepts now" in record.getMessage()
    in_system = 0
    while system.answers:
        (size,), answer = submitted(system)
        fits = in_system + size <= 5
        in_system += size if fits else 0
        answer(str(100 + len(system.batches)) if fits else TOO_MANY)
    assert in_system == 5
    launcher.kill(workers[0], 9)
    launcher.kill(workers[1], 9)
    assert not system.answers, "the system has to see their ends first"
    clock.now += 1.0
    events.run_timers()
    sizes, answer = submitted(system)
    assert sizes == [2]
    answer("200")
    assert len(caplog.records) == 1
    launcher.kill(workers[7], 9)
    assert events.ends == ["its job was cancelled"] * 2 + ["it was no longer needed"]


def test_a_limit_under_which_no_worker_ever_fits(
    make: Callable[[], JobWorkerLauncher], system: Asked, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the user has other jobs, these may end. Otherwise, it is an error after some minutes."""
    clock = Clock(monkeypatch, 100.0)
    make().launch(process(1))
    for states in ({("1", None): JobState(Phase.RUNNING, "RUNNING")},) * 20 + ({("1", None): ENDED}, {}) * 8:
        if not system.answers:
            break
        assert events.ends == []
        system.answers.pop()(TOO_MANY)
        system.queries.pop()(states)
        clock.now += 60.0
        events.run_timers()
    assert "did not accept its job: too many jobs" in events.ends[0]
    assert len(system.batches) > 20


@pytest.mark.parametrize("seconds", [0.1, 25.0])
def test_a_worker_that_was_told_to_stop(
    make: Callable[[], JobWorkerLauncher],
    system: Asked,
    events: Events,
    monkeypatch: pytest.MonkeyPatch,
    seconds: float,
) -> None:
    """It closes its connection at once, then takes its time. A suspended one does not, and is cancelled."""
    clock = Clock(monkeypatch, 100.0)
    launcher = make()
    worker = process(1)
    launcher.launch(worker)
    system.answers[0]("17")
    hello(launcher, PEER)
    assert worker.transport is not None
    monkeypatch.setattr(launcher._router, "send", lambda *message: None)
    worker.transport.put(["stop"])
    clock.now += seconds
    launcher._on_lost(PEER)
    assert events.ends == ["it ended"]
    assert bool(system.cancelled) == (seconds > 1)
