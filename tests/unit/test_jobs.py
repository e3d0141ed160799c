"""The launcher of jobs without a loop: what it tells the loop, and in which order."""

from __future__ import annotations

import errno
import gc
import json
import os
import pickle
import socket
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import pytest

import fakes
from executorlib.cache import batch_directory, entries, trust
from executorlib.cache import directory as cache
from executorlib.core.task import LAUNCHING, READY, RUNNING, Task
from executorlib.errors import ExecutorlibSocketError
from executorlib.jobs.batch import Batch
from executorlib.jobs.job import FOUND, identity_of
from executorlib.jobs.launcher import JobLauncher
from executorlib.jobs.queue import Cause, Dependency, JobState, Limit, Phase
from executorlib.jobs.submitter import Submitter
from executorlib.jobs.system import Refused
from executorlib.launchers.contract import Process
from executorlib.local_queue import process as local_queue
from executorlib.resources import Resources
from executorlib.worker import job
from fakes import Clock, Events, System

pytestmark = pytest.mark.cache


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Events:
    # All timers are due at once.
    monkeypatch.setattr("executorlib.jobs.submitter._LINGER", 0.0)
    monkeypatch.setattr("executorlib.jobs.results._LOOK_SECONDS", 0.0)
    for name in ("results._LOOK_SHARE", "table._WAIT_SHARE"):
        monkeypatch.setattr(f"executorlib.jobs.{name}", float("inf"))
    return Events()


def launched(
    events: Any,
    system: Any,
    folder: Path,
    key: str = "a",
    launcher: JobLauncher | None = None,
    number: int = 0,
    after: Sequence[Task] = (),
) -> tuple[JobLauncher, Task, Process]:
    number = number or (1 if launcher is None else 2)
    resources = Resources(cache_directory=str(folder))
    task = Task(number, abs, (-1,), {}, Future(), resources, resources.demand)
    task.cache_path = str(folder / f"{key}_o.h5")
    task.after = tuple(str(each.cache_path) for each in after)
    task.move(READY)
    task.move(LAUNCHING)
    process = fakes.process(number, task, cache_directory=str(folder))
    if launcher is None:
        launcher = JobLauncher(events, events, system, lambda _resources, program: program, False)
        launcher.prepare()
    launcher.launch(process)
    return launcher, task, process


def until_asked(system: System, events: Events) -> None:
    while system.answer is None:
        events.run_timers()


def finish(task: Task) -> None:
    assert task.cache_path is not None
    entries.write_output(task.cache_path, function=abs, args=[-1], kwargs={}, resource_dict={}, runtime=0.1, output=1)


def test_result_that_arrives_before_the_call_is_known_to_run(events: Events, tmp_path: Path) -> None:
    """The job ends at the moment when the system reports that it runs."""
    system = System()
    launcher, task, process = launched(events, system, tmp_path)
    until_asked(system, events)
    system.answer({("7", None): JobState(Phase.RUNNING, "RUNNING")})
    assert events.told == ["connected"]
    finish(task)
    assert process.transport is not None
    while launcher._jobs.of(1).state is not FOUND:
        events.run_timers()
    assert events.told == ["connected"]
    task.move(RUNNING)
    process.transport.flush()
    assert events.told == ["connected"], "nothing comes back while it is sent"
    events.run_timers()
    assert events.told == ["connected", "result", "exit"]


def test_equal_call_finds_the_result_when_the_first_is_killed(
    events: Events, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It finds the result by itself, at its own turn."""
    monkeypatch.setattr("executorlib.jobs.table._AT_ONCE_SECONDS", 0.0)  # one look at a time
    launcher, task, process = launched(events, System(), tmp_path)
    _, equal, other = launched(events, System(), tmp_path, launcher=launcher)
    finish(task)
    while not events.told:
        events.run_timers()
    assert other.transport is None, "it does not know yet"
    launcher.kill(process, 9)
    assert events.exits == {1: "its job was cancelled"}
    while other.transport is None:
        events.run_timers()
    equal.move(RUNNING)
    other.transport.flush()
    events.run_timers()
    assert events.told == ["connected", "exit", "connected", "result", "exit"]
    assert events.exits == {1: "its job was cancelled", 2: ""}


# Jobs that others have submitted.


def claimed(folder: Path, system: str, job_id: str = "17", key: str = "a") -> Path:
    """An entry that another session has submitted to some system; returns its batch directory."""
    batch = Path(batch_directory.make(str(folder), f"of-{key}"))
    path = folder / f"{key}_i.h5"
    call = {"function": abs, "input_args": [-1], "input_kwargs": {}, "resource_dict": {}, "batch": str(batch)}
    assert entries.write_input(str(path), call)
    (batch / batch_directory.OWNER_FILE).write_text(json.dumps({"system": system, "host": "elsewhere", "pid": 1}))
    (batch / batch_directory.ENTRIES_FILE).write_text(f"0 {path}\n")
    (batch / batch_directory.JOB_ID_FILE).write_text(job_id)
    return batch


def test_dead_job_with_the_longest_possible_key(
    events: Events, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("executorlib.jobs.results._GRACE", -1.0)
    key = "a" * (255 - len(entries.OUTPUT))
    claimed(tmp_path, System.name, key="a")
    (tmp_path / "a_i.h5").rename(tmp_path / f"{key}_i.h5")
    (tmp_path / batch_directory.FOLDER / "of-a" / batch_directory.ENTRIES_FILE).write_text(f"0 {tmp_path}/{key}_i.h5\n")
    system = Vanishing()
    system.end = JobState(Phase.ENDED, "NODE_FAIL", cause=Cause.NODE_FAILED)
    _launcher, _task, _process = launched(events, system, tmp_path, key)
    until_asked(system, events)
    system.answer({("17", None): system.end})
    system.answer = None
    while system.answer is None and not events.exits:
        events.run_timers()
    assert not events.exits
    system.answer({("7", None): JobState(Phase.RUNNING, "RUNNING")})
    assert events.told == ["connected"]


@pytest.mark.parametrize(
    ("noted", "own", "asks"),
    [
        ("Slurm cluster a", "Slurm cluster a", True),
        ("Slurm cluster b", "Slurm cluster a", False),
        ("Slurm cluster ab", "Slurm cluster a", False),
        ("Slurm", "Slurm cluster a", True),
        ("Slurm cluster a", "Slurm", False),
    ],
)
def test_system_is_asked_only_about_its_own_jobs(
    events: Events, tmp_path: Path, noted: str, own: str, asks: bool
) -> None:
    """It does not know another cluster's jobs, so each would seem dead, and its call would run twice."""
    claimed(tmp_path, noted)
    system = System()
    system.name = own
    _launcher, task, _process = launched(events, system, tmp_path)
    for _ in range(10):
        events.run_timers()
    assert (system.answer is not None) is asks
    finish(task)
    events.run_timers()
    assert events.told == ["connected"]


def run_in_portions(events: Events, done: list[str], count: int) -> None:
    """Run timers until the list is complete. Each timer may add only a little."""
    while len(done) < count:
        timers, events.timers = events.timers, []
        for timer in timers:
            before = len(done)
            timer()
            assert len(done) - before <= 2


def test_many_jobs_of_others_on_a_slow_file_system(
    events: Events, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asking a server about each takes time and blocks the loop, so only a few are asked about at a time."""
    clock = Clock(monkeypatch, running=True)
    asked: list[str] = []

    def is_there(path: str) -> bool:
        clock.now += 0.04
        asked.append(path)
        return os.path.exists(path)

    system, launcher, inputs = System(), None, []
    for number in range(1, 8):
        key = f"k{number}"
        claimed(tmp_path, System.name, key=key)
        launcher, task, _process = launched(events, system, tmp_path, key, launcher, number)
        inputs.append(entries.input_of(task.cache_path))
    monkeypatch.setattr("executorlib.machine.is_local_disk", lambda folder: False)
    monkeypatch.setattr("executorlib.cache.trust.is_there", is_there)
    run_in_portions(events, asked, len(inputs))
    assert asked == inputs


def test_many_calls_of_a_session_that_is_dead(events: Events, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claiming each anew takes time and blocks the loop, so only a few are claimed at a time."""
    clock = Clock(monkeypatch, running=True)
    freed: list[str] = []

    def take_over(path: str, *more: Any) -> None:
        clock.now += 0.04
        freed.append(path)
        os.unlink(path)

    monkeypatch.setattr(entries, "take_over", take_over)
    monkeypatch.setattr(Batch, "is_abandoned", lambda batch: True)
    launcher, paths = None, []
    for number in range(1, 8):
        (claimed(tmp_path, System.name, key=f"k{number}") / batch_directory.JOB_ID_FILE).unlink()
        launcher, _, _ = launched(events, System(), tmp_path, f"k{number}", launcher, number)
        paths.append(str(tmp_path / f"k{number}_i.h5"))
    run_in_portions(events, freed, len(paths))
    assert freed == paths


def test_many_calls_of_a_batch_that_waits(events: Events, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks once each time whether its session lives, because that takes a while."""
    looks: list[Batch] = []
    monkeypatch.setattr(Batch, "is_abandoned", lambda batch: bool(looks.append(batch)))
    batch = claimed(tmp_path, System.name)
    (batch / batch_directory.JOB_ID_FILE).unlink()
    call = {"function": abs, "input_args": [-1], "input_kwargs": {}, "resource_dict": {}, "batch": str(batch)}
    launcher = None
    for number in range(1, 6):
        if number > 1:
            assert entries.write_input(str(tmp_path / f"a{number}_i.h5"), call)
        launcher, _, _ = launched(events, System(), tmp_path, "a" if number == 1 else f"a{number}", launcher, number)
    assert launcher is not None
    for count in (1, 2):
        launcher._claims.find_job_ids()
        assert len(looks) == count


HOPELESS = JobState(Phase.PENDING, "PENDING", "PartitionTimeLimit", hopeless=True)


HELD = JobState(Phase.PENDING, "PENDING", "JobHeldAdmin", held=True)


def test_a_job_that_an_administrator_holds(events: Events, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It waits until they release it. The user is told why, once for each job."""
    system = System()
    launcher, _task, _process = launched(events, system, tmp_path)
    launched(events, system, tmp_path, "b", launcher)
    for _ in range(3):
        until_asked(system, events)
        system.say({("7", None): HELD})
    assert events.told == system.cancelled == []
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("executorlib", "WARNING")
    assert "call 1 of abs waits: an administrator holds its job 7_0 (JobHeldAdmin)" in record.getMessage()
    until_asked(system, events)
    system.say({("7", None): JobState(Phase.RUNNING, "RUNNING")})
    assert events.told == ["connected", "connected"]


def test_hopeless_job_of_another_session(events: Events, tmp_path: Path) -> None:
    """It is cancelled, and the call is submitted once more. If that does not help, it fails with the reason."""
    claimed(tmp_path, System.name)
    system = System()
    _launcher, _task, process = launched(events, system, tmp_path)
    until_asked(system, events)
    system.say({("17", None): HOPELESS})
    assert system.cancelled == [("17", None)]
    until_asked(system, events)
    assert not events.told
    system.say({("7", None): HOPELESS})
    assert system.cancelled == [("17", None), ("7", None)]
    error = events.exits[process.number]
    assert (
        "job 7 would wait forever and was cancelled: a queue reports it as PENDING (reason PartitionTimeLimit)" in error
    )
    assert not list(tmp_path.glob("*_i.h5"))


def test_hopeless_job_that_was_taken_over(events: Events, tmp_path: Path) -> None:
    """The other session's call goes on. The error goes to this session, whose job it was."""
    system = System()
    _launcher, _task, process = launched(events, system, tmp_path)
    until_asked(system, events)
    (tmp_path / "a_i.h5").unlink()
    batch = claimed(tmp_path, System.name)
    system.say({("7", None): HOPELESS})
    assert "would wait forever" in events.exits[process.number]
    assert entries.claimed_for(str(tmp_path / "a_i.h5")) == str(batch)


@pytest.mark.parametrize("end", ["refused", "cancelled"])
def test_call_that_was_taken_over_while_it_waited(
    events: Events, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """Its entry is the other session's, whatever becomes of the call here."""
    system = System()
    answers: list[Callable[[Any], None]] = []
    monkeypatch.setattr(system, "submit", lambda batch, on_done: answers.append(on_done))
    launcher, _task, process = launched(events, system, tmp_path)
    while not answers:
        events.run_timers()
    (tmp_path / "a_i.h5").unlink()
    batch = claimed(tmp_path, System.name)
    if end == "cancelled":
        launcher.kill(process, 9)
    else:
        answers.pop()(Refused("no"))
    assert process.number in events.exits
    assert entries.claimed_for(str(tmp_path / "a_i.h5")) == str(batch)


def test_call_with_a_file_that_is_not_trusted(events: Events, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It fails, and leaves no entry for a batch that goes on without it: others would wait for that one for ever."""

    def read_ending(path: str, root: str | None) -> entries.Ending | None:
        raise trust.UntrustedFile("anybody could have written it")

    launcher, _, _ = launched(events, System(), tmp_path)
    (tmp_path / "b_o.h5").touch()
    monkeypatch.setattr(entries, "read_ending", read_ending)
    _, _, process = launched(events, System(), tmp_path, "b", launcher)
    assert events.exits == {process.number: "anybody could have written it"}
    assert [path.name for path in tmp_path.glob("*_i.h5")] == ["a_i.h5"]


def test_a_call_that_leaves_no_result_runs_once_for_all_equal_ones(
    events: Events, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal calls of one session followed a job that died. One of them becomes a job; all end with that."""
    monkeypatch.setattr("executorlib.jobs.results._GRACE", -1.0)
    claimed(tmp_path, System.name)
    system = Vanishing()
    system.end = DIED
    submitted: list[Any] = []
    monkeypatch.setattr(system, "submit", lambda batch, on_done: (submitted.append(batch), on_done("7")))
    launcher, _, _ = launched(events, system, tmp_path)
    launched(events, system, tmp_path, launcher=launcher)
    while len(events.exits) < 2:
        until_asked(system, events)
        system.say({})
        for _ in range(5):
            events.run_timers()
    assert len(submitted) == 1
    assert all("job 7" in text for text in events.ends)
    assert not list(tmp_path.glob("*_i.h5"))


def test_equal_calls_whose_entry_nobody_has_any_more(events: Events, tmp_path: Path) -> None:
    """One of them claims it, and the others wait for that one's job."""
    batch = claimed(tmp_path, "another queue")
    system = System()
    launcher, task, _ = launched(events, system, tmp_path)
    launched(events, system, tmp_path, launcher=launcher)
    entries.remove_input(str(tmp_path / "a_i.h5"))
    first, second = launcher._jobs.same(str(task.cache_path))
    while first.batch is None or second.batch is None:
        until_asked(system, events)
        system.say({("7", None): JobState(Phase.PENDING, "PENDING")})
    assert first.batch is second.batch
    assert first.batch.directory != str(batch)


@pytest.mark.parametrize("damaged", [True, False])
def test_a_dead_entry_that_another_session_is_about_to_free(
    events: Events, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    """It is waited for, however often this session looks at the entry meanwhile."""
    monkeypatch.setattr("executorlib.jobs.claims._UNREADABLE_SECONDS", 0.0)
    batch = claimed(tmp_path, "another queue")
    path = tmp_path / "a_i.h5"
    name = entries.job_name(str(path), str(batch))
    if damaged:
        path.write_bytes(b"")
        name = f"damaged-{identity_of(str(path))}-{path.name}"
    assert trust.make_mark(entries._marker(str(path), name), str(tmp_path))
    system = System()
    monkeypatch.setattr(system, "is_gone", lambda owner: True)
    launched(events, system, tmp_path)
    for _ in range(5):
        events.run_timers()
    assert events.exits == {}
    assert system.answer is None, "nothing is submitted"
    path.unlink()
    until_asked(system, events)
    assert entries.claimed_for(str(path)) not in (None, str(batch))


# More calls than the system lets in.


class Limited(System):
    """Has a limit to the number of jobs, those of others among them; runs them when the test says so.

    Args:
        limit: The limit.
    """

    array_limit = 1000

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self.others = 0
        self.whose = Limit.OWN
        self.jobs: dict[tuple[str, int | None], str] = {}  # that have not ended, and their entries
        self.waits_for: dict[tuple[str, int | None], tuple[str, int | None]] = {}
        self.ran: list[str] = []
        self.most = 0
        self.taken: list[Any] = []
        self.refused: list[Any] = []

    def submit(self, batch: Any, on_done: Callable[[Any], None]) -> None:
        if len(self.jobs) + self.others + batch.count > self.limit:
            self.refused.append(batch)
            on_done(Refused("too many jobs", limit=self.whose))
            return
        self.taken.append(batch)
        job_id = str(100 + len(self.taken))
        paths = batch_directory.entries_of(batch.directory)
        is_array = batch.count > 1 or batch.first > 0
        for index in range(batch.first, batch.first + batch.count):
            element = (job_id, index if is_array else None)
            self.jobs[element] = paths[index]
            for each in batch.dependencies:
                self.waits_for[element] = (each.job_id, index if each.corresponding else each.index)
        self.most = max(self.most, len(self.jobs))
        on_done(job_id)

    def query(self, job_ids: Any, on_states: Callable[[Any], None]) -> None:
        on_states(
            {
                **{("1", index): JobState(Phase.RUNNING, "RUNNING") for index in range(self.others)},
                **{element: JobState(Phase.PENDING, "PENDING") for element in self.jobs},
                ("2", 0): JobState(Phase.ENDED, "COMPLETED"),
            }
        )

    def cancel(self, jobs: Any) -> None:
        super().cancel(jobs)
        for element in jobs:
            self.jobs.pop(element, None)

    def run(self) -> None:
        """Run all that are here and do not wait for another one."""
        for element, path in list(self.jobs.items()):
            if self.waits_for.get(element) not in self.jobs:
                del self.jobs[element]
                self.ran.append(path)
                entries.write_output(
                    entries.output_of(path), function=abs, args=[], kwargs={}, resource_dict={}, runtime=0.1, output=1
                )
                entries.remove_input(path)


class Loop(Events):
    """Tells calls that they run, as the loop does."""

    def on_connected(self, process: Process) -> None:
        super().on_connected(process)
        (task,) = process.calls
        task.move(RUNNING)
        assert process.transport is not None
        process.transport.flush()


@pytest.fixture
def impatient(events: Events, monkeypatch: pytest.MonkeyPatch) -> Loop:
    for name in ("_SETTLE", "_FIRST_PAUSE", "_LAST_PAUSE"):
        monkeypatch.setattr(f"executorlib.jobs.room.{name}", 0.0)
    return Loop()


@pytest.mark.parametrize(("limit", "calls"), [(5, 60), (1, 20), (1000, 20)])
def test_however_small_the_limit_all_calls_run(
    impatient: Loop, tmp_path: Path, caplog: pytest.LogCaptureFixture, limit: int, calls: int
) -> None:
    """As many at once as the limit admits. The user is told at once, and only once."""
    system = Limited(limit)
    launcher = None
    for number in range(1, calls + 1):
        launcher, _, _ = launched(impatient, system, tmp_path, f"a{number}", launcher, number)
    while len(impatient.exits) < calls:
        for _ in range(10):
            impatient.run_timers()
        system.run()
    assert set(impatient.exits.values()) == {""}
    assert len(system.ran) == len(set(system.ran)) == calls
    assert system.most == min(limit, calls)
    told = [record.getMessage() for record in caplog.records]
    if limit < calls:
        (text,) = told
        assert f"{calls} calls, the first of abs, are more jobs than a queue accepts now" in text
        assert "too many jobs" in text
    else:
        assert told == []
        assert len(system.taken) == 1
    assert launcher is not None
    assert not launcher.busy
    assert not list((tmp_path / batch_directory.FOLDER).iterdir())


def test_inputs_that_are_only_partly_in_the_system(impatient: Loop, tmp_path: Path) -> None:
    """Each call waits there for its own input, whichever part of a batch that input was submitted in."""
    system = Limited(5)
    launcher = None
    tasks = []
    for number in range(1, 13):
        launcher, task, _ = launched(impatient, system, tmp_path, f"a{number}", launcher, number)
        tasks.append(task)
    for number, task in enumerate(tasks, 21):
        launched(impatient, system, tmp_path, f"b{number}", launcher, number, after=[task])
    launched(impatient, system, tmp_path, "c", launcher, 40, after=tasks)
    while len(impatient.exits) < 25:
        impatient.run_timers()
        system.run()
    assert set(impatient.exits.values()) == {""}
    names = [Path(path).name for path in system.ran]
    assert len(names) == len(set(names)) == 25
    for number in range(1, 13):
        assert names.index(f"a{number}_i.h5") < names.index(f"b{number + 20}_i.h5")
    assert system.waits_for, "some were submitted while their inputs were there"
    assert launcher is not None
    assert not launcher.busy


def test_calls_that_wait_under_a_limit_can_be_cancelled(impatient: Loop, tmp_path: Path) -> None:
    system = Limited(2)
    launcher = None
    processes = []
    for number in range(1, 7):
        launcher, _, process = launched(impatient, system, tmp_path, f"a{number}", launcher, number)
        processes.append(process)
    while len(system.jobs) < 2:
        impatient.run_timers()
    assert launcher is not None
    for process in (processes[0], processes[2], processes[4], processes[5]):
        launcher.kill(process, 9)
    while len(impatient.exits) < 6:
        impatient.run_timers()
        system.run()
    assert [Path(path).name for path in system.ran] == ["a2_i.h5", "a4_i.h5"]
    assert not launcher.busy
    assert not list(tmp_path.glob("*_i.h5"))


def test_limit_that_other_jobs_fill(impatient: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls wait while this user has jobs, or if other users' jobs count. Otherwise, it is an error in the end."""
    clock = Clock(monkeypatch, 0.0)
    system = Limited(3)
    system.others = 3
    _launcher, _, process = launched(impatient, system, tmp_path)
    for _ in range(20):
        clock.now += 100.0
        impatient.run_timers()
    assert not impatient.exits
    system.limit, system.others, system.whose = 0, 0, Limit.SHARED
    for _ in range(20):
        clock.now += 100.0
        impatient.run_timers()
    assert not impatient.exits
    system.whose = Limit.OWN
    for _ in range(4):
        clock.now += 100.0
        impatient.run_timers()
    assert "a queue did not accept its job: too many jobs" in impatient.exits[process.number]


def test_a_session_that_leaves_with_calls_under_a_limit(
    impatient: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Calls that the limit does not admit soon are given up with a message. They can be submitted again."""
    clock = Clock(monkeypatch, 100.0)
    system = Limited(2)
    launcher = None
    for number in range(1, 7):
        launcher, _, _ = launched(impatient, system, tmp_path, f"a{number}", launcher, number)
    while len(system.jobs) < 2:
        clock.now += 1.0
        impatient.run_timers()
    assert launcher is not None
    launcher.detach(lambda: None)
    caplog.clear()
    while launcher.busy:
        clock.now += 1.0
        impatient.run_timers()
    assert "did not accept jobs of this session, which has left: too many jobs" in caplog.text
    assert sorted(path.name for path in tmp_path.glob("*_i.h5")) == ["a1_i.h5", "a2_i.h5"]


@pytest.mark.parametrize("leaving", [False, True])
def test_every_batch_hears_that_there_is_no_room(
    impatient: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leaving: bool
) -> None:
    """One batch waits while the system is asked on behalf of another, and is looked at again if that is given up."""
    clock = Clock(monkeypatch, 0.0)
    system = Limited(0)
    system.array_limit = 1  # type: ignore[misc]
    monkeypatch.setattr(Limited, "query", System.query)
    launcher, _, _ = launched(impatient, system, tmp_path)
    launched(impatient, system, tmp_path, "b", launcher)
    until_asked(system, impatient)
    if leaving:
        launcher.detach(lambda: None)
    for _ in range(10):
        impatient.run_timers()
        impatient.run_timers()  # the other batch finds that it has to wait for the answer
        clock.now += 400.0
        if system.answer is not None:
            system.say({})
    assert not launcher.busy
    assert sorted(impatient.exits) == [1, 2]
    assert not list(tmp_path.glob("*_i.h5"))
    assert not list((tmp_path / batch_directory.FOLDER).iterdir())


def test_another_session_finds_calls_of_a_batch_submitted_in_parts(impatient: Loop, tmp_path: Path) -> None:
    """It asks about each by its own job's id. The id of a waiting one is found once that is submitted."""
    first = Limited(3)
    launcher = None
    for number in range(1, 7):
        launcher, _, _ = launched(impatient, first, tmp_path, f"a{number}", launcher, number)
    while len(first.jobs) < 3:
        impatient.run_timers()
    jobs = {path: element for element, path in first.jobs.items()}
    for number in range(1, 7):
        path = str(tmp_path / f"a{number}_i.h5")
        assert cache.job_of(path, str(tmp_path))[:2] == jobs.get(path, (None, None))

    theirs = Loop()
    second = System()
    other, _, _ = launched(theirs, second, tmp_path, "a2")
    _, _, late = launched(theirs, second, tmp_path, "a6", other)
    while second.answer is None:
        theirs.run_timers()
    assert [job.key for job in other._jobs if job.submitted] == [jobs[str(tmp_path / "a2_i.h5")]]
    while str(tmp_path / "a6_i.h5") not in first.jobs.values():
        first.run()
        impatient.run_timers()
    second.answer({})
    second.answer = None
    while second.answer is None:
        theirs.run_timers()
    (element,) = (element for element, path in first.jobs.items() if path.endswith("a6_i.h5"))
    assert other._jobs.of(late.number).key == element


@pytest.mark.parametrize(("own", "code"), [("101", job.RESULT), ("999", job.NOT_MINE)])
def test_a_job_of_a_part_of_a_batch(
    impatient: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, code: int
) -> None:
    """It runs its call unless another job is noted for that part. Other parts do not matter."""
    system = Limited(2)
    system.setup = lambda: {"id_variables": ("TEST_JOB_ID",)}  # type: ignore[method-assign]
    launcher = None
    for number in range(1, 5):
        launcher, _, _ = launched(impatient, system, tmp_path, f"a{number}", launcher, number)
    while len(system.jobs) < 2:
        impatient.run_timers()
    directory = system.taken[0].directory
    assert (system.taken[0].first, system.taken[0].count) == (0, 2)
    monkeypatch.setenv("TEST_JOB_ID", own)
    assert job.run(directory, 1, "0-1") == code
    monkeypatch.setenv("TEST_JOB_ID", "102")
    assert job.run(directory, 3, "2-3") == job.RESULT
    assert batch_directory.JobIds.read(directory, 3).of(3) == ("102", 3)


@pytest.mark.parametrize(("named", "index"), [(None, 1), (("TEST_TASK",), 2), ((), 0)])
def test_a_job_finds_its_call(
    impatient: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: tuple[str, ...] | None, index: int
) -> None:
    """Its setup names the variable. A setup of an older version names none, and means Slurm's."""
    system = Limited(3)
    launcher = None
    for number in range(1, 4):
        launcher, _, _ = launched(impatient, system, tmp_path, f"a{number}", launcher, number)
    while len(system.jobs) < 3:
        impatient.run_timers()
    directory = Path(system.taken[0].directory)
    setup = pickle.loads((directory / batch_directory.SETUP_FILE).read_bytes())
    del setup["element_variables"]
    if named is not None:
        setup["element_variables"] = named
    (directory / batch_directory.SETUP_FILE).write_bytes(pickle.dumps(setup))
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    monkeypatch.setenv("TEST_TASK", "2")
    assert job.run(str(directory), None) == job.RESULT
    assert [path.name for path in tmp_path.glob("*_o.h5")] == [f"a{index + 1}_o.h5"]


# Calls that wait for their inputs.


class Alone(System):
    """A queue without dependencies, which takes one call at a time."""

    array_limit = 1

    def __init__(self) -> None:
        super().__init__()
        self.submitted: list[str] = []
        self.answers: list[Callable[[Any], None]] = []

    def can_wait_for(self, dependency: Dependency) -> bool:
        return False

    def submit(self, batch: Any, on_done: Callable[[Any], None]) -> None:
        self.submitted.append(Path(batch.directory, batch_directory.ENTRIES_FILE).read_text().split("/")[-1].strip())
        self.answers.append(on_done)

    def answer_all(self) -> None:
        answers, self.answers = self.answers, []
        for answer in answers:
            answer(str(len(self.submitted)))


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Has an item for each time that a batch's dependencies were looked at."""
    looks: list[None] = []
    dependencies = Submitter._dependencies

    def look(submitter: Submitter, *part: Any) -> Any:
        looks.append(None)
        return dependencies(submitter, *part)

    monkeypatch.setattr(Submitter, "_dependencies", look)
    return looks


def test_waiting_calls_are_looked_at_when_their_inputs_change(
    events: Events, tmp_path: Path, looks: list[None]
) -> None:
    """... and not otherwise: there may be thousands."""
    system = Alone()
    launcher, source, _process = launched(events, system, tmp_path)
    _, _, cancelled = launched(events, system, tmp_path, "b", launcher, number=2, after=[source])
    for number in (3, 4):
        launched(events, system, tmp_path, f"c{number}", launcher, number=number, after=[source])
    for _ in range(5):
        events.run_timers()
    assert system.submitted == ["a_i.h5"]
    assert len(looks) == 4
    system.answer_all()
    for _ in range(5):
        events.run_timers()
    assert len(looks) == 4 + 3, "each once more, as the system may be able to wait for a job whose number is known"
    launcher.kill(cancelled, 9)
    for _ in range(5):
        events.run_timers()
    assert len(looks) == 7
    finish(source)
    for _ in range(5):
        events.run_timers()
    assert len(looks) == 7 + 2
    assert system.submitted == ["a_i.h5", "c3_i.h5", "c4_i.h5"]
    assert launcher.busy
    system.answer_all()
    for _ in range(5):
        events.run_timers()
    assert not launcher._submitter.busy


def test_leaving_gives_up_calls_that_wait_for_inputs(events: Events, tmp_path: Path) -> None:
    """Calls whose inputs have not been submitted are given up, and so are their dependents."""
    system = Alone()
    launcher, source, _process = launched(events, system, tmp_path)
    _, middle, _ = launched(events, system, tmp_path, "b", launcher, number=2, after=[source])
    launched(events, system, tmp_path, "c", launcher, number=3, after=[middle])
    events.run_timers()
    launcher.detach(lambda: None)
    assert launcher._submitter.busy
    system.answer_all()
    for _ in range(5):
        events.run_timers()
    assert not launcher._submitter.busy
    assert [path.name for path in tmp_path.glob("*_i.h5")] == ["a_i.h5"]
    assert len(list((tmp_path / batch_directory.FOLDER).iterdir())) == 1


# How long a result may take to show.


class Vanishing(System):
    """Has had a job, and has forgotten it, or says how it ended."""

    end: JobState | None = None

    def detail(self, job: Any, on_state: Callable[[Any], None]) -> None:
        on_state(self.end)

    def cause_in(self, output: str) -> Cause:
        return Cause.NONE


DIED = JobState(Phase.ENDED, "FAILED", "", "9:0")


@pytest.mark.parametrize(
    ("end", "local", "waits"),
    [
        (None, False, True),
        (None, True, False),
        (JobState(Phase.ENDED, "DONE"), False, True),
        (JobState(Phase.ENDED, "DONE"), True, False),
        (JobState(Phase.ENDED, "COMPLETED", "", "0:0"), False, True),
        (JobState(Phase.ENDED, "COMPLETED", "", "0:0"), True, False),
        (JobState(Phase.ENDED, "FAILED", "", "83:0"), False, True),
        (JobState(Phase.ENDED, "FAILED", "", "83:0"), True, False),
        (DIED, False, False),
        (JobState(Phase.ENDED, "CANCELLED", cause=Cause.CANCELLED), False, False),
    ],
    ids=str,
)
def test_how_long_a_result_may_take_to_show(
    events: Events, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: JobState | None, local: bool, waits: bool
) -> None:
    """It may take long if there can be one, which the job says or nobody knows; not on a local disk."""
    monkeypatch.setattr("executorlib.jobs.results._GRACE", -1.0)
    monkeypatch.setattr("executorlib.machine.is_local_disk", lambda folder: local)
    system = Vanishing()
    system.end = end
    _launcher, task, _process = launched(events, system, tmp_path)
    until_asked(system, events)
    system.answer({})
    for _ in range(5):
        events.run_timers()
    assert (events.told == ["exit"]) is not waits
    if waits:
        assert task.cache_path is not None
        finish(task)
        events.run_timers()
        assert events.told == ["connected"]


@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize("ends_well", [False, True])
def test_damaged_file_of_before(
    events: Events, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, foreign: bool, ends_well: bool
) -> None:
    """The file that another job has left does not say that this one's result will not show, nor that it will."""
    monkeypatch.setattr("executorlib.jobs.results._GRACE", -1.0)
    monkeypatch.setattr("executorlib.machine.is_local_disk", lambda folder: False)
    (tmp_path / "a_o.h5").write_bytes(b"damaged")
    system = Vanishing()
    system.end = DIED
    if foreign:
        claimed(tmp_path, System.name)
    launcher, task, process = launched(events, system, tmp_path)
    equal = launched(events, system, tmp_path, launcher=launcher, number=2)[2]
    if foreign:
        until_asked(system, events)
        events.run_timers()
        system.say({})
        while launcher._jobs.of(process.number).submitted != ("7", None):
            events.run_timers()
    system.end = JobState(Phase.ENDED, "COMPLETED", "", "0:0") if ends_well else DIED
    until_asked(system, events)
    system.say({})
    for _ in range(5):
        events.run_timers()
    assert (sorted(events.exits) == [1, 2]) is not ends_well
    if ends_well:
        finish(task)
        events.run_timers()
        assert process.transport is not None
        assert equal.transport is not None


def test_a_job_that_a_query_missed(events: Events, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one has it: it still waits for its turn, however long that takes."""
    system = Vanishing()
    launcher, _task, _process = launched(events, system, tmp_path)
    for states in ({}, {("7", None): JobState(Phase.PENDING, "PENDING")}):
        until_asked(system, events)
        system.say(states)
        events.run_timers()
        assert launcher._jobs.of(1) is not None
    monkeypatch.setattr("executorlib.jobs.results._GRACE", -1.0)
    for _ in range(5):
        events.run_timers()
    assert events.told == []


# Whatever happens to the files, at any moment.

FILES: dict[Any, list[str]] = {
    batch_directory: ["entries_of", "make", "read_text", "write_text"],
    entries: ["claimed_for", "read_ending", "read_input", "remove_input", "take_over", "write_input"],
}


class Faults:
    """Makes one call of a function of `batch_directory` or `entries` fail, after this many others."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        self.count = 0
        self._at = at
        for module, names in FILES.items():
            for name in names:
                monkeypatch.setattr(module, name, self._failing(getattr(module, name)))

    def _failing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any) -> Any:
            self.count += 1
            if self.count == self._at:
                raise OSError(errno.EIO, "the disk is gone")
            return function(*arguments)

        return called


class Queue(System):
    """Takes batches one after the other, the second only when asked again; one job dies, the others leave results."""

    def __init__(self, store: Path) -> None:
        super().__init__()
        self.store = store
        self.submitted = 0

    def submit(self, batch: Any, on_done: Callable[[Any], None]) -> None:
        self.submitted += 1
        if self.submitted == 2:
            on_done(Refused("not now", transient=True))
            return
        on_done(str(self.submitted))

    def query(self, job_ids: Any, on_states: Callable[[Any], None]) -> None:
        for key in ("works", "again"):
            path = self.store / f"{key}_o.h5"
            if (self.store / f"{key}_i.h5").exists() and not path.exists():
                entries.write_output(path, function=abs, args=[-1], kwargs={}, resource_dict={}, runtime=0.1, output=1)
        on_states({})

    def detail(self, job: Any, on_state: Callable[[Any], None]) -> None:
        on_state(JobState(Phase.ENDED, "FAILED", "", "9:0"))

    def cause_in(self, output: str) -> Cause:
        return Cause.NONE


def ends(folder: Path, events: Events, monkeypatch: pytest.MonkeyPatch, fault: int) -> tuple[list[str], int]:
    """Run calls of all kinds while one access to a file fails; how each ended, and the number of accesses."""
    for name in ("_GRACE", "_RESULT_GRACE"):
        monkeypatch.setattr(f"executorlib.jobs.results.{name}", -1.0)
    monkeypatch.setattr("executorlib.jobs.room._FIRST_RETRY", 0.0)
    # Of sessions that are gone: one had submitted its call, one had not, and one left nothing that can be read.
    for key, note in (("submitted", "17"), ("again", None), ("unknown", None)):
        batch = Path(batch_directory.make(str(folder), f"of-{key}"))
        path = folder / f"{key}_i.h5"
        call = {"function": abs, "input_args": [-1], "input_kwargs": {}, "resource_dict": {}, "batch": str(batch)}
        assert entries.write_input(str(path), call)
        owner = {"system": System.name, "host": socket.gethostname(), "pid": 2**30}
        (batch / batch_directory.OWNER_FILE).write_text(json.dumps(owner) if key != "unknown" else "[1]")
        (batch / batch_directory.ENTRIES_FILE).write_text(f"0 {path}\n")
        if note:
            (batch / batch_directory.JOB_ID_FILE).write_text(note)
    os.utime(folder / batch_directory.FOLDER / "of-unknown", (1, 1))
    with monkeypatch.context() as patch:
        faults = Faults(patch, fault)
        launcher = JobLauncher(
            cast("Any", events),
            cast("Any", events),
            cast("Any", Queue(folder)),
            lambda _resources, program: program,
            False,
        )
        processes = []
        for number, key in enumerate(("works", "dies", "submitted", "again", "unknown", "cancelled"), 1):
            resources = Resources(cache_directory=str(folder), priority=number)
            task = Task(number, abs, (-1,), {}, Future(), resources, resources.demand)
            task.cache_path = str(folder / f"{key}_o.h5")
            for state in (READY, LAUNCHING):
                task.move(state)
            processes.append(fakes.process(number, task, cache_directory=str(folder), priority=number))
            launcher.launch(processes[-1])
        launcher.kill(processes[-1], 9)
        for _ in range(60):
            for process in processes:
                (task,) = process.calls
                if process.transport is not None and task.state is LAUNCHING:
                    task.move(RUNNING)
                    process.transport.flush()
            if len(events.exits) == len(processes):
                break
            events.run_timers()
    assert sorted(events.exits) == list(range(1, len(processes) + 1)), "each ends once"
    return [events.exits[number] for number in sorted(events.exits)], faults.count


@pytest.mark.long
def test_one_failing_file_fails_one_call(events: Events, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each access to a file fails once. Whatever follows, every call ends, and most of them succeed."""
    whole = tmp_path / "whole"
    whole.mkdir()
    expected, count = ends(whole, events, monkeypatch, 0)
    assert "FAILED" in expected[1]
    assert count > 30
    for fault in range(1, count + 1):
        folder = tmp_path / str(fault)
        folder.mkdir()
        outcome, _ = ends(folder, Events(), monkeypatch, fault)
        differs = [now for now, before in zip(outcome, expected, strict=True) if bool(now) != bool(before)]
        assert len(differs) <= 1, (fault, outcome)


@pytest.mark.parametrize("wrong", [OSError(errno.ENOSPC, "full"), RuntimeError("a template is wrong")], ids=repr)
def test_batch_that_cannot_be_made_ready(
    events: Events, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: Exception
) -> None:
    """Its calls fail with the reason, and leave nothing; the next batch is submitted."""
    whole = Submitter._write_files

    def write_files(submitter: Submitter, batch: Any, *more: Any) -> list[str]:
        if next(iter(batch.jobs.values())).path.endswith("a_i.h5"):
            raise wrong
        return whole(submitter, batch, *more)

    monkeypatch.setattr(Submitter, "_write_files", write_files)
    system = System()
    launcher, _task, process = launched(events, system, tmp_path)
    while not events.exits:
        events.run_timers()
    assert str(wrong) in events.exits[process.number]
    assert not list(tmp_path.glob("*_i.h5"))
    assert not list((tmp_path / batch_directory.FOLDER).iterdir())
    launched(events, system, tmp_path, "b", launcher)
    until_asked(system, events)
    assert [path.name for path in tmp_path.glob("*_i.h5")] == ["b_i.h5"]


def test_answer_about_the_job_of_before(events: Events, tmp_path: Path) -> None:
    """The call has become another job while the system was asked. Its answer says nothing about that one."""
    batch = claimed(tmp_path, System.name)
    system = System()
    launcher, _, process = launched(events, system, tmp_path)
    until_asked(system, events)
    job = launcher._jobs.of(process.number)
    launcher._claims.reclaim(job, str(batch))
    while job.submitted is None:
        events.run_timers()
    system.say({})
    assert not job.presence.is_gone


def test_leaving_while_the_system_is_asked(events: Events, tmp_path: Path) -> None:
    """Its answer is about calls that are no longer ours."""
    system = System()
    launcher, _, _ = launched(events, system, tmp_path)
    until_asked(system, events)
    launcher.detach(lambda: events.told.append("taken"))
    system.answer({("7", None): JobState(Phase.RUNNING, "RUNNING")})
    assert events.told == ["taken"]


def test_input_of_another_system(events: Events, tmp_path: Path) -> None:
    """Nothing is known about its job, so its dependents are submitted once its result is there."""
    system = System()
    submitted: list[Any] = []
    system.submit = lambda batch, on_done: (submitted.append(batch), on_done("7"))[0]  # type: ignore[method-assign]
    claimed(tmp_path, "another queue")
    launcher, task, _ = launched(events, system, tmp_path)
    launched(events, system, tmp_path, "b", launcher, after=[task])
    for _ in range(5):
        events.run_timers()
    assert submitted == []
    finish(task)
    for _ in range(5):
        events.run_timers()
    (batch,) = submitted
    assert batch.dependencies == ()


def test_submissions_are_repeated_from_their_first_refusal_on(
    events: Events, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time does not count from the submit of the call, which may have waited for its inputs for hours."""
    clock = Clock(monkeypatch, 0.0)
    system = System()
    answers: list[Callable[[Any], None]] = []
    system.submit = lambda batch, on_done: answers.append(on_done)  # type: ignore[method-assign]
    launched(events, system, tmp_path)
    clock.now = 1.0
    events.run_timers()
    away = Refused("the controller cannot be reached", transient=True)
    tries = 0
    clock.now = 10_000.0
    while answers:
        tries += 1
        answers.pop()(away)
        clock.now += 100.0
        for _ in range(3):
            events.run_timers()
    assert tries in (3, 4)
    assert "the controller cannot be reached" in events.exits[1]


def test_later_jobs_do_not_keep_results(events: Events, tmp_path: Path) -> None:
    """Otherwise, the last call of a chain would keep the results of all."""
    system = System()
    launcher, task, process = launched(events, system, tmp_path)
    _, last, _ = launched(events, system, tmp_path, "b", launcher, after=[task])
    job = weakref.ref(launcher._jobs.of(process.number))
    finish(task)
    for _ in range(5):
        events.run_timers()
    task.move(RUNNING)
    assert process.transport is not None
    process.transport.flush()
    assert events.told == ["connected"], "nothing comes back while it is sent"
    events.run_timers()
    assert events.told == ["connected", "result", "exit"]
    process.transport = system.answer = None
    events.timers.clear()
    assert [each.task for each in launcher._jobs] == [last]
    gc.collect()
    assert job() is None


@pytest.mark.parametrize("terminated", [False, True])
def test_a_job_of_another_session_that_is_cancelled(
    events: Events, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminated: bool
) -> None:
    """A session that waits for it submits it again, unless it was ended for all sessions."""
    monkeypatch.setattr("executorlib.jobs.results._GRACE", -1.0)
    batch = claimed(tmp_path, System.name)
    system = Vanishing()
    system.end = JobState(Phase.ENDED, "CANCELLED", cause=Cause.CANCELLED)
    submitted: list[Any] = []
    system.submit = lambda batch, on_done: (submitted.append(batch), on_done("18"))[0]  # type: ignore[method-assign]
    launched(events, system, tmp_path)
    until_asked(system, events)
    if terminated:
        entries.terminate(str(tmp_path / "a_i.h5"), str(batch))
    system.answer({("17", None): system.end})
    for _ in range(10):
        events.run_timers()
    assert bool(submitted) is not terminated
    assert ("was terminated" in events.exits.get(1, "")) is terminated


def test_files_that_do_not_belong_to_a_batch(tmp_path: Path) -> None:
    for name in ("job_id.-5", "job_id.5-", "job_id.-", "job_id.x-5", "job_id.1-2"):
        (tmp_path / "store" / ".executorlib" / "batch").mkdir(parents=True, exist_ok=True)
        (tmp_path / "store" / ".executorlib" / "batch" / name).write_text("7")
    ids = batch_directory.JobIds.read(str(tmp_path / "store" / ".executorlib" / "batch"), 5)
    assert [ids.of(index) for index in (0, 1, 2, 5)] == [None, ("7", 1), ("7", 2), None]


@pytest.mark.parametrize(
    ("error", "wait_status", "state"),
    [
        (ExecutorlibSocketError("it ended"), 12 << 8, ("ended", "FAILED", "", "12:0", "none")),
        (ExecutorlibSocketError("it ended"), 15, ("ended", "FAILED", "", "0:15", "none")),
        (
            ExecutorlibSocketError("it said: error code 12"),
            None,
            ("ended", "FAILED", "it said: error code 12", "", "none"),
        ),
        (OSError("error code 12"), None, ("ended", "FAILED", "OSError: error code 12", "", "none")),
    ],
)
def test_only_the_end_of_a_process_has_an_exit_code(
    error: Exception, wait_status: int | None, state: tuple[str, ...]
) -> None:
    if isinstance(error, ExecutorlibSocketError):
        error.wait_status = wait_status
    future: Future[None] = Future()
    future.set_exception(error)
    assert local_queue._state(future) == state


def test_a_job_is_told_the_reason_without_the_call_that_ran_it() -> None:
    error = ExecutorlibSocketError("Call 7 of _run has no result: mpiexec was not found. Only this call fails.")
    error.reason = "mpiexec was not found"
    future: Future[None] = Future()
    future.set_exception(error)
    assert local_queue._state(future) == ("ended", "FAILED", "mpiexec was not found", "", "none")
