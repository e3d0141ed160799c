"""The scheduler's decisions, without a process: recorded effects, simulated workers, two state machines, a cluster."""

from __future__ import annotations

import contextlib
import gc
import heapq
import itertools
import random
import signal
import socket
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import fakes
from contract.functions import until
from executorlib import serialize
from executorlib.core import fresh as core_fresh
from executorlib.core.block import LOOKAHEAD_SECONDS, MAX_LOOKAHEAD, BlockScheduler
from executorlib.core.fresh import OVERTAKEN_PER_CORE, FreshScheduler
from executorlib.core.ledger import Ledger, Node
from executorlib.core.lookup import Lookup
from executorlib.core.loop import Loop
from executorlib.core.scheduler import Effect, Fail, Kill, Launch, LookUp, Recall, Send, Stop, Worker
from executorlib.core.sending import Messages
from executorlib.core.task import CANCELLED, DONE, FAILED, LAUNCHING, READY, RUNNING, WAITING, CallFuture, Task
from executorlib.errors import ExecutorlibSocketError
from executorlib.jobs.executor import QueueExecutor
from executorlib.launchers.contract import Events, Exit, Process
from executorlib.resources import Demand, Resources
from executorlib.worker.protocol import SocketPermits, WorkerPermits
from fakes import InstantLauncher
from unit.properties import examples, repeatable

pytestmark = pytest.mark.timeout(240)  # some ten seconds of computing; a loaded machine may take long

# The driver: the loop's part, with workers that only exist in a dictionary.


@dataclass
class Call:
    """The driver's own record of a call, to compare with the scheduler's."""

    task: Task
    cached: bool | None = None  # None: no cache is asked
    sendable: bool = True
    future_cancelled: bool = False
    announced: bool = False
    starts: int = 0
    ends: list[str] = field(default_factory=list)


@dataclass
class Simulated:
    """A worker: reads the calls that it was handed one by one, and answers.

    The first call that it gets while it has none is its own; others may be taken back as long as it has not read them.
    """

    worker: Worker
    unread: deque[Task] = field(default_factory=deque)
    own: Task | None = None  # of the unread ones
    current: Task | None = None
    answers: deque[Task] = field(default_factory=deque)  # on their way to the executor
    connected: bool = False
    returns_calls: bool = False
    ending: bool = False

    def give_back(self, most: int) -> list[Task]:
        if not self.returns_calls:
            return []
        returned = [task for task in self.unread if task is not self.own][:most]
        for task in returned:
            self.unread.remove(task)
        return returned


class Driver:
    """Carries out effects as the loop does, checks invariants after each turn, counts what becomes of each call."""

    def __init__(self, scheduler: FreshScheduler | BlockScheduler) -> None:
        self.scheduler = scheduler
        self.calls: dict[int, Call] = {}
        self.workers: dict[int, Simulated] = {}
        self.launched: list[Worker] = []
        self.order: list[int] = []  # numbers of calls as they were handed to workers
        self.reasons: dict[int, str] = {}

    # The user's actions.

    def submit(
        self,
        demand: Demand = Demand(1),  # noqa: B008
        *,
        priority: int = 0,
        missing: int = 0,
        cached: bool | None = None,
        sendable: bool = True,
    ) -> Task:
        resources = Resources(priority=priority, cache_directory=None if cached is None else "/cache")
        number = len(self.calls) + 1
        task = Task(number, abs, (), {}, CallFuture(), resources, demand, missing)
        self.calls[number] = Call(task, cached, sendable)
        self.scheduler.on_submit(task)
        return task

    def submit_many(self, count: int, demand: Demand = Demand(1), **kwargs: Any) -> list[Task]:  # noqa: B008
        return [self.submit(demand, **kwargs) for _ in range(count)]

    def input_done(self, task: Task) -> None:
        self.scheduler.on_input(task)

    def fail_input(self, task: Task) -> None:
        self.scheduler.on_failed(task)
        self.end(task, "failed")

    def cancel_future(self, task: Task) -> None:
        """The user's thread cancels; the executor does not know yet."""
        assert not self.calls[task.number].announced
        self.calls[task.number].future_cancelled = True

    def cancel(self, task: Task) -> None:
        """The executor is told, too."""
        self.cancel_future(task)
        self.tell_cancelled(task)

    def tell_cancelled(self, task: Task) -> None:
        if not task.over:
            self.scheduler.on_cancel(task)
            self.end(task, "cancelled")

    # The workers' actions.

    def start(self, worker: Worker, returns_calls: bool = False) -> None:
        simulated = self.workers[worker.number]
        simulated.connected, simulated.returns_calls = True, returns_calls
        self.scheduler.on_started(worker, returns_calls)

    def read(self, worker: Worker) -> Task:
        """The worker starts the next call."""
        simulated = self.workers[worker.number]
        assert simulated.current is None
        simulated.current = task = simulated.unread.popleft()
        simulated.own = None
        self.calls[task.number].starts += 1
        return task

    def finish(self, worker: Worker) -> None:
        """The worker has finished its call; the answer is on its way."""
        simulated = self.workers[worker.number]
        assert simulated.current is not None
        simulated.answers.append(simulated.current)
        simulated.current = None

    def answer(self, worker: Worker, seconds: float = 0.0, failed: bool = False, leaving: bool = False) -> Task:
        """The answer arrives; the last one may say that nothing is left but to exit."""
        task = self.workers[worker.number].answers.popleft()
        self.scheduler.on_result(worker, task, seconds, failed=failed, leaving=leaving)
        assert task.state is (FAILED if failed else DONE)
        self.end(task, "failed" if failed else "done")
        return task

    def run(self, worker: Worker, seconds: float = 0.0, leaving: bool = False) -> Task:
        """All three: one call from start to answer."""
        self.read(worker)
        self.finish(worker)
        return self.answer(worker, seconds, leaving=leaving)

    def exit(self, worker: Worker) -> list[Task]:
        """The worker is gone; what it had sent before arrives first. Returns the calls that were lost."""
        simulated = self.workers[worker.number]
        while simulated.answers:
            self.answer(worker)
        del self.workers[worker.number]
        running = simulated.current or simulated.own
        lost = self.scheduler.on_exit(worker, simulated.give_back(len(worker.calls)))
        if simulated.returns_calls:
            assert lost == ([running] if running is not None else [])
        for task in lost:
            assert task.state is FAILED
            self.end(task, "lost")
        return lost

    # The loop's actions.

    def end(self, task: Task, how: str) -> None:
        ends = self.calls[task.number].ends
        ends.append(how)
        assert len(ends) == 1, f"{task} ended as {ends}"

    def turn(self) -> list[Effect]:
        """Decide and carry out until there is nothing left to do."""
        done: list[Effect] = []
        for _ in range(1000):
            effects = self.scheduler.take_effects()
            self.scheduler.check_invariants()
            self.check_effects(effects)
            for effect in effects:
                self.carry_out(effect)
            self.scheduler.check_invariants()
            if not effects:
                return done
            done += effects
        raise AssertionError(f"the scheduler never comes to rest: {done[-5:]}")

    def check_effects(self, effects: list[Effect]) -> None:
        """For subclasses: look at the decisions of one turn together."""

    def carry_out(self, effect: Effect) -> None:
        if isinstance(effect, Launch):
            assert effect.worker.number not in self.workers
            assert effect.task is None or effect.task.state is LAUNCHING
            self.workers[effect.worker.number] = Simulated(effect.worker)
            self.launched.append(effect.worker)
        elif isinstance(effect, Send):
            simulated = self.workers[effect.worker.number]
            assert simulated.connected
            idle = len(effect.worker.calls) == len(effect.tasks)
            for task in effect.tasks:
                assert task.state is RUNNING, f"{task} is to be sent"
                if self.send(simulated, task) and idle:
                    simulated.own = task
                    idle = False
        elif isinstance(effect, Recall):
            simulated = self.workers[effect.worker.number]
            assert simulated.returns_calls
            assert effect.most > 0
            if returned := simulated.give_back(effect.most):
                assert isinstance(self.scheduler, BlockScheduler)
                self.scheduler.on_recalled(effect.worker, returned)
        elif isinstance(effect, (Stop, Kill)):
            # The kill may come when the worker is gone already.
            simulated = self.workers.get(effect.worker.number, Simulated(effect.worker))
            assert isinstance(effect, Kill) or (not effect.worker.calls and simulated.connected)
            simulated.ending = True
        elif isinstance(effect, LookUp):
            self.look_up(effect.task)
        else:
            assert isinstance(effect, Fail)
            assert effect.task.state is FAILED
            self.reasons[effect.task.number] = effect.reason
            self.end(effect.task, "failed")

    def send(self, simulated: Simulated, task: Task) -> bool:
        call = self.calls[task.number]
        if call.future_cancelled:
            self.scheduler.on_unsent(simulated.worker, task, CANCELLED)
            self.end(task, "cancelled")
        elif not call.sendable:
            self.scheduler.on_unsent(simulated.worker, task, FAILED)
            self.end(task, "failed")
        else:
            call.announced = True
            self.order.append(task.number)
            simulated.unread.append(task)
            return True
        return False

    def look_up(self, task: Task) -> None:
        assert task.state is WAITING, f"{task} is to be looked up"
        if self.calls[task.number].cached:
            self.scheduler.on_found(task)
            self.end(task, "done")
        else:
            self.scheduler.on_missed(task)

    # Shorthand.

    @property
    def held(self) -> list[Worker]:
        """Workers that hold calls."""
        return [simulated.worker for simulated in self.workers.values() if simulated.worker.calls]

    def start_all(self, returns_calls: bool = False) -> None:
        for simulated in list(self.workers.values()):
            if not simulated.connected and not simulated.ending:
                self.start(simulated.worker, returns_calls)

    def unfinished(self) -> list[Task]:
        return [call.task for call in self.calls.values() if not call.task.over]

    def step(self, simulated: Simulated) -> None:
        """Let a worker do the next thing on its way to its end."""
        worker = simulated.worker
        fresh = isinstance(self.scheduler, FreshScheduler)
        if not simulated.connected and not simulated.ending:
            self.start(worker, not fresh)
        elif simulated.answers:
            self.answer(worker)
        elif simulated.current is not None:
            self.finish(worker)
        elif simulated.unread:
            self.read(worker)
        elif simulated.ending or (fresh and worker.calls[0].over):
            self.exit(worker)

    def drain(self, held: Simulated | None = None) -> None:
        """Let everything come to its end, but for one worker that gets stuck in its call."""
        for task in self.unfinished():
            while task.state is WAITING and task.missing:
                self.input_done(task)
        for task in self.unfinished():
            if self.calls[task.number].future_cancelled:
                self.tell_cancelled(task)
        before: object = None
        while before != (before := self.progress()):
            self.turn()
            for simulated in list(self.workers.values()):
                if simulated is not held and simulated.worker.number in self.workers:
                    self.step(simulated)
                    self.turn()

    def progress(self) -> object:
        return [
            (number, each.connected, len(each.unread), each.current, len(each.answers))
            for number, each in self.workers.items()
        ] + [(call.task.number, call.task.state) for call in self.calls.values()]

    @property
    def most_starts(self) -> int:
        """How often a call may be started."""
        return 1

    def check_end(self) -> None:
        """After `drain`: each call has ended once, was started as often as it may at most, and nothing is left."""
        assert self.unfinished() == []
        for call in self.calls.values():
            assert len(call.ends) == 1, f"{call.task} ended as {call.ends}"
            assert call.starts <= self.most_starts, f"{call.task} was started {call.starts} times"
            if call.ends == ["done"]:
                assert call.starts >= 1 or call.cached
            if call.ends == ["cancelled"]:
                assert call.starts == 0
        assert self.scheduler.unfinished == self.scheduler.not_started == 0
        assert set(self.scheduler.workers) == set(self.workers)


def turn_of(task: Task) -> tuple[int, int]:
    return -task.resources.priority, task.number


class FreshDriver(Driver):
    """Also keeps books of its own of what is free, and checks with them whose turn it is at each launch."""

    scheduler: FreshScheduler

    def __init__(
        self,
        nodes: list[Node],
        max_calls: int | None = None,
        overtaken: int = OVERTAKEN_PER_CORE,
        restart_limit: int = 0,
    ) -> None:
        with mock.patch.object(core_fresh, "OVERTAKEN_PER_CORE", overtaken):
            super().__init__(FreshScheduler(Ledger(nodes), max_calls, restart_limit))
        self.restarts: Counter[Task] = Counter()
        self.nodes = list(nodes)
        self.free = {node: [node.total_cores, node.total_gpus] for node in nodes}
        self.freed: set[Worker] = set()  # ahead of their exit
        self.ready: dict[int, int] = {}  # call number → when it became ready
        self.clock = itertools.count()

    @property
    def most_starts(self) -> int:
        return 1 + self.scheduler.restart_limit

    def fits(self, demand: Demand, share: tuple[int, int], node: Node) -> bool:
        """Return whether one share of a demand fits on a node."""
        cores, gpus = self.free[node]
        if demand.exclusive and cores < node.total_cores:
            return False
        return cores >= share[0] and gpus >= share[1]

    def has_room(self, task: Task) -> bool:
        """Return whether all shares fit at once, on nodes that are not kept for anybody."""
        nodes = [node for node in self.nodes if node.kept_for is None]
        shares = task.demand.shares()
        # A node that takes a large share takes a small one, too.
        return all(
            sum(self.fits(task.demand, share, node) for node in nodes) >= place for place, share in enumerate(shares, 1)
        )

    def note_ready(self) -> list[Task]:
        """All calls that wait for resources."""
        waiting = [call.task for call in self.calls.values() if call.task.state is READY]
        for task in waiting:
            self.ready.setdefault(task.number, next(self.clock))
        return waiting

    def place(self, task: Task) -> tuple[int, int]:
        """A call's place in the queue of its like."""
        return -task.resources.priority, self.ready[task.number]

    def heads(self, queued: list[Task]) -> list[Task]:
        """The first call of each demand."""
        queues: dict[Demand, list[Task]] = {}
        for task in queued:
            queues.setdefault(task.demand, []).append(task)
        return [min(queue, key=self.place) for queue in queues.values()]

    def submit(self, *args: Any, **kwargs: Any) -> Task:
        task = super().submit(*args, **kwargs)
        self.note_ready()
        return task

    def input_done(self, task: Task) -> None:
        super().input_done(task)
        self.note_ready()

    def look_up(self, task: Task) -> None:
        super().look_up(task)
        self.note_ready()

    def check_effects(self, effects: list[Effect]) -> None:
        launches = [effect for effect in effects if isinstance(effect, Launch)]
        starting = [effect.task for effect in launches if effect.task is not None]
        for task in starting:
            self.ready.setdefault(task.number, next(self.clock))
        queued = self.note_ready() + starting
        for worker, task in launches:
            assert task is not None
            queued.remove(task)
            for other in self.heads(queued):
                if other.demand == task.demand:
                    assert self.place(task) < self.place(other), f"{task} overtakes {other}, its like"
                elif turn_of(other) < turn_of(task):
                    assert not self.has_room(other), f"{task} is started although it is the turn of {other}, which fits"
            shares = worker.allocation.shares
            assert len({node for node, _, _ in shares}) == task.demand.nodes
            for (node, cores, gpus), share in zip(shares, task.demand.shares(), strict=True):
                assert self.fits(task.demand, share, node)
                most = node.total_cores if task.demand.exclusive else share[0]
                assert (len(cores), len(gpus)) == (most, share[1])
                self.free[node][0] -= len(cores)
                self.free[node][1] -= len(gpus)

    def answer(self, worker: Worker, seconds: float = 0.0, failed: bool = False, leaving: bool = False) -> Task:
        task = super().answer(worker, seconds, failed, leaving)
        if leaving and not worker.allocation.gpus:
            self.give_back(worker)
            self.freed.add(worker)
        return task

    def exit(self, worker: Worker) -> list[Task]:
        simulated = self.workers[worker.number]
        [task] = worker.calls
        over = task.over or bool(simulated.answers)
        begun = task.state is RUNNING
        lost = super().exit(worker)
        if worker not in self.freed:
            self.give_back(worker)
        again = (
            not over
            and any(share.node.lost for share in worker.allocation.shares)
            and (not begun or self.restarts[task] < self.scheduler.restart_limit)
            and self.scheduler.ledger.could_hold(task.demand)
        )
        assert lost == ([] if over or again else [task])
        if again:
            assert task.state is READY
            self.restarts[task] += begun
            self.ready[task.number] = -next(self.clock)  # before all of its like
        return lost

    def give_back(self, worker: Worker) -> None:
        for node, cores, gpus in worker.allocation.shares:
            self.free[node][0] += len(cores)
            self.free[node][1] += len(gpus)

    def lose(self, node: Node) -> None:
        """A node is gone, and so are all that had a part of it, as the launcher tells a little later."""
        self.nodes.remove(node)
        there = self.scheduler.on_node_lost(node)
        assert there == [
            each.worker
            for each in self.workers.values()
            if each.worker not in self.freed and node in [share.node for share in each.worker.allocation.shares]
        ]
        for worker in there:
            self.workers[worker.number].ending = True

    def turn(self) -> list[Effect]:
        effects = super().turn()
        # Nothing that could run is kept waiting.
        if self.scheduler.max_calls is None or len(self.scheduler.workers) < self.scheduler.max_calls:
            for task in self.note_ready():
                assert not self.has_room(task), f"{task} could run"
        return effects

    def run_one(self, worker: Worker) -> None:
        """A call from launch to exit."""
        if not self.workers[worker.number].connected:
            self.start(worker)
            self.turn()
        self.run(worker)
        self.exit(worker)

    def check_end(self) -> None:
        super().check_end()
        assert self.workers == {}
        for node in self.nodes:
            assert node.kept_for is None
            assert self.free[node] == [len(node.free_cores), len(node.free_gpus)] == [node.total_cores, node.total_gpus]


def given_worker(**wanted: bool) -> Any:
    """Let a rule run only where there are workers like that; it draws one with `Machine.worker`."""
    return precondition(lambda machine: bool(machine.workers_like(**wanted)))


class Machine(RuleBasedStateMachine):
    """The part that both lifetimes share. Several events may come before the loop gets to its turn."""

    driver: Driver

    def after(self, turn: bool) -> None:
        if turn:
            self.driver.turn()

    def workers_like(self, **wanted: bool) -> list[Simulated]:
        if not hasattr(self, "driver"):
            return []
        return [
            each
            for each in self.driver.workers.values()
            if all(bool(getattr(each, key)) == value for key, value in wanted.items())
        ]

    def worker(self, data: st.DataObject, **wanted: bool) -> Simulated:
        return data.draw(st.sampled_from(self.workers_like(**wanted)), label="worker")

    def cancellable(self) -> list[Task]:
        if not hasattr(self, "driver"):
            return []
        return [
            call.task
            for call in self.driver.calls.values()
            if not call.task.over and not call.announced and not call.future_cancelled
        ]

    def incomplete(self) -> list[Task]:
        return [task for task in self.cancellable() if task.missing]

    def cancelled_in_secret(self) -> list[Task]:
        if not hasattr(self, "driver"):
            return []
        return [call.task for call in self.driver.calls.values() if call.future_cancelled and not call.task.over]

    @precondition(lambda self: self.incomplete())
    @rule(data=st.data(), turn=st.booleans())
    def input_done(self, data: st.DataObject, turn: bool) -> None:
        self.driver.input_done(data.draw(st.sampled_from(self.incomplete()), label="call"))
        self.after(turn)

    @precondition(lambda self: self.incomplete())
    @rule(data=st.data(), turn=st.booleans())
    def input_failed(self, data: st.DataObject, turn: bool) -> None:
        self.driver.fail_input(data.draw(st.sampled_from(self.incomplete()), label="call"))
        self.after(turn)

    @precondition(lambda self: self.cancellable())
    @rule(data=st.data(), turn=st.booleans())
    def cancel(self, data: st.DataObject, turn: bool) -> None:
        self.driver.cancel(data.draw(st.sampled_from(self.cancellable()), label="call"))
        self.after(turn)

    @precondition(lambda self: self.cancellable())
    @rule(data=st.data())
    def cancel_in_secret(self, data: st.DataObject) -> None:
        """In the user's thread; the news of it comes later."""
        self.driver.cancel_future(data.draw(st.sampled_from(self.cancellable()), label="call"))

    @precondition(lambda self: self.cancelled_in_secret())
    @rule(data=st.data(), turn=st.booleans())
    def cancel_is_told(self, data: st.DataObject, turn: bool) -> None:
        self.driver.tell_cancelled(data.draw(st.sampled_from(self.cancelled_in_secret()), label="call"))
        self.after(turn)

    @given_worker(unread=True, current=False, ending=False)
    @rule(data=st.data())
    def reads(self, data: st.DataObject) -> None:
        self.driver.read(self.worker(data, unread=True, current=False, ending=False).worker)

    @given_worker(current=True, ending=False)
    @rule(data=st.data())
    def finishes(self, data: st.DataObject) -> None:
        self.driver.finish(self.worker(data, current=True, ending=False).worker)

    @given_worker(answers=True)
    @rule(
        data=st.data(),
        seconds=st.sampled_from([0.0, 1e-5, 1e-4, 1e-3, 0.004, 0.1, 60.0]),
        failed=st.booleans(),
        leaving=st.booleans(),
        turn=st.booleans(),
    )
    def answers(self, data: st.DataObject, seconds: float, failed: bool, leaving: bool, turn: bool) -> None:
        leaving = leaving and isinstance(self.driver, FreshDriver)
        self.driver.answer(self.worker(data, answers=True).worker, seconds, failed, leaving)
        self.after(turn)

    @given_worker()
    @rule(data=st.data(), turn=st.booleans())
    def exits(self, data: st.DataObject, turn: bool) -> None:
        """Of itself, killed, or dead: at any time."""
        self.driver.exit(self.worker(data).worker)
        self.after(turn)

    @precondition(lambda self: hasattr(self, "driver"))
    @rule()
    def turn(self) -> None:
        self.driver.turn()

    @invariant()
    def holds_together(self) -> None:
        if hasattr(self, "driver"):
            self.driver.scheduler.check_invariants()
            assert self.driver.scheduler.unfinished == len(self.driver.unfinished())

    def teardown(self) -> None:
        if hasattr(self, "driver"):
            self.driver.drain()
            self.driver.check_end()


def spread(nodes: int, further: int, cores: int, gpus: int = 0, exclusive: bool = False) -> Demand:
    """A demand of several nodes: that many ranks and some more, each with these cores and GPUs."""
    ranks = nodes + further
    return Demand(ranks * cores, ranks * gpus, exclusive, nodes, ranks)


class FreshMachine(Machine):
    driver: FreshDriver

    @initialize(
        shapes=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 2)), min_size=1, max_size=3),
        max_calls=st.none() | st.integers(1, 4),
        overtaken=st.integers(1, 2),
        restart_limit=st.sampled_from([0, 1, 2]),
    )
    def set_up(self, shapes: list[tuple[int, int]], max_calls: int | None, overtaken: int, restart_limit: int) -> None:
        nodes = [
            Node(f"node{index}", range(cores), [str(gpu) for gpu in range(gpus)])
            for index, (cores, gpus) in enumerate(shapes)
        ]
        self.driver = FreshDriver(nodes, max_calls, overtaken, restart_limit)

    @rule(
        demand=st.one_of(
            st.builds(
                Demand,
                st.integers(1, 4),
                st.sampled_from([0, 0, 0, 1, 2]),
                st.sampled_from([False] * 4 + [True]),
                st.just(1),
                st.just(1),
            ),
            st.builds(
                spread,
                st.integers(2, 3),
                st.integers(0, 3),
                st.integers(1, 2),
                st.sampled_from([0, 0, 0, 1]),
                st.sampled_from([False] * 4 + [True]),
            ),
        ),
        priority=st.sampled_from([0, 0, 0, 1, -1]),
        missing=st.sampled_from([0, 0, 0, 1, 2]),
        cached=st.sampled_from([None, None, None, False, True]),
        sendable=st.sampled_from([True, True, True, False]),
        count=st.integers(1, 4),
        turn=st.booleans(),
    )
    def submit(
        self,
        demand: Demand,
        priority: int,
        missing: int,
        cached: bool | None,
        sendable: bool,
        count: int,
        turn: bool,
    ) -> None:
        assume(self.driver.scheduler.ledger.could_hold(demand))
        self.driver.submit_many(count, demand, priority=priority, missing=missing, cached=cached, sendable=sendable)
        self.after(turn)

    @given_worker(connected=False, ending=False)
    @rule(data=st.data(), turn=st.booleans())
    def starts(self, data: st.DataObject, turn: bool) -> None:
        self.driver.start(self.worker(data, connected=False, ending=False).worker)
        self.after(turn)

    @given_worker(unread=True, current=False, ending=False)
    @rule(data=st.data(), leaving=st.booleans(), turn=st.booleans())
    def runs(self, data: st.DataObject, leaving: bool, turn: bool) -> None:
        """All at once, so that a run of the machine gets to many calls."""
        worker = self.worker(data, unread=True, current=False, ending=False).worker
        self.driver.run(worker, leaving=leaving)
        if not leaving:
            self.driver.exit(worker)
        self.after(turn)

    @precondition(lambda self: hasattr(self, "driver") and len(self.driver.calls) > 10 and self.driver.nodes)
    @rule(data=st.data(), turn=st.booleans())
    def loses_node(self, data: st.DataObject, turn: bool) -> None:
        index = data.draw(st.integers(0, len(self.driver.nodes) - 1), label="node")
        self.driver.lose(self.driver.nodes[index])
        self.after(turn)


class BlockDriver(Driver):
    """Also checks whose turn it is at each handing over, and how much of it there is."""

    scheduler: BlockScheduler

    def __init__(self, size: int, restart_limit: int = 0, lookahead: bool = True, cores: int = 8) -> None:
        ledger = Ledger([Node("localhost", range(cores))])
        super().__init__(BlockScheduler(size, restart_limit, ledger, Demand(1), lookahead))
        self.average: float | None = None
        self.deaths: Counter[int] = Counter()  # by slot, those that were not planned

    def answer(self, worker: Worker, seconds: float = 0.0, failed: bool = False, leaving: bool = False) -> Task:
        self.average = seconds if self.average is None else 0.8 * self.average + 0.2 * seconds
        return super().answer(worker, seconds, failed, leaving)

    def exit(self, worker: Worker) -> list[Task]:
        if not worker.stopping:
            self.deaths[worker.slot] += 1
        return super().exit(worker)

    def planned_exit(self, worker: Worker) -> None:
        """The loop ends a worker on purpose: its call took too long."""
        self.scheduler.on_planned_exit(worker)
        self.workers[worker.number].ending = True

    def check_effects(self, effects: list[Effect]) -> None:
        sends = [effect for effect in effects if isinstance(effect, Send)]
        handed = [task for effect in sends for task in effect.tasks]
        waiting = [call.task for call in self.calls.values() if call.task.state is READY]
        for task in handed:
            assert not any(other.resources.priority > task.resources.priority for other in waiting)
        for effect in sends:
            ahead = len(effect.worker.calls) - 1
            assert ahead <= (MAX_LOOKAHEAD if effect.worker.lookahead else 0)
            assert ahead * (self.average or 0.0) <= LOOKAHEAD_SECONDS * (1 + 1e-9)
            assert ahead == 0 or self.average is not None
            assert not effect.worker.stopping
            assert not effect.worker.retiring

    def turn(self) -> list[Effect]:
        effects = super().turn()
        ready = [
            worker
            for worker in self.scheduler.workers.values()
            if worker.ready and not worker.retiring and not worker.stopping
        ]
        if any(not worker.calls for worker in ready):
            assert not any(call.task.state is READY for call in self.calls.values()), "idle, and calls wait"
        slots = [worker.slot for worker in self.scheduler.workers.values()]
        assert len(set(slots)) == len(slots)
        assert all(worker.slot < self.scheduler.size or worker.retiring for worker in self.scheduler.workers.values())
        starts = Counter(worker.slot for worker in self.launched)
        assert all(self.deaths[slot] <= self.scheduler.restart_limit + 1 for slot in starts)
        return effects

    def alive(self) -> list[Simulated]:
        """Workers that take calls, now or once they have started."""
        return [
            each
            for each in self.workers.values()
            if not each.worker.retiring and not each.worker.stopping and not each.ending
        ]


class BlockMachine(Machine):
    driver: BlockDriver

    @initialize(
        size=st.integers(1, 4),
        restart_limit=st.integers(0, 2),
        lookahead=st.sampled_from([True, True, False]),
        warm=st.booleans(),
        stuck=st.booleans(),
    )
    def set_up(self, size: int, restart_limit: int, lookahead: bool, warm: bool, stuck: bool) -> None:
        self.driver = BlockDriver(size, restart_limit, lookahead)
        self.stuck = stuck
        self.broken = False
        if warm:  # all is started and calls are known to be short
            self.driver.turn()
            self.driver.start_all(returns_calls=True)
            self.driver.submit()
            self.driver.turn()
            self.driver.run(self.driver.held[0], 1e-4)
            self.driver.turn()

    @rule(
        priority=st.sampled_from([0, 0, 0, 1, -1]),
        missing=st.sampled_from([0, 0, 0, 1, 2]),
        cached=st.sampled_from([None, None, None, False, True]),
        sendable=st.sampled_from([True, True, True, False]),
        count=st.integers(1, 30),
        turn=st.booleans(),
    )
    def submit(self, priority: int, missing: int, cached: bool | None, sendable: bool, count: int, turn: bool) -> None:
        self.driver.submit_many(count, priority=priority, missing=missing, cached=cached, sendable=sendable)
        self.after(turn)

    @given_worker(connected=False, ending=False)
    @rule(data=st.data(), returns_calls=st.sampled_from([True, True, False]), turn=st.booleans())
    def starts(self, data: st.DataObject, returns_calls: bool, turn: bool) -> None:
        self.driver.start(self.worker(data, connected=False, ending=False).worker, returns_calls)
        self.after(turn)

    @given_worker(unread=True, current=False, ending=False)
    @rule(data=st.data(), count=st.integers(1, 10), seconds=st.sampled_from([1e-5, 1e-3, 0.1]), turn=st.booleans())
    def runs(self, data: st.DataObject, count: int, seconds: float, turn: bool) -> None:
        """Several calls, before the loop hears of any."""
        simulated = self.worker(data, unread=True, current=False, ending=False)
        for _ in range(min(count, len(simulated.unread))):
            self.driver.read(simulated.worker)
            self.driver.finish(simulated.worker)
        while simulated.answers:
            self.driver.answer(simulated.worker, seconds)
        self.after(turn)

    @given_worker(connected=True, current=True, ending=False)
    @rule(data=st.data(), turn=st.booleans())
    def is_ended(self, data: st.DataObject, turn: bool) -> None:
        self.driver.planned_exit(self.worker(data, connected=True, current=True, ending=False).worker)
        self.after(turn)

    @precondition(lambda self: hasattr(self, "driver"))
    @rule(size=st.integers(1, 6), turn=st.booleans())
    def resizes(self, size: int, turn: bool) -> None:
        self.driver.scheduler.on_resize(size)
        self.driver.deaths.clear()  # who resizes wants workers: their restarts count anew
        self.driver.launched.clear()
        self.after(turn)

    @precondition(lambda self: hasattr(self, "driver") and len(self.driver.calls) > 40)
    @rule()
    def breaks(self) -> None:
        self.driver.scheduler.on_break("nothing goes")
        self.broken = True

    def teardown(self) -> None:
        if not hasattr(self, "driver"):
            return
        driver = self.driver
        driver.turn()
        if self.stuck:
            self.get_stuck(driver)
        driver.drain()
        driver.check_end()
        alive = driver.alive()
        later = driver.submit()
        driver.drain()
        assert driver.calls[later.number].ends == (["done"] if alive and not self.broken else ["failed"])
        driver.check_end()

    def get_stuck(self, driver: BlockDriver) -> None:
        """One worker never comes back from its call: all others are run by those that are left."""
        busy = [each for each in driver.workers.values() if each.current is not None and not each.ending]
        if not busy:
            return
        held = busy[0]
        driver.drain(held)
        others = [each for each in driver.alive() if each is not held]
        if others and not self.broken:
            assert driver.unfinished() in ([held.current], list(held.worker.calls)[:1])


def as_test(machine: type[Machine], number: int, steps: int) -> Any:
    machine.TestCase.settings = settings(
        repeatable, max_examples=examples(number), stateful_step_count=steps, report_multiple_bugs=False
    )
    return machine.TestCase


TestFreshMachine = as_test(FreshMachine, 120, 40)
TestBlockMachine = as_test(BlockMachine, 120, 40)


# A worker for every call.


def node(cores: int, gpus: int = 0, name: str = "localhost") -> Node:
    return Node(name, range(cores), [str(gpu) for gpu in range(gpus)])


def five_nodes() -> list[Node]:
    return [node(8, name=f"node{index}") for index in range(5)]


def on_one_node(cores: int, gpus: int = 0, **kwargs: Any) -> FreshDriver:
    return FreshDriver([node(cores, gpus)], **kwargs)


def run_to_the_end(driver: FreshDriver) -> list[int]:
    """Run call after call; returns their numbers in the order in which they were handed over."""
    driver.drain()
    driver.check_end()
    return driver.order


def test_first_come_first_served() -> None:
    driver = on_one_node(1)
    driver.submit_many(6)
    assert run_to_the_end(driver) == [1, 2, 3, 4, 5, 6]


def test_turn_is_by_readiness_within_a_demand() -> None:
    """A call that waited for inputs goes to the end of the queue."""
    driver = on_one_node(1)
    late = driver.submit(missing=2)
    driver.submit_many(2)
    driver.turn()
    driver.input_done(late)
    driver.turn()
    assert late.state is WAITING
    driver.input_done(late)
    assert run_to_the_end(driver) == [2, 3, 1]


def test_higher_priority_first() -> None:
    driver = on_one_node(1)
    for priority in (0, 5, -1, 5, 0, 1):
        driver.submit(priority=priority)
    assert run_to_the_end(driver) == [2, 4, 6, 1, 5, 3]


def test_priority_goes_before_size() -> None:
    driver = on_one_node(4)
    running = driver.submit(Demand(3))
    driver.turn()
    small, large = driver.submit(Demand(1)), driver.submit(Demand(4), priority=1)
    driver.turn()
    assert small.state is LAUNCHING  # it fills a gap in which the large one has no room
    driver.start_all()
    driver.turn()
    others = driver.submit_many(3, Demand(1))
    for worker in driver.launched:
        driver.run_one(worker)
    driver.turn()
    assert large.state is LAUNCHING
    assert running.over
    assert all(task.state is READY for task in others)


@pytest.mark.parametrize("max_calls", [1, 3])
def test_max_calls(max_calls: int) -> None:
    driver = on_one_node(8, max_calls=max_calls)
    driver.submit_many(10)
    for left in range(10, 0, -1):
        driver.turn()
        assert len(driver.workers) == min(max_calls, left)
        driver.run_one(next(iter(driver.workers.values())).worker)
    run_to_the_end(driver)


def test_result_does_not_free_what_its_worker_still_holds() -> None:
    driver = on_one_node(1)
    first, second = driver.submit_many(2)
    driver.turn()
    [worker] = driver.launched
    driver.start(worker)
    driver.turn()
    driver.run(worker)
    driver.turn()
    assert first.state is DONE
    assert second.state is READY
    driver.exit(worker)
    driver.turn()
    assert second.state is LAUNCHING


@pytest.mark.parametrize("gpus", [0, 1])
def test_worker_that_is_leaving_holds_its_gpus_until_it_is_gone(gpus: int) -> None:
    """Its driver frees a device only then; cores are free at once."""
    driver = on_one_node(1, gpus)
    driver.submit(Demand(1, gpus))
    driver.turn()
    [worker] = driver.launched
    driver.start(worker)
    driver.turn()
    driver.run(worker, leaving=True)
    second = driver.submit()
    driver.turn()
    assert second.state is (READY if gpus else LAUNCHING)
    driver.exit(worker)
    driver.turn()
    assert second.state is LAUNCHING
    run_to_the_end(driver)


def test_small_calls_fill_the_gaps() -> None:
    driver = on_one_node(4)
    driver.submit(Demand(3))
    blocked, small = driver.submit(Demand(2)), driver.submit(Demand(1))
    driver.turn()
    assert small.state is LAUNCHING
    assert blocked.state is READY


@pytest.mark.parametrize(
    ("nodes", "small", "large"),
    [
        pytest.param([node(8)], Demand(1), Demand(8), id="whole node"),
        pytest.param([node(8)], Demand(1), Demand(2), id="two cores"),
        pytest.param([node(8)], Demand(3), Demand(8), id="among larger ones"),
        pytest.param([node(8)], Demand(1), Demand(1, exclusive=True), id="exclusive"),
        pytest.param([node(4, 4)], Demand(1, 1), Demand(1, 4), id="all GPUs"),
        pytest.param(five_nodes(), Demand(1), Demand(8), id="one of five nodes", marks=pytest.mark.long),
        pytest.param(
            five_nodes(), Demand(2), Demand(1, exclusive=True), id="exclusive, one of five", marks=pytest.mark.long
        ),
        pytest.param(five_nodes(), Demand(2), spread(3, 21, 1), id="three whole nodes of five", marks=pytest.mark.long),
        pytest.param(
            five_nodes(), Demand(3), spread(2, 0, 1, exclusive=True), id="two nodes alone", marks=pytest.mark.long
        ),
        pytest.param(five_nodes(), Demand(1), spread(5, 0, 4), id="half of each node", marks=pytest.mark.long),
        pytest.param(
            [node(2, name="small"), node(8, name="large"), node(4, 2, name="gpus")],
            Demand(1),
            Demand(8),
            id="the one that is large enough",
        ),
    ],
)
def test_large_call_is_not_starved(nodes: list[Node], small: Demand, large: Demand) -> None:
    """Small calls keep coming, but once enough have overtaken it, room is made."""
    driver = FreshDriver(nodes)
    cores = sum(each.total_cores for each in nodes)
    driver.submit_many(2 * cores, small)
    driver.turn()
    task = driver.submit(large)
    driver.submit_many(2 * cores, small)  # ready at once, ahead of the queue's drain
    most = OVERTAKEN_PER_CORE * max(each.total_cores for each in nodes) + 3 * cores
    before = len(driver.launched)
    running = deque(driver.launched)
    while task.state is READY:
        driver.run_one(running.popleft())  # the oldest
        driver.submit(small)
        launched = len(driver.launched)
        driver.turn()
        running += driver.launched[launched:]
        assert len(driver.launched) - before <= most, "it was overtaken too often"
    run_to_the_end(driver)


def test_small_calls_use_what_a_large_one_has_to_wait_for() -> None:
    """Until it was overtaken often enough, nothing is kept idle for it."""
    driver = on_one_node(4)
    driver.submit_many(4)
    driver.turn()
    driver.submit(Demand(4))
    running = deque(driver.launched)
    for _ in range(OVERTAKEN_PER_CORE * 4):
        driver.run_one(running.popleft())
        driver.submit()
        driver.turn()
        running.append(driver.launched[-1])
        assert len(driver.workers) == 4


def reserve_by_overtaking(driver: FreshDriver, large: Demand) -> Task:
    """Have a call wait until a node is kept for it."""
    driver.submit_many(sum(each.total_cores for each in driver.nodes))
    driver.turn()
    task = driver.submit(large)
    running = deque(driver.launched)
    while not any(each.kept_for is not None for each in driver.nodes):
        driver.run_one(running.popleft())
        driver.submit()
        launched = len(driver.launched)
        driver.turn()
        running += driver.launched[launched:]
    return task


def test_call_for_which_a_node_is_kept_may_run_on_another() -> None:
    """It does if that node is free first, because calls on the kept one may take forever."""
    driver = FreshDriver([node(2, name="a"), node(2, name="b")])
    task = reserve_by_overtaking(driver, Demand(2))
    [other] = [each for each in driver.nodes if each.kept_for is None]
    for waiting in driver.unfinished():
        if waiting.state is READY and waiting is not task:
            driver.cancel(waiting)
    for simulated in list(driver.workers.values()):
        if simulated.worker.allocation.node is other:
            driver.run_one(simulated.worker)
    driver.turn()
    assert task.state is LAUNCHING
    run_to_the_end(driver)


def test_cancelling_the_call_for_which_a_node_is_kept_gives_the_node_back() -> None:
    driver = on_one_node(2)
    task = reserve_by_overtaking(driver, Demand(2))
    driver.run_one(next(iter(driver.workers.values())).worker)
    driver.submit()
    driver.turn()
    assert len(driver.workers) == 1
    driver.cancel(task)
    driver.turn()
    assert len(driver.workers) == 2
    run_to_the_end(driver)


def test_call_of_higher_priority_takes_over_the_node_that_is_kept() -> None:
    driver = on_one_node(2)
    task = reserve_by_overtaking(driver, Demand(2))
    urgent = driver.submit(Demand(2), priority=1)
    driver.turn()
    order = run_to_the_end(driver)
    assert order.index(urgent.number) < order.index(task.number)


def test_call_of_higher_priority_starts_at_once_where_a_node_is_kept_for_another() -> None:
    driver = on_one_node(4)
    task = reserve_by_overtaking(driver, Demand(4))
    for simulated in list(driver.workers.values())[:2]:
        driver.run_one(simulated.worker)
    driver.turn()
    assert len(driver.workers) == 2
    urgent = driver.submit(Demand(2), priority=1)
    driver.turn()
    assert (urgent.state, task.state) == (LAUNCHING, READY)
    run_to_the_end(driver)


def test_call_of_several_nodes_starts_when_all_are_there() -> None:
    """They may be the kept nodes or others, because calls on a kept one may take forever."""
    driver = FreshDriver([node(2, name=name) for name in "abc"])
    task = reserve_by_overtaking(driver, spread(2, 2, 1))
    for waiting in driver.unfinished():
        if waiting.state is READY and waiting is not task:
            driver.cancel(waiting)
    [free] = [each for each in driver.nodes if each.kept_for is None]
    one_kept = next(each for each in driver.nodes if each.kept_for is not None)
    for wanted in (one_kept, free):
        assert task.state is READY
        for simulated in list(driver.workers.values()):
            if simulated.worker.allocation.node is wanted:
                driver.run_one(simulated.worker)
        driver.turn()
    assert task.state is LAUNCHING
    assert {share.node for share in driver.launched[-1].allocation.shares} == {one_kept, free}
    run_to_the_end(driver)


def test_only_calls_on_a_lost_node_are_hit() -> None:
    driver = FreshDriver([node(2, name=name) for name in "abc"])
    wide, *small = driver.submit(spread(2, 2, 1)), *driver.submit_many(2)
    driver.turn()
    driver.start_all()
    driver.turn()
    [worker] = [each for each in driver.launched if each.calls == [wide]]
    lost = worker.allocation.shares[-1].node
    driver.lose(lost)
    assert [each.worker for each in driver.workers.values() if each.ending] == [worker]
    assert driver.exit(worker) == [wide]
    driver.turn()
    assert [task.state for task in small] == [RUNNING] * 2
    more = driver.submit_many(4)
    driver.turn()
    assert lost not in [share.node for each in driver.launched[3:] for share in each.allocation.shares]
    assert [task.state for task in more] == [LAUNCHING, LAUNCHING, READY, READY]
    run_to_the_end(driver)


def test_calls_that_no_remaining_node_can_hold_fail() -> None:
    """At once, or when their inputs are there."""
    nodes = [node(4, name="large"), node(2, name="small")]
    driver = FreshDriver(nodes)
    running, large, wide = driver.submit(Demand(4)), driver.submit(Demand(3)), driver.submit(spread(2, 0, 1))
    late, small = driver.submit(Demand(3), missing=1), driver.submit_many(3)
    driver.turn()
    driver.lose(nodes[0])
    driver.turn()
    assert [task.state for task in (large, wide, late)] == [FAILED, FAILED, WAITING]
    driver.input_done(late)
    driver.turn()
    assert late.state is FAILED
    for task, where in ((large, "3 cores and 0 GPUs on one node"), (wide, "2 cores and 0 GPUs on 2 nodes")):
        assert where in driver.reasons[task.number]
        assert "nodes left: 1; failed: large" in driver.reasons[task.number]
    assert [task.state for task in (running, *small)] == [LAUNCHING, LAUNCHING, LAUNCHING, READY]
    run_to_the_end(driver)


def test_reservation_ends_with_its_node() -> None:
    driver = FreshDriver([node(2, name=name) for name in "abc"])
    task = reserve_by_overtaking(driver, spread(2, 2, 1))
    driver.lose(next(each for each in driver.nodes if each.kept_for is not None))
    assert not any(each.kept_for is not None for each in driver.nodes)
    driver.turn()
    run_to_the_end(driver)
    assert driver.calls[task.number].ends == ["done"]


def started_on(driver: FreshDriver, name: str) -> list[Worker]:
    """Start all workers; those on a node."""
    driver.start_all()
    driver.turn()
    return [worker for worker in driver.held if worker.allocation.node.name == name]


def lose(driver: FreshDriver, name: str) -> None:
    there = started_on(driver, name)
    driver.lose(next(each for each in driver.nodes if each.name == name))
    for worker in there:
        driver.exit(worker)
    driver.turn()


def test_call_of_a_lost_node_runs_again_as_often_as_it_may() -> None:
    driver = FreshDriver([node(2, name=name) for name in "abc"], restart_limit=1)
    tasks = driver.submit_many(2) + driver.submit_many(1, Demand(2))
    driver.turn()
    where = {worker.calls[0].number: worker.allocation.node.name for worker in driver.held}
    assert where[1] == where[2] != where[3]
    lose(driver, where[1])
    assert [task.state for task in tasks[:2]] == [LAUNCHING, LAUNCHING]
    [again] = {worker.allocation.node.name for worker in driver.held} - {where[3]}
    lose(driver, again)
    assert [driver.calls[task.number].ends for task in tasks[:2]] == [["lost"], ["lost"]]
    run_to_the_end(driver)
    assert driver.calls[3].ends == ["done"]


def test_call_of_a_lost_node_goes_first() -> None:
    driver = FreshDriver([node(1, name="a"), node(1, name="b")], restart_limit=1)
    first, second, *_ = driver.submit_many(4)
    driver.turn()
    lose(driver, "a")
    [other] = driver.held
    driver.run_one(other)
    driver.turn()
    [worker] = driver.held
    assert {other.calls[0], worker.calls[0]} == {first, second}
    run_to_the_end(driver)


def test_call_that_was_not_handed_over_runs_elsewhere_in_any_case() -> None:
    driver = FreshDriver([node(1, name="a"), node(1, name="b")])
    task = driver.submit()
    driver.turn()
    [worker] = driver.held
    driver.lose(worker.allocation.node)
    driver.exit(worker)
    driver.turn()
    assert task.state is LAUNCHING
    run_to_the_end(driver)
    assert driver.calls[task.number].ends == ["done"]


def test_death_of_a_process_alone_is_no_reason_to_run_again() -> None:
    driver = FreshDriver([node(1, name="a"), node(1, name="b")], restart_limit=5)
    driver.submit()
    driver.turn()
    driver.start_all()
    driver.turn()
    [worker] = driver.held
    driver.read(worker)
    assert driver.exit(worker) == worker.calls


def test_nodes_are_not_kept_for_one_behind_a_call_that_runs_again() -> None:
    """Both need most of the one node that is left, and the other waiting call was submitted before."""
    driver = FreshDriver([node(4, name="a"), node(5, name="b")], overtaken=1, restart_limit=1)
    waiting, large = driver.submit(Demand(4), missing=1), driver.submit(Demand(4))
    driver.submit_many(2, Demand(2))
    driver.turn()
    driver.input_done(waiting)
    driver.submit_many(10, Demand(2))
    while not any(each.kept_for for each in driver.nodes):
        driver.run_one(next(worker for worker in driver.held if worker.calls != [large]))
        driver.turn()
    [worker] = started_on(driver, "a")
    assert worker.calls == [large]
    assert worker.allocation.node.kept_for is None
    lose(driver, "a")
    run_to_the_end(driver)
    assert driver.calls[large.number].ends == driver.calls[waiting.number].ends == ["done"]


def test_block_goes_on_without_a_lost_node() -> None:
    nodes = [node(1, name="a"), node(1, name="b")]
    scheduler = BlockScheduler(2, 1, Ledger(nodes), Demand(1))
    first, second = (effect.worker for effect in scheduler.take_effects() if isinstance(effect, Launch))
    assert scheduler.on_node_lost(first.allocation.node) == [first]
    scheduler.on_exit(first, [])
    assert scheduler.take_effects() == []
    scheduler.on_resize(2)
    assert scheduler.take_effects() == [], "lost cores do not come back"
    assert scheduler.on_node_lost(second.allocation.node) == [second]
    scheduler.on_exit(second, [])
    task = Task(1, abs, (), {}, CallFuture(), Resources(), Demand(1))
    scheduler.on_submit(task)
    [failed] = scheduler.take_effects()
    assert isinstance(failed, Fail)
    assert "failed: a, b" in failed.reason


def test_call_that_waits_for_a_gpu_does_not_idle_the_cores() -> None:
    """A GPU may be busy for hours, and the waiting call needs only one core beside it."""
    driver = on_one_node(4, gpus=1)
    driver.submit(Demand(1, 1))
    driver.turn()
    waiting = driver.submit(Demand(1, 1))
    driver.submit_many(3)
    driver.turn()
    running = deque(driver.launched[1:])
    for _ in range(10 * OVERTAKEN_PER_CORE * 4):
        driver.submit_many(2)
        driver.run_one(running.popleft())
        launched = len(driver.launched)
        driver.turn()
        running += driver.launched[launched:]
        assert len(driver.workers) >= 3, f"{4 - len(driver.workers)} cores are idle while calls of one core wait"
    assert waiting.state is READY


def test_death_of_a_worker_fails_its_call_alone() -> None:
    driver = on_one_node(2)
    first, second, third = driver.submit_many(3)
    driver.turn()
    driver.start_all()
    driver.turn()
    driver.read(driver.launched[0])
    assert driver.exit(driver.launched[0]) == [first]
    driver.turn()
    assert (second.state, third.state) == (RUNNING, LAUNCHING)
    assert driver.exit(driver.launched[2]) == [third]  # before it was started
    run_to_the_end(driver)
    assert [call.ends for call in driver.calls.values()] == [["lost"], ["done"], ["lost"]]


def test_cancel_while_the_worker_is_started() -> None:
    driver = on_one_node(1)
    task, other = driver.submit_many(2)
    driver.turn()
    driver.cancel(task)
    driver.turn()
    [worker] = driver.launched
    driver.start(worker)
    assert driver.turn() == [Kill(worker)]
    assert other.state is READY
    driver.exit(worker)
    driver.turn()
    assert other.state is LAUNCHING


def test_call_that_cannot_be_sent_ends_its_worker() -> None:
    driver = on_one_node(1)
    driver.submit(sendable=False)
    driver.turn()
    [worker] = driver.launched
    driver.start(worker)
    assert [type(effect) for effect in driver.turn()] == [Send, Kill]
    assert driver.exit(worker) == []
    run_to_the_end(driver)


# Events between two turns. Decisions that were made but not carried out must not outlive their reasons.


def test_cancel_between_start_and_send() -> None:
    driver = on_one_node(1)
    task = driver.submit()
    driver.turn()
    [worker] = driver.launched
    driver.start(worker)
    driver.cancel(task)
    assert driver.turn() == [Kill(worker)]
    driver.exit(worker)
    run_to_the_end(driver)


def test_exit_between_start_and_send() -> None:
    driver = on_one_node(1)
    task = driver.submit()
    driver.turn()
    [worker] = driver.launched
    driver.start(worker)
    assert driver.exit(worker) == [task]
    assert driver.turn() == []
    run_to_the_end(driver)


def test_cancel_before_the_look_up() -> None:
    driver = on_one_node(1)
    driver.cancel(driver.submit(cached=True))
    assert driver.turn() == []
    run_to_the_end(driver)


# A block of workers.


def warm_block(size: int, seconds: float, **kwargs: Any) -> BlockDriver:
    """A block whose workers have all started, and whose calls so far took so long."""
    driver = BlockDriver(size, **kwargs)
    driver.turn()
    driver.start_all(returns_calls=True)
    driver.submit()
    driver.turn()
    driver.run(driver.held[0], seconds)
    driver.turn()
    return driver


def test_no_lookahead_before_call_times_are_known() -> None:
    driver = BlockDriver(2)
    driver.turn()
    driver.start_all(returns_calls=True)
    driver.submit_many(10)
    driver.turn()
    assert [len(worker.calls) for worker in driver.launched] == [1, 1]


@pytest.mark.parametrize(
    ("seconds", "ahead"), [(1e-6, 128), (1e-4, 50), (0.001, 5), (0.0026, 1), (0.0051, 0), (10.0, 0)]
)
def test_lookahead_covers_five_milliseconds(seconds: float, ahead: int) -> None:
    driver = warm_block(1, seconds)
    driver.submit_many(300)
    # Calls that were handed over while the worker had none may be topped up only with an answer.
    driver.turn()
    assert len(driver.launched[0].calls) == 1 + ahead


def test_lookahead_shrinks_when_calls_turn_out_long() -> None:
    driver = warm_block(1, 1e-4)
    driver.submit_many(200)
    driver.turn()
    [worker] = driver.launched
    held = len(worker.calls)
    for _ in range(held):
        driver.run(worker, 1.0)
        driver.turn()
        if len(worker.calls) <= 1:
            break
    for _ in range(5):
        driver.run(worker, 1.0)
        driver.turn()
        assert len(worker.calls) == 1


def test_no_lookahead_if_switched_off() -> None:
    driver = warm_block(2, 1e-6, lookahead=False)
    driver.submit_many(20)
    driver.turn()
    assert [len(worker.calls) for worker in driver.launched] == [1, 1]


def test_few_calls_are_shared() -> None:
    driver = warm_block(4, 1e-5)
    driver.submit_many(8)
    driver.turn()
    assert [len(worker.calls) for worker in driver.launched] == [2, 2, 2, 2]


def test_several_calls_travel_together() -> None:
    driver = warm_block(1, 1e-5)
    driver.submit_many(300)
    driver.turn()
    driver.order.clear()
    sends = 0
    while driver.held:
        driver.run(driver.launched[0], 1e-5)
        sends += sum(isinstance(effect, Send) for effect in driver.turn())
    assert sends < 300 / 20


def test_block_takes_calls_in_turn() -> None:
    driver = warm_block(2, 1.0)
    driver.order.clear()
    for priority in (0, 0, 3, 0, -1, 3, 0, 0, 1, 0):
        driver.submit(priority=priority)
    driver.drain()
    priorities = [driver.calls[number].task.resources.priority for number in driver.order]
    assert priorities == sorted(priorities, reverse=True)
    for priority in set(priorities):
        numbers = [number for number in driver.order if driver.calls[number].task.resources.priority == priority]
        assert numbers == sorted(numbers)


def test_calls_of_a_blocked_worker_go_to_an_idle_one() -> None:
    driver = warm_block(2, 1e-4)
    tasks = driver.submit_many(40)
    driver.turn()
    blocked, free = driver.launched
    held = driver.read(blocked)  # and never comes back
    assert len(blocked.calls) > 1
    while driver.workers[free.number].unread:
        driver.run(free, 1e-4)
        driver.turn()
    assert list(blocked.calls) == [held]
    assert [task for task in tasks if not task.over] == [held]


def test_recall_that_comes_too_late() -> None:
    """The worker has started and finished the calls, and its answers are on their way."""
    driver = warm_block(2, 1e-4)
    driver.submit_many(20)
    driver.turn()
    fast, slow = driver.launched
    while driver.workers[slow.number].unread:
        driver.read(slow)
        driver.finish(slow)
    while driver.workers[fast.number].unread:
        driver.run(fast, 1e-4)
    recalls = [effect for effect in driver.turn() if isinstance(effect, Recall)]
    assert [effect.worker for effect in recalls] == [slow]
    assert driver.turn() == []  # it is not asked again and again
    while driver.workers[slow.number].answers:
        driver.answer(slow, 1e-4)
    driver.turn()
    driver.check_end()


def test_recall_that_is_partly_granted() -> None:
    driver = warm_block(2, 1e-4)
    driver.submit_many(20)
    driver.turn()
    fast, slow = driver.launched
    while len(driver.workers[slow.number].unread) > 2:
        driver.read(slow)
        driver.finish(slow)
    last = driver.read(slow)
    while driver.workers[fast.number].unread:
        driver.run(fast, 1e-4)
    driver.turn()
    [given_back] = driver.workers[fast.number].unread
    assert last in slow.calls
    assert given_back not in slow.calls
    driver.drain()
    driver.check_end()


def test_only_the_call_that_runs_is_lost_with_its_worker() -> None:
    driver = warm_block(1, 1e-4, restart_limit=1)
    tasks = driver.submit_many(10)
    driver.turn()
    [worker] = driver.launched
    driver.run(worker)
    driver.read(worker)
    assert driver.exit(worker) == [tasks[1]]
    driver.drain()
    driver.check_end()
    assert [driver.calls[task.number].ends[0] for task in tasks] == ["done", "lost", *["done"] * 8]
    assert driver.order[-8:] == [task.number for task in tasks[2:]]  # they kept their turn


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_restarts(limit: int) -> None:
    driver = BlockDriver(1, limit)
    tasks = driver.submit_many(limit + 3)
    for _ in range(limit + 1):
        driver.turn()
        worker = driver.launched[-1]
        driver.start(worker)
        driver.turn()
        driver.read(worker)
        driver.exit(worker)
    driver.turn()
    assert len(driver.launched) == limit + 1
    assert [worker.slot for worker in driver.launched] == [0] * (limit + 1)
    assert [driver.calls[task.number].ends for task in tasks] == [["lost"]] * (limit + 1) + [["failed"]] * 2
    # Not every executor has such an argument.
    assert (f"restart_limit={limit}" in driver.reasons[tasks[-1].number]) == (limit > 0)
    late = driver.submit()
    driver.turn()
    assert "have died" in driver.reasons[late.number]


def test_pool_works_on_as_long_as_one_worker_lives() -> None:
    driver = warm_block(3, 1e-4)
    for worker in driver.launched[:2]:
        driver.exit(worker)
    tasks = driver.submit_many(5)
    driver.drain()
    driver.check_end()
    assert all(task.state is DONE for task in tasks)


def test_pool_works_on_when_it_shrinks_after_a_death() -> None:
    """One of two workers has died, and one is wanted from now on: the living one stays."""
    driver = warm_block(2, 1e-4)
    driver.exit(driver.launched[0])
    driver.turn()
    driver.scheduler.on_resize(1)
    driver.turn()
    task = driver.submit()
    driver.drain()
    assert driver.calls[task.number].ends == ["done"], driver.reasons


def test_workers_that_we_end_do_not_count_as_restarts() -> None:
    driver = BlockDriver(1)
    for _ in range(5):
        task = driver.submit()
        driver.turn()
        worker = driver.launched[-1]
        driver.start(worker)
        driver.turn()
        driver.read(worker)
        driver.planned_exit(worker)
        assert driver.exit(worker) == [task]
    task = driver.submit()
    driver.drain()
    driver.check_end()
    assert driver.calls[task.number].ends == ["done"]


def test_worker_that_is_being_ended_gets_no_calls() -> None:
    driver = warm_block(1, 1e-4)
    first = driver.submit()
    driver.turn()
    [worker] = driver.launched
    driver.read(worker)
    driver.planned_exit(worker)
    second = driver.submit()
    driver.finish(worker)
    driver.answer(worker)
    driver.turn()
    assert (first.state, second.state) == (DONE, READY)
    driver.drain()
    driver.check_end()
    assert len(driver.launched) == 2


def test_growing() -> None:
    driver = warm_block(1, 1.0)
    driver.submit_many(3)
    driver.turn()
    driver.scheduler.on_resize(3)
    driver.turn()
    driver.start_all(returns_calls=True)
    driver.turn()
    assert [worker.slot for worker in driver.launched] == [0, 1, 2]
    assert [len(worker.calls) for worker in driver.launched] == [1, 1, 1]


def test_shrinking() -> None:
    """Surplus workers finish what they hold, take nothing new, and end."""
    driver = warm_block(3, 1.0)
    driver.submit_many(6)
    driver.turn()
    keep, *surplus = driver.launched
    driver.scheduler.on_resize(1)
    assert driver.turn() == []
    for worker in surplus:
        driver.run(worker, 1.0)
    assert set(driver.turn()) == {Stop(worker) for worker in surplus}
    for worker in surplus:
        driver.exit(worker)
    driver.drain()
    driver.check_end()
    assert list(driver.scheduler.workers.values()) == [keep]


def test_shrinking_and_growing_again() -> None:
    driver = warm_block(3, 1.0)
    driver.submit_many(3)
    driver.turn()
    driver.scheduler.on_resize(1)
    driver.turn()
    driver.scheduler.on_resize(3)
    driver.drain()
    driver.check_end()
    assert len(driver.launched) == 3  # none was replaced: they were asked to stay in time


def test_shrinking_to_nothing() -> None:
    """At shutdown every worker is asked to end; one that has not started need not start."""
    driver = warm_block(1, 1.0)
    driver.scheduler.on_resize(2)
    driver.turn()
    idle, late = driver.launched
    driver.scheduler.on_resize(0)
    assert driver.turn() == [Kill(late), Stop(idle)]
    driver.exit(idle)
    driver.exit(late)
    assert driver.turn() == []
    driver.check_end()


def test_block_that_waits_for_the_resources_of_retiring_workers() -> None:
    driver = warm_block(2, 1.0, cores=2)
    driver.submit_many(2)
    driver.turn()
    driver.scheduler.on_resize(1)
    driver.turn()
    driver.exit(driver.launched[0])
    driver.scheduler.on_resize(2)
    driver.drain()
    driver.check_end()


@pytest.mark.parametrize("idle", [False, True])
def test_broken_block_fails_calls_now_and_later(idle: bool) -> None:
    driver = BlockDriver(1)
    first = driver.submit()
    driver.turn()
    driver.scheduler.on_break("the workers cannot be set up")
    if idle:  # one of them could
        driver.start_all()
    driver.turn()
    later = driver.submit()
    driver.turn()
    assert first.state is later.state is FAILED
    assert set(driver.reasons.values()) == {"the workers cannot be set up"}


def test_calls_that_wait_for_inputs_fail_when_these_are_there() -> None:
    driver = BlockDriver(1)
    driver.turn()
    task = driver.submit(missing=1)
    driver.exit(driver.launched[0])
    driver.turn()
    assert task.state is WAITING
    driver.input_done(task)
    driver.turn()
    assert task.state is FAILED


# 1,000 nodes.


class Cluster:
    """Calls that take random times on many nodes, some of which fail; time passes from event to event.

    Args:
        nodes: The nodes.
        seed: Of all that is random.
        death_rate: Share of calls whose worker dies.
        node_failures: How many nodes are lost, with all that ran there.
    """

    def __init__(self, nodes: list[Node], seed: int, death_rate: float, node_failures: int) -> None:
        self.nodes = nodes
        self.chance = random.Random(seed)
        self.death_rate = death_rate
        self.scheduler = FreshScheduler(Ledger(nodes))
        self.events: list[tuple[float, int, Worker | Node]] = []
        self.numbers = itertools.count()
        self.now = 0.0
        self.in_use = 0
        self.ends: Counter[int] = Counter()
        self.handed = 0
        for each in self.chance.sample(nodes, node_failures):
            self.later(self.chance.uniform(0, 10), each)

    def run(self, tasks: list[Task]) -> float:
        """Run all calls. Returns the share of the cores that was in use while calls were waiting."""
        for task in tasks:
            self.scheduler.on_submit(task)
        self.turn()
        used = there = 0.0
        while self.events:
            time, number, what = heapq.heappop(self.events)
            if self.scheduler.not_started:
                used += self.in_use * (time - self.now)
                there += sum(each.total_cores for each in self.scheduler.ledger.nodes) * (time - self.now)
            self.now = time
            if isinstance(what, Node):
                for worker in self.scheduler.on_node_lost(what):
                    self.exit(worker)
            elif what.number in self.scheduler.workers:
                if self.chance.random() >= self.death_rate:
                    [task] = what.calls
                    self.scheduler.on_result(what, task, 0.0)
                    self.ends[task.number] += 1
                self.exit(what)
            self.turn()
            if number % 5000 == 0:
                self.scheduler.check_invariants()
        self.scheduler.check_invariants()
        return used / there

    def later(self, seconds: float, what: Worker | Node) -> None:
        heapq.heappush(self.events, (self.now + seconds, next(self.numbers), what))

    def exit(self, worker: Worker) -> None:
        self.in_use -= sum(len(share.cores) for share in worker.allocation.shares)
        for task in self.scheduler.on_exit(worker, []):
            self.ends[task.number] += 1

    def turn(self) -> None:
        while effects := self.scheduler.take_effects():
            for effect in effects:
                if isinstance(effect, Launch):
                    self.in_use += sum(len(share.cores) for share in effect.worker.allocation.shares)
                    self.scheduler.on_started(effect.worker)
                else:
                    assert isinstance(effect, Send)
                    self.handed += 1
                    self.later(self.chance.uniform(0.1, 2.0), effect.worker)

    def check_end(self, tasks: list[Task]) -> None:
        assert self.scheduler.unfinished == self.scheduler.not_started == self.in_use == 0
        assert self.scheduler.workers == {}
        assert self.handed == len(tasks)
        assert set(self.ends.values()) == {1}
        assert len(self.ends) == len(tasks)
        assert all(task.over for task in tasks)
        assert self.scheduler.ledger.free()[0] == sum(each.total_cores for each in self.scheduler.ledger.nodes)


def make_tasks(
    count: int, demands: list[Demand], chance: random.Random, priorities: tuple[int, ...] = (0,)
) -> list[Task]:
    future = CallFuture()
    resources = [Resources(priority=priority) for priority in priorities]
    return [
        Task(number, abs, (), {}, future, chance.choice(resources), chance.choice(demands))
        for number in range(1, count + 1)
    ]


@pytest.mark.long
@pytest.mark.parametrize("cores", [4, 8])
def test_cluster_is_used_well(cores: int) -> None:
    """Mixed calls of 1, 2 and 4 cores keep at least 95 % of 1,000 nodes busy, while workers and nodes fail."""
    nodes = [node(cores, name=f"node{index}") for index in range(1000)]
    cluster = Cluster(nodes, seed=1, death_rate=0.01, node_failures=20)
    tasks = make_tasks(20_000, [Demand(1), Demand(2), Demand(4)], random.Random(2))
    used = cluster.run(tasks)
    cluster.check_end(tasks)
    assert used >= 0.95


@pytest.mark.long
def test_cluster_loses_no_call() -> None:
    """All kinds of needs on nodes of all kinds."""
    nodes = [node(*shape, name=f"node{index}") for index, shape in enumerate([(4, 0), (16, 0), (8, 4), (32, 2)] * 250)]
    demands = [
        *(Demand(cores) for cores in (1, 1, 2, 4, 12, 32)),
        *(Demand(cores, gpus) for cores, gpus in ((1, 1), (4, 4), (8, 2), (20, 2))),
        Demand(1, 0, exclusive=True),
        Demand(20, 1, exclusive=True),
        spread(2, 14, 1),
        spread(3, 0, 2, 1),
        spread(4, 0, 16),
        spread(2, 0, 1, exclusive=True),
    ]
    cluster = Cluster(nodes, seed=3, death_rate=0.02, node_failures=50)
    tasks = make_tasks(20_000, demands, random.Random(4), priorities=(0, 0, 0, 1, -1))
    cluster.run(tasks)
    cluster.check_end(tasks)


# With the loop: what happens within one of its turns, by a launcher whose workers are there, or gone, at once.


@contextlib.contextmanager
def loop_with(
    then: Callable[[InstantLauncher, Process], None], scheduler: FreshScheduler | BlockScheduler | None = None
) -> Iterator[Loop]:
    def make(events: Events) -> InstantLauncher:
        launcher = InstantLauncher(events, lambda _, process: then(launcher, process))
        return launcher

    loop = Loop(
        scheduler or FreshScheduler(Ledger([node(1)])),
        make,
        Messages(Lookup()),
        block_resources=Resources() if isinstance(scheduler, BlockScheduler) else None,
        log_sizes=False,
        name="tested",
    )
    loop.start()
    try:
        yield loop
    finally:
        loop.shutdown(True)
        loop.join()


def submit_to(loop: Loop, **resources: Any) -> CallFuture:
    future = CallFuture()
    loop.submit(abs, (-1,), {}, future, Resources(**resources), Demand(1), [])
    return future


def test_loop_cancel_just_before_the_call_is_sent() -> None:
    cancelled: list[bool] = []

    def then(launcher: InstantLauncher, process: Process) -> None:
        [task] = process.calls
        cancelled.append(task.future.cancel())

    with loop_with(then) as loop:
        for _ in range(2):  # the second shows that the loop lives
            with pytest.raises(CancelledError):
                submit_to(loop).result(10)
    assert cancelled == [True, True]


def test_loop_exit_just_before_the_call_is_sent() -> None:
    """The news of a worker's start and of its end come together."""
    with loop_with(lambda launcher, process: launcher.exit(process)) as loop:
        for _ in range(2):
            with pytest.raises(ExecutorlibSocketError, match="it was killed"):
                submit_to(loop).result(10)


@pytest.mark.cache
def test_loop_cancel_just_before_the_look_up(tmp_path: Path) -> None:
    with loop_with(lambda launcher, process: launcher.exit(process)) as loop:
        held = threading.Event()
        loop.post(lambda: (held.wait(10), None)[1])
        future = submit_to(loop, cache_directory=str(tmp_path))
        assert future.cancel()
        held.set()
        with pytest.raises(ExecutorlibSocketError, match="it was killed"):
            submit_to(loop).result(10)
        assert future.cancelled()


def test_loop_news_of_a_worker_that_it_has_given_up() -> None:
    with loop_with(lambda launcher, process: launcher.exit(process)) as loop:
        unknown = fakes.process(99)
        loop.post(lambda: loop.on_connected(unknown))
        with pytest.raises(ExecutorlibSocketError, match="it was killed"):
            submit_to(loop).result(10)


@pytest.mark.parametrize("ready", [False, True])
def test_loop_worker_past_its_time_limit(ready: bool) -> None:
    """It is replaced unless it was never ready for a call, because that would go on forever."""
    launches = []

    def then(launcher: InstantLauncher, process: Process) -> None:
        launches.append(process)
        if len(launches) > 3:
            return  # the one that is replaced no more waits for calls
        if ready:
            launcher.events.on_message(process, ["ready"], [])
        launcher.events.on_exit(process, Exit(None, "its time was up", planned=True))

    with loop_with(then, BlockScheduler(1, 0, Ledger([node(1)]), Demand(1))) as loop:
        future = submit_to(loop)
        if ready:
            until(lambda: len(launches) == 4)
            loop.end_workers(signal.SIGKILL)
            assert future.exception(10) is not None
        else:
            with pytest.raises(ExecutorlibSocketError, match="its time was up"):
                future.result(10)
            assert len(launches) == 1


def test_loop_tells_why_a_worker_was_ended() -> None:
    """The fault says more than the signal that ended the worker for it."""

    def then(launcher: InstantLauncher, process: Process) -> None:
        process.verdict = RuntimeError("Its ranks do not find each other.")
        launcher.exit(process)

    with loop_with(then, BlockScheduler(1, 0, Ledger([node(1)]), Demand(1))) as loop:
        error = submit_to(loop).exception(10)
    assert "Its ranks do not find each other." in str(error)


class Noting(fakes.Silent):
    """Keeps the headers of messages."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def put(self, header: Any, frames: Any = ()) -> int:
        self.sent.append(header)
        return 0


@pytest.mark.parametrize("answers", [0, 1])
def test_loop_call_that_ends_its_worker_takes_no_other_along(answers: int) -> None:
    """Not even while the worker has yet to read messages of calls that were taken back from it."""
    sent: dict[Process, list[Any]] = {}

    def turn(step: Callable[[], object]) -> None:
        """Do this in the loop's thread, and wait until the loop has decided."""
        decided = threading.Event()
        loop.post(lambda: (step(), loop.call_soon(decided.set))[1])
        assert decided.wait(10)

    def submit(count: int) -> list[CallFuture]:
        futures: list[CallFuture] = []
        turn(lambda: futures.extend(submit_to(loop) for _ in range(count)))
        return futures

    def answer(*processes: Process) -> None:
        """Each worker answers the first call that it has."""
        for process in processes:
            loop.on_message(process, ["result", process.calls[0].number, 1e-6, "", {}], serialize.dumps(1))

    def held(process: Process) -> list[int]:
        return [call.number for call in process.calls]

    with contextlib.ExitStack() as sockets:

        def then(launcher: InstantLauncher, process: Process) -> None:
            give, take = map(sockets.enter_context, socket.socketpair())
            process.permits, taken[process] = SocketPermits(give, take), WorkerPermits(take)
            process.transport = noting = Noting()
            sent[process] = noting.sent
            launcher.events.on_message(process, ["ready"], [])

        taken: dict[Process, WorkerPermits] = {}
        with loop_with(then, BlockScheduler(2, 0, Ledger([node(2)]), Demand(1))) as loop:
            try:
                submit(1)
                turn(lambda: answer(*(process for process in sent if process.calls)))
                submit(4)
                one, other = sent
                second = held(one)[1]
                turn(lambda: answer(other))
                turn(lambda: answer(other))  # it is idle then
                assert held(other) == [second], "this was not taken back"
                sent[one].clear()
                turn(lambda: answer(one, other))
                for _ in range(answers):
                    submit(2)
                    turn(lambda: answer(one, other))
                futures = submit(4)
                fatal, _ = held(one)
                # The worker comes to its messages only now, and dies in that call.
                started = []
                for _, number, _, options in [["call", second, 0, {}], *sent[one]]:
                    if options.get("now") or taken[one].allow(number):
                        started.append(number)
                    if number == fatal:
                        break
                assert started[answers:] == [fatal]
                assert bool(options.get("now")) == bool(answers), "it asks only if it may have to read old messages"
                permits = one.permits
                assert permits is not None
                turn(lambda: loop.on_exit(one, Exit(9, "it was killed", unstarted=permits.take_back(9))))
                while other.calls:
                    turn(lambda: answer(other))
                failed = [str(future.exception(10)) for future in futures if future.exception(10) is not None]
                assert [text.partition(" has no result")[0] for text in failed] == [f"Call {fatal} of abs"]
            finally:
                loop.end_workers(signal.SIGKILL)


class Queue(QueueExecutor):
    """A row whose launcher is made by the row itself, as those of real queues are."""

    def _check_system(self, configuration: str | None) -> None: ...

    def _job_launcher(self, events: Any, *args: Any) -> Any:
        return InstantLauncher(events, lambda _, process: None)


def test_loop_does_not_keep_the_executor(tmp_path: Path) -> None:
    """A dropped executor is collected, which ends its loop. The maker of the launcher must not hold it."""
    executor = Queue(cache_directory=str(tmp_path))
    loop, gone = executor._loop, weakref.ref(executor)
    assert loop is not None
    try:
        del executor
        gc.collect()
        assert gone() is None
    finally:
        if gone() is not None:
            loop.shutdown(True)
        loop.join()
