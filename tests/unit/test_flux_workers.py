"""Workers as Flux jobs: each ends once, whatever order Flux and the worker's connection tell things in.

Flux, the sockets and the loop are played by the test.
"""

from __future__ import annotations

import gc
import itertools
import os
import signal
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from executorlib.flux import workers
from executorlib.flux.jobspec import job_name
from executorlib.flux.policy import Policy
from executorlib.flux.workers import (
    CONNECTED,
    ENDING,
    FINISHED,
    LEFT,
    LEGAL_MOVES,
    OVER,
    STARTING,
    FluxLauncher,
    Member,
    State,
)
from executorlib.jobs.system import Refused
from executorlib.launchers.contract import Exit, Lifetime, Process
from executorlib.resources import Resources
from fakes import Events
from unit.properties import examples, repeatable

# Written out a second time: who changes the table must want to.
MOVES = {
    (STARTING, CONNECTED),
    (STARTING, ENDING),
    (STARTING, OVER),
    (CONNECTED, LEFT),
    (CONNECTED, FINISHED),
    (CONNECTED, OVER),
    (LEFT, ENDING),
    (LEFT, OVER),
    (FINISHED, ENDING),
    (FINISHED, OVER),
    (ENDING, OVER),
}
JOB, PEER = 7, b"1.0"


class Bench(Events):
    """Is the loop, the Flux instance and the socket. Nothing happens before the test says so."""

    is_owner = True

    def __init__(self) -> None:
        super().__init__()
        self.submitted: list[Callable[[Any], None]] = []
        self.watching: list[Callable[[str, Any], None]] = []
        self.reading: list[Callable[[bytes], None]] = []
        self.ended: list[Exit] = []
        self.signals: list[int] = []
        self.cancelled = 0
        self.meanwhile: Callable[[], object] = lambda: None  # what Flux says while the launcher is closed

    # -- the loop

    def call_soon(self, callback: Callable[[], None]) -> None:
        callback()

    def on_connected(self, process: Process) -> None:
        assert not self.ended

    def on_exit(self, process: Process, end: Exit) -> None:
        self.ended.append(end)

    # -- the instance

    def open(self) -> None: ...

    def submit(self, spec: Any, urgency: int, on_answer: Callable[[Any], None]) -> None:
        self.submitted.append(on_answer)

    def watch(self, job: int, on_event: Callable[[str, Any], None]) -> int:
        self.watching.append(on_event)
        return 1

    def unwatch(self, key: int, ends_soon: bool = False) -> None:
        self.watching.clear()

    def read_errors(self, job: int, most: int, on_read: Callable[[bytes], None]) -> None:
        self.reading.append(on_read)

    def kill(self, job: int, signal_number: int) -> None:
        self.signals.append(signal_number)

    def end(self, job: int, kind: str) -> None:
        self.cancelled += 1

    def wait(self, is_over: Callable[[], bool], seconds: float) -> None:
        self.meanwhile()

    # -- the socket

    def credentials(self, identity: str) -> Any:
        return self

    def dumps(self) -> str:
        return "credentials"

    def send(self, peer: bytes, header: list[Any], frames: list[Any]) -> None: ...

    def close(self) -> None: ...


class Steps:
    """Does the steps that can be done as things are; each says whether it was done."""

    def __init__(self, lifetime: Lifetime, ranks: int, log_files: bool) -> None:
        self.bench = bench = Bench()
        self.launcher = FluxLauncher(
            cast("Any", bench),
            policy=Policy({}),
            pmi_mode=None,
            nested=False,
            log_files=log_files,
            hostname_localhost=True,
        )
        self.ranks = ranks
        self.process = Process(1, Resources(cores=ranks), lifetime)
        self.launcher.launch(self.process)
        self.is_behind_relay = lifetime is Lifetime.BLOCK and ranks == 1
        self.events = iter(["alloc", "start", "finish", "clean", ""])
        self.connection = iter(["hello", "lost"])
        self.peer = b""

    def member(self) -> Member | None:
        return self.launcher._members.get("1")

    def take(self) -> None:
        for answer in self.bench.submitted[:1]:
            self.bench.submitted.clear()
            answer(JOB)

    def refuse(self) -> None:
        for answer in self.bench.submitted[:1]:
            self.bench.submitted.clear()
            self.events, self.connection = iter(()), iter(())
            answer(Refused("no"))

    def event(self, *more: str) -> None:
        """Flux tells about the next thing that happens to the job."""
        if self.bench.watching:
            for event in more or itertools.islice(self.events, 1):
                self.bench.watching[0](event, {"status": 256})

    def lose_sight(self) -> None:
        self.event("")
        self.bench.watching.clear()

    def connection_changes(self) -> None:
        for change in itertools.islice(self.connection, 1):
            if change == "hello":
                self.peer = PEER
                about = {"host": "there", "pid": 4711, "size": self.ranks, "library": "", "version": ""}
                self.launcher._on_message(PEER, ["hello", about], [])
            else:
                self.launcher._on_lost(PEER)
                self.peer = b""

    def result(self) -> None:
        if self.peer and not self.is_behind_relay:
            self.launcher._on_message(PEER, ["result", 1, 0.0, "", {}], [])

    def relay_reports_exit(self) -> None:
        if self.peer and self.is_behind_relay:
            about = {"pid": 4712, "status": 9, "text": "it died", "stderr": "", "handed": 0, "unstarted": []}
            self.launcher._on_message(PEER, ["done", [[1, ["exit", about], 0]]], [])

    def terminate(self) -> None:
        self.launcher.kill(self.process, signal.SIGTERM)

    def kill(self) -> None:
        self.launcher.kill(self.process, signal.SIGKILL)

    def timer(self) -> None:
        for timer in self.bench.timers[:1]:
            del self.bench.timers[0]
            timer()

    def output(self) -> None:
        for reader in self.bench.reading[:1]:
            self.bench.reading.clear()
            reader(b"last words\n")

    def lose_instance(self) -> None:
        self.launcher._on_instance_lost("the instance was lost")

    def close(self) -> None:
        self.launcher.close()


NAMES = [name for name in vars(Steps) if name[0] != "_" and name not in ("member", "close")]
FLUX = ["take", "refuse", "event", "lose_sight", "output", "lose_instance"]


@pytest.fixture(autouse=True)
def played(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(workers, "FluxInstance", lambda events, *_: events)
        patch.setattr(workers, "Router", lambda events, *_, **__: events)
        yield


def steps_of(lifetime: Lifetime, ranks: int = 1, log_files: bool = False) -> Steps:
    return Steps(lifetime, ranks, log_files)


def test_legal_moves() -> None:
    assert {(state, target) for state, targets in LEGAL_MOVES.items() for target in targets} == MOVES
    assert set(LEGAL_MOVES) == set(State)


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("target", State)
def test_move(state: State, target: State) -> None:
    member = Member.__new__(Member)
    member.identity, member.state = "1", state
    if (state, target) in MOVES:
        member.move(target)
        assert member.state is target
    else:
        with pytest.raises(RuntimeError, match=f"worker 1, {state.name}: illegal move to {target.name}"):
            member.move(target)
        assert member.state is state


@settings(repeatable, max_examples=examples(200))
@given(
    st.sampled_from([(Lifetime.CALL, 1), (Lifetime.CALL, 2), (Lifetime.BLOCK, 1), (Lifetime.BLOCK, 2)]),
    st.booleans(),
    st.lists(st.sampled_from(NAMES), max_size=30),
    st.none() | st.lists(st.sampled_from(FLUX), max_size=5),
)
def test_a_worker_ends_once(
    kind: tuple[Lifetime, int], log_files: bool, names: list[str], closing: list[str] | None
) -> None:
    steps = steps_of(*kind, log_files)
    seen = [STARTING]
    for name in names:
        getattr(steps, name)()
        member = steps.member()
        state = OVER if member is None else member.state
        assert state >= seen[-1]
        seen.append(state)
        assert bool(steps.bench.ended) == (state is OVER)
    if closing is not None:
        told = len(steps.bench.ended)
        steps.bench.meanwhile = lambda: [getattr(steps, name)() for name in closing]
        steps.close()
        for name in NAMES:
            getattr(steps, name)()
        assert len(steps.bench.ended) == told, "no event follows"
    else:
        # Flux is in time with everything, and tells the end of each job.
        while steps.member() is not None:
            for name in ("take", "event", "output", "timer"):
                getattr(steps, name)()
        assert len(steps.bench.ended) == 1
    assert steps.launcher._members == {}


@pytest.mark.parametrize(
    ("names", "states"),
    [
        (["connection_changes", "event", "connection_changes"], [CONNECTED, FINISHED, ENDING]),
        (["connection_changes", "connection_changes", "event"], [CONNECTED, LEFT, ENDING]),
        (["connection_changes", "event", "timer"], [CONNECTED, FINISHED, ENDING]),
        (["connection_changes", "connection_changes", "timer"], [CONNECTED, LEFT, OVER]),
        (["event"], [ENDING]),
        (["event", "output"], [ENDING, OVER]),
        (["event", "timer"], [ENDING, OVER]),
        (["event", "lose_instance", "output"], [ENDING, ENDING, OVER]),
        (["connection_changes", "lose_instance"], [CONNECTED, OVER]),
    ],
)
def test_the_two_ends_of_a_worker(names: list[str], states: list[State]) -> None:
    steps = steps_of(Lifetime.CALL)
    steps.take()
    steps.event("alloc", "start")
    steps.events = iter(["finish"])
    seen = []
    for name in names:
        getattr(steps, name)()
        member = steps.member()
        seen.append(OVER if member is None else member.state)
    assert seen == states
    assert bool(steps.bench.ended) == (states[-1] is OVER)


def test_nothing_keeps_a_worker_after_its_end() -> None:
    """Neither the timeouts that are still running nor a question to Flux that has not been answered."""
    steps = steps_of(Lifetime.CALL)
    steps.take()
    steps.kill()
    for _ in range(3):
        steps.event()
    assert steps.bench.reading
    steps.bench.timers[-1]()
    assert [end.status for end in steps.bench.ended] == [256]
    process, steps.bench.ended = weakref.ref(steps.process), []
    del steps.process
    gc.collect()
    assert steps.bench.timers
    assert process() is None


def test_the_last_words_of_a_job() -> None:
    steps = steps_of(Lifetime.CALL)
    steps.take()
    for _ in range(3):
        steps.event()
    steps.output()
    assert bytes(steps.process.stderr) == b"last words\n"
    (end,) = steps.bench.ended
    assert os.waitstatus_to_exitcode(cast("int", end.status)) == 1


def test_the_last_words_are_read_where_the_job_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The session may go elsewhere meanwhile, and even to a directory that is gone."""
    for name in ("then", "now"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "then")
    steps = steps_of(Lifetime.CALL, log_files=True)
    (tmp_path / "then" / f"flux_{job_name(JOB)}.err").write_text("last words\n")
    os.chdir(tmp_path / "now")
    (tmp_path / "now").rmdir()
    steps.take()
    steps.event("start", "finish")
    assert bytes(steps.process.stderr) == b"last words\n"
    assert len(steps.bench.ended) == 1


@pytest.mark.parametrize("number", [0, signal.SIGTERM, signal.SIGKILL])
def test_a_connection_that_ends_after_our_signal_was_not_lost(number: int) -> None:
    steps = steps_of(Lifetime.CALL)
    steps.take()
    steps.connection_changes()
    steps.event("start")
    if number:
        steps.launcher.kill(steps.process, number)
    steps.bench.timers.clear()
    steps.connection_changes()
    steps.timer()
    why = f"this executor sent it {signal.Signals(number).name}" if number else "the connection to it was lost"
    assert [end.text[: len(why)] for end in steps.bench.ended] == [why]


def test_a_job_that_has_ended_is_not_said_to_be_cancelled() -> None:
    """Its relay, which was to signal the worker, has not ended its connection."""
    steps = steps_of(Lifetime.BLOCK)
    steps.take()
    steps.connection_changes()
    steps.event("start")
    steps.kill()
    steps.event("finish")
    steps.timer()
    steps.output()
    assert steps.bench.cancelled == 0
    assert [end.status for end in steps.bench.ended] == [256]


@pytest.mark.parametrize(
    ("before", "meanwhile"),
    [
        ([], "refuse"),
        ([], "take"),
        (["take", "event", "event"], "event"),
        (["take", "event", "event", "event"], "output"),
        (["take"], "lose_sight"),
        (["take"], "lose_instance"),
    ],
)
def test_events_of_flux_while_the_executor_ends(before: list[str], meanwhile: str) -> None:
    """No event follows."""
    steps = steps_of(Lifetime.CALL)
    for name in before:
        getattr(steps, name)()
    steps.bench.meanwhile = getattr(steps, meanwhile)
    steps.close()
    assert steps.bench.ended == []
