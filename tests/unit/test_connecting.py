"""A worker that connects by itself, without a network: its messages, and its end."""

from __future__ import annotations

import gc
import subprocess
import sys
from typing import Any, cast

import pytest

import fakes
from executorlib.launchers.connecting import ConnectingWorker
from executorlib.launchers.contract import Lifetime, Process
from fakes import Events

ABOUT = {"host": "node7", "pid": 70, "size": 1, "library": "Some MPI 1.0"}
RESULT: list[Any] = ["result", 1, 0.1, "", {}]
ERROR: list[Any] = ["error", 1, 0.1, "", {}]


class Bench(Events):
    """Loop and router in one: notes what they are told."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[Any] = []  # to the worker
        self.ended = 0

    def on_message(self, process: Process, header: list[Any], frames: list[Any]) -> None:
        self.told.append(header)

    def send(self, peer: bytes, header: list[Any], frames: list[Any]) -> None:
        self.sent.append((peer, header))

    def make(self, ranks: int = 1, single: bool = True, **options: Any) -> ConnectingWorker:
        process = fakes.process(lifetime=Lifetime.CALL if single else Lifetime.BLOCK, cores=ranks)
        router = cast("Any", self)
        return ConnectingWorker(self, router, process, self.end, starter="a test", advice="Read on.", **options)

    def end(self) -> None:
        self.ended += 1


@pytest.fixture
def bench() -> Bench:
    return Bench()


def say(worker: ConnectingWorker, *header: Any, peer: bytes = b"1.0") -> None:
    worker.on_message(peer, list(header), [])


def connect(worker: ConnectingWorker) -> None:
    say(worker, "hello", {**ABOUT, "size": worker.process.resources.cores})


def test_it_is_known_by_its_hello(bench: Bench) -> None:
    worker = bench.make()
    connect(worker)
    assert (worker.peer, worker.process.host, worker.process.pid) == (b"1.0", "node7", 70)
    assert bench.told == ["connected"]


def test_host_and_pid_from_the_launcher_are_kept(bench: Bench) -> None:
    worker = bench.make()
    worker.process.host, worker.process.pid = "node1", 5  # of the mpiexec that runs it
    connect(worker)
    assert (worker.process.host, worker.process.pid) == ("node1", 5)


def test_a_worker_of_one_call_is_told_to_stop(bench: Bench) -> None:
    """It leaves only then, so that its end cannot come before its result, and it must leave in time."""
    worker = bench.make(ranks=2)
    connect(worker)
    say(worker, "ready")
    say(worker, *RESULT)
    assert bench.told == ["connected", RESULT]
    assert bench.sent == [(b"1.0", ["stop"])]
    assert worker.done
    assert bench.ended == 0
    (give_up,) = bench.timers
    give_up()
    assert bench.ended == 1


def test_a_timer_does_not_keep_a_worker(bench: Bench) -> None:
    worker = bench.make()
    connect(worker)
    say(worker, *RESULT)
    del worker
    gc.collect()
    (give_up,) = bench.timers
    give_up()
    assert bench.ended == 0


@pytest.mark.parametrize("leaves", [False, True])
def test_resources_may_be_free_before_the_worker_ends(bench: Bench, leaves: bool) -> None:
    worker = bench.make(leaves=leaves)
    connect(worker)
    say(worker, "result", 1, 0.1, "", {})
    assert bench.told[-1][4] == ({"leaving": True} if leaves else {})


@pytest.mark.parametrize("single", [True, False])
def test_a_world_with_a_failed_rank_is_ended(bench: Bench, single: bool) -> None:
    """The other ranks may wait for the failed one, so they can neither leave nor take another call."""
    worker = bench.make(ranks=2, single=single)
    connect(worker)
    say(worker, *ERROR, peer=b"1.1")
    assert bench.told == ["connected", ERROR]
    assert bench.sent == []
    assert bench.ended == 1


def test_a_single_process_outlives_an_error(bench: Bench) -> None:
    worker = bench.make(single=False)
    connect(worker)
    say(worker, "ready")
    say(worker, *ERROR)
    say(worker, *RESULT)
    assert bench.told == ["connected", ["ready"], ERROR, RESULT]
    assert (bench.sent, bench.ended, bench.timers) == ([], 0, [])


def test_ranks_that_do_not_find_each_other(bench: Bench) -> None:
    """Each believes that it is alone and would compute something else. The first one ends them all."""
    worker = bench.make(ranks=2)
    for peer in (b"1.0", b"1.0b"):
        say(worker, "hello", ABOUT, peer=peer)
    assert bench.told == []
    assert bench.ended == 1
    text = str(worker.process.verdict)
    assert "a test started 2 ranks" in text
    assert "world of size 1" in text
    assert "Some MPI 1.0" in text
    assert text.endswith("Read on.")


def test_a_job_that_comes_up_again(bench: Bench) -> None:
    """The queue started it a second time. The first one's call is lost, and the second has nothing to do."""
    worker = bench.make(single=False)
    connect(worker)
    say(worker, "hello", ABOUT, peer=b"1.0b")
    assert bench.told == ["connected"]
    assert bench.sent == [(b"1.0b", ["stop"])]
    assert worker.peer == b"1.0"


def test_single_machine_does_not_load_zeromq() -> None:
    """Only ranks need ZeroMQ there, and loading it takes a good part of an executor's start."""
    code = "import sys, executorlib.single_node.launcher; sys.exit('zmq' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
