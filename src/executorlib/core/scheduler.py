"""Decides what happens next: which call starts, where, and what the death of a worker means.

Pure: events come in as calls of `on_...`, decisions go out through `take_effects`; no I/O, no thread, no clock.
`Scheduler` implements the life of a call. Its two kinds differ in the life of workers: a fresh worker for every call
(`FreshScheduler`), or a block of workers that take call after call (`BlockScheduler`).
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

from executorlib.core.ledger import Allocation, Ledger, Node
from executorlib.core.task import CANCELLED, DONE, FAILED, READY, WAITING, State, Task


class Worker:
    """A process, or the ranks of one MPI world, that runs calls.

    Attributes:
        number: Unique in its executor, counted from 1.
        slot: Its `executorlib_worker_id`: 0…n-1 in a block, 0 otherwise.
        allocation: What it holds.
        calls: In a block, calls handed to it and not over, in the order in which it runs them; otherwise the one call
            that it is for, from its launch to its end.
        ready: Whether it can take calls.
        retiring: Whether it is to end once its calls are over.
        stopping: Whether we are ending it ourselves.
        lookahead: Whether it can hold calls that it has not started, and give them back.
    """

    __slots__ = (
        "allocation",
        "calls",
        "lookahead",
        "number",
        "ready",
        "retiring",
        "slot",
        "stopping",
    )

    def __init__(self, number: int, slot: int, allocation: Allocation) -> None:
        self.number = number
        self.slot = slot
        self.allocation = allocation
        self.calls: list[Task] = []
        self.ready = False
        self.retiring = False
        self.stopping = False
        self.lookahead = False

    def __repr__(self) -> str:
        return f"<worker {self.number}>"


class Launch(NamedTuple):
    """Start a worker. ``task`` is the call that a fresh worker is started for."""

    worker: Worker
    task: Task | None


class Send(NamedTuple):
    """Hand calls to a worker that is ready."""

    worker: Worker
    tasks: list[Task]


class Recall(NamedTuple):
    """Take back up to ``most`` calls that the worker has not started; `on_recalled` tells which ones came back."""

    worker: Worker
    most: int


class Stop(NamedTuple):
    """Let a worker that has no calls end."""

    worker: Worker


class Kill(NamedTuple):
    """End a worker and everything that it started, now."""

    worker: Worker


class LookUp(NamedTuple):
    """All inputs of the call are there: look it up in the cache, then call `on_found` or `on_missed`."""

    task: Task


class Fail(NamedTuple):
    """The call can no longer run."""

    task: Task
    reason: str


Effect: TypeAlias = Launch | Send | Recall | Stop | Kill | LookUp | Fail


class ReadyQueue:
    """Calls of one demand that wait for resources: highest priority first, then in the order of submission."""

    def __init__(self) -> None:
        self._by_priority: dict[int, deque[Task]] = {}
        self._priorities: list[int] = []  # a heap of the negated priorities whose queues may hold calls

    def push(self, task: Task) -> None:
        """Append a call."""
        self._queue(task.resources.priority).append(task)

    def push_back(self, task: Task) -> None:
        """Put back a call that was taken, in front of the others."""
        self._queue(task.resources.priority).appendleft(task)

    def _queue(self, priority: int) -> deque[Task]:
        queue = self._by_priority.get(priority)
        if queue is None:
            queue = self._by_priority[priority] = deque()
            heapq.heappush(self._priorities, -priority)
        return queue

    def peek(self) -> Task | None:
        """The next call, or None. Drops cancelled calls on the way."""
        while self._priorities:
            queue = self._by_priority[-self._priorities[0]]
            while queue:
                if queue[0].state is READY:
                    return queue[0]
                queue.popleft()
            if len(self._priorities) == 1:
                return None  # keep the queue: the next call most often has the same priority
            del self._by_priority[-heapq.heappop(self._priorities)]
        return None

    def pop(self) -> Task:
        """Remove and return the call that `peek` showed."""
        return self._by_priority[-self._priorities[0]].popleft()

    def __iter__(self) -> Iterator[Task]:
        for queue in self._by_priority.values():
            yield from (task for task in queue if task.state is READY)


class Scheduler:
    """The life of calls, whatever runs them. Subclasses decide in `_fill` which call goes where.

    Events that only concern workers which take call after call do nothing here.

    Attributes:
        size: How many workers are kept for further calls.
    """

    ledger: Ledger
    size = 0

    def __init__(self) -> None:
        self._effects: list[Effect] = []
        self._to_look_up: list[Task] = []
        self._worker_number = 0
        self.workers: dict[int, Worker] = {}
        self.unfinished = 0  # calls submitted and not over
        self.not_started = 0  # those of them that are waiting or ready

    @property
    def launching(self) -> int:
        """Number of calls whose own worker is not known to have started."""
        return 0

    # -- events -----------------------------------------------------------------------------------------------

    def on_submit(self, task: Task) -> None:
        """A call was submitted. It first waits for its ``task.missing`` inputs."""
        self.unfinished += 1
        self.not_started += 1
        if not task.missing:
            self._inputs_complete(task)

    def on_input(self, task: Task) -> None:
        """One of the inputs that the call waits for is done, or is a job after which the call's job can run."""
        task.missing -= 1
        if not task.missing and task.state is WAITING:
            self._inputs_complete(task)

    def on_missed(self, task: Task) -> None:
        """The cache does not have the call."""
        if task.state is WAITING:
            self._make_ready(task)

    def on_found(self, task: Task) -> None:
        """The cache had the call's result."""
        self._end(task, DONE)

    def on_failed(self, task: Task) -> None:
        """The call cannot run: one of its inputs failed, or it cannot be sent."""
        self._end(task, FAILED)

    def on_cancel(self, task: Task) -> None:
        """The call's future was cancelled before the call was handed to a worker."""
        if not task.over:
            self._end(task, CANCELLED)

    def on_connected(self, worker: Worker) -> None:
        """The worker can be sent messages. One that takes call after call is not ready before it says so."""

    def on_started(self, worker: Worker, lookahead: bool = False) -> None:
        """The worker can take calls from now on."""
        raise NotImplementedError

    def on_result(
        self, worker: Worker, task: Task, seconds: float, failed: bool = False, leaving: bool = False
    ) -> None:
        """A worker has finished a call.

        Args:
            worker: The worker.
            task: The call.
            seconds: How long the call took.
            failed: Whether it raised.
            leaving: Whether the worker's process has nothing left to do but exit.
        """
        raise NotImplementedError

    def on_unsent(self, worker: Worker, task: Task, state: State) -> None:
        """A call in a `Send` was not sent: it was cancelled just before, or it cannot be pickled."""
        raise NotImplementedError

    def on_recalled(self, worker: Worker, tasks: list[Task]) -> None:
        """The worker gave these calls back without having started them."""

    def on_planned_exit(self, worker: Worker) -> None:
        """We are ending this worker ourselves, so it must not count as one that died."""

    def on_exit(self, worker: Worker, recalled: list[Task]) -> list[Task]:
        """A worker is gone. It had not started the calls in ``recalled``, which run elsewhere instead.

        Returns:
            The calls that were lost with it; they count as failed.
        """
        raise NotImplementedError

    def on_node_lost(self, node: Node) -> list[Worker]:
        """A node is gone for good: nothing more is placed there.

        Returns:
            The workers that hold a part of it. `on_exit` must still be called for each of them.
        """
        raise NotImplementedError

    def on_resize(self, size: int) -> None:
        """Keep this many workers from now on."""

    def on_break(self, reason: str) -> None:
        """No worker can be kept from now on."""

    # -- what to do -------------------------------------------------------------------------------------------

    def take_effects(self) -> list[Effect]:
        """Decide what can be decided now, and return the effects in the order in which to carry them out."""
        if self._to_look_up:
            # Only now, because the call may have been cancelled since.
            self._effects += [LookUp(task) for task in self._to_look_up if not task.over]
            self._to_look_up.clear()
        self._fill()
        effects = self._effects
        self._effects = []
        return effects

    # -- the common parts -------------------------------------------------------------------------------------

    def _fill(self) -> None:
        raise NotImplementedError

    def _enqueue(self, task: Task) -> None:
        raise NotImplementedError

    def _inputs_complete(self, task: Task) -> None:
        if task.resources.cache_directory is not None:
            self._to_look_up.append(task)
        else:
            self._make_ready(task)

    def _make_ready(self, task: Task) -> None:
        task.move(READY)
        self._enqueue(task)

    def _end(self, task: Task, state: State) -> None:
        if task.state is WAITING or task.state is READY:
            self.not_started -= 1
        task.move(state)
        self.unfinished -= 1

    def _workers_on(self, node: Node) -> list[Worker]:
        return [
            worker
            for worker in self.workers.values()
            if (held := worker.allocation).node is node
            or (held.further and any(share.node is node for share in held.further))
        ]

    def _new_worker(self, slot: int, allocation: Allocation) -> Worker:
        self._worker_number += 1
        worker = Worker(self._worker_number, slot, allocation)
        self.workers[worker.number] = worker
        return worker
