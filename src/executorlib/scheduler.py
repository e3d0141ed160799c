"""Decides what happens next: which call starts, where, and what a death means.

Pure: events come in as calls of `on_...`, decisions go out through `take_effects`; no I/O, no thread, no clock.
Two lifetimes of workers share the life of calls (`Scheduler`): a fresh worker for every call (`FreshScheduler`)
and a block of workers that take call after call (`BlockScheduler`).
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

from executorlib.ledger import Allocation, Ledger, Node, Reservation
from executorlib.resources import Demand
from executorlib.task import (
    CANCELLED,
    DONE,
    FAILED,
    LAUNCHING,
    READY,
    RUNNING,
    WAITING,
    State,
    Task,
)


class Worker:
    """A process, or the ranks of one MPI world, that runs calls.

    Attributes:
        number: Unique in its executor, counted from 1.
        slot: What `executorlib_worker_id` is: 0…n-1 in a block, 0 otherwise.
        allocation: What it holds.
        calls: Calls handed to it and not over, in the order in which it runs them.
        ready: Whether it takes calls.
        retiring: Whether it is to end once its calls are over.
        stopping: Whether its end is our doing.
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
    """Start a worker. For a fresh worker ``task`` is the call that it is started for."""

    worker: Worker
    task: Task | None


class Send(NamedTuple):
    """Hand calls to a worker that is ready."""

    worker: Worker
    tasks: list[Task]


class Recall(NamedTuple):
    """Take back up to ``most`` calls that the worker has not started; `on_recalled` says which came back."""

    worker: Worker
    most: int


class Stop(NamedTuple):
    """Let a worker end; it has no calls."""

    worker: Worker


class Kill(NamedTuple):
    """End a worker and all that it started, now."""

    worker: Worker


class LookUp(NamedTuple):
    """All inputs of the call are there; look in the cache, then call `on_found` or `on_missed`."""

    task: Task


class Fail(NamedTuple):
    """The call cannot run any more."""

    task: Task
    reason: str


Effect: TypeAlias = Launch | Send | Recall | Stop | Kill | LookUp | Fail


class ReadyQueue:
    """Calls of one demand that wait for resources: highest priority first, then as submitted."""

    def __init__(self) -> None:
        self._by_priority: dict[int, deque[Task]] = {}
        self._priorities: list[int] = []  # a heap of negated priorities with a queue that may hold calls

    def push(self, task: Task) -> None:
        """Append a call."""
        self._queue(task.resources.priority).append(task)

    def push_back(self, task: Task) -> None:
        """Put a call that was taken back in front."""
        self._queue(task.resources.priority).appendleft(task)

    def _queue(self, priority: int) -> deque[Task]:
        queue = self._by_priority.get(priority)
        if queue is None:
            queue = self._by_priority[priority] = deque()
            heapq.heappush(self._priorities, -priority)
        return queue

    def peek(self) -> Task | None:
        """The call that is next, or None. Calls that were cancelled meanwhile are dropped on the way."""
        while self._priorities:
            queue = self._by_priority[-self._priorities[0]]
            while queue:
                if queue[0].state is READY:
                    return queue[0]
                queue.popleft()
            if len(self._priorities) == 1:
                return None  # the queue stays for the next call, most often of the same priority
            del self._by_priority[-heapq.heappop(self._priorities)]
        return None

    def pop(self) -> Task:
        """Remove and return the call that `peek` showed."""
        return self._by_priority[-self._priorities[0]].popleft()

    def __iter__(self) -> Iterator[Task]:
        for queue in self._by_priority.values():
            yield from (task for task in queue if task.state is READY)


class DemandQueue(ReadyQueue):
    """Calls of one demand, and what a node has to have free so that it is worth a look at them."""

    def __init__(self, demand: Demand) -> None:
        super().__init__()
        self.cores, self.gpus = demand.shares()[-1]  # the smallest share
        self.exclusive = demand.exclusive


class Scheduler:
    """The life of calls, whatever runs them. Subclasses decide in `_fill` which call goes where."""

    def __init__(self) -> None:
        self._effects: list[Effect] = []
        self._to_look_up: list[Task] = []
        self._worker_number = 0
        self.workers: dict[int, Worker] = {}
        self.unfinished = 0  # calls submitted and not over
        self.not_started = 0  # of these, waiting or ready

    @property
    def launching(self) -> int:
        """Calls whose own worker is not known to have started."""
        return 0

    # -- events -----------------------------------------------------------------------------------------------

    def on_submit(self, task: Task) -> None:
        """A new call. It waits for ``task.missing`` inputs first."""
        self.unfinished += 1
        self.not_started += 1
        if not task.missing:
            self._inputs_complete(task)

    def on_input(self, task: Task) -> None:
        """One of the call's inputs has its result."""
        task.missing -= 1
        if not task.missing and task.state is WAITING:
            self._inputs_complete(task)

    def on_missed(self, task: Task) -> None:
        """The cache does not know the call."""
        if task.state is WAITING:
            self._make_ready(task)

    def on_found(self, task: Task) -> None:
        """The cache had the call's result."""
        self._end(task, DONE)

    def on_failed(self, task: Task) -> None:
        """The call cannot run: an input failed, or it cannot be sent."""
        self._end(task, FAILED)

    def on_cancel(self, task: Task) -> None:
        """The call's future was cancelled before it was handed to a worker."""
        if not task.over:
            self._end(task, CANCELLED)

    def on_started(self, worker: Worker, lookahead: bool = False) -> None:
        """A worker takes calls from now on."""
        raise NotImplementedError

    def on_result(
        self, worker: Worker, task: Task, seconds: float, failed: bool = False, leaving: bool = False
    ) -> None:
        """A worker is through with a call.

        Args:
            worker: The worker.
            task: The call.
            seconds: Time in it.
            failed: Whether it raised.
            leaving: Whether the worker's process has nothing left to do but to exit.
        """
        raise NotImplementedError

    def on_unsent(self, worker: Worker, task: Task, state: State) -> None:
        """A call that `Send` named did not go out: it was cancelled just before, or cannot be pickled."""
        raise NotImplementedError

    def on_exit(self, worker: Worker, recalled: list[Task]) -> list[Task]:
        """A worker is gone; of its calls it had not started ``recalled``, which run elsewhere instead.

        Returns:
            The calls that were lost with it; they count as failed.
        """
        raise NotImplementedError

    def on_node_lost(self, node: Node) -> list[Worker]:
        """A node is gone for good: nothing more is placed there.

        Returns:
            The workers that hold a part of it. Their end has to be told by `on_exit`, as that of any other.
        """
        raise NotImplementedError

    # -- what to do -------------------------------------------------------------------------------------------

    def take_effects(self) -> list[Effect]:
        """Decide what can be decided now and return it, in the order in which to carry it out."""
        if self._to_look_up:
            # Not before now: the call may have been cancelled since.
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


# A call that does not fit may be overtaken by later ones this many times for each core of the largest node; then
# nodes are kept for it. Each core can so be filled again about four times before a large call gets its turn.
OVERTAKEN_PER_CORE = 4


class FreshScheduler(Scheduler):
    """Every call gets a worker of its own as soon as its demand is free.

    The queues of demands that do not fit are shut, and opened again when a node has enough free for a share of theirs:
    an event costs no look at calls that it cannot help.

    Args:
        ledger: What there is.
        max_calls: Calls at once; None for as many as the ledger holds.
        restart_limit: How often a call is run again when a node is lost that it ran on.
    """

    def __init__(self, ledger: Ledger, max_calls: int | None = None, restart_limit: int = 0) -> None:
        super().__init__()
        self.ledger = ledger
        self.max_calls = max_calls
        self.restart_limit = restart_limit
        self._restarts: dict[Task, int] = {}  # of calls that run again or are about to
        self._queues: dict[Demand, DemandQueue] = {}
        self._open: dict[DemandQueue, None] = {}  # whose next call may fit
        self._shut: dict[DemandQueue, None] = {}  # whose next call does not
        self._reopened = False
        self._launching: dict[Task, Worker] = {}
        self._started: dict[Worker, None] = {}  # that were not told yet what to do
        self._blocked: Task | None = None  # the first in turn that does not fit; None: not known
        self._overtaken = 0  # by how many calls since it is the first
        self._reserved: Reservation | None = None  # for it
        self._lost: list[str] = []  # names of nodes
        self._overtaken_limit = OVERTAKEN_PER_CORE * max(node.total_cores for node in ledger.nodes)

    @property
    def launching(self) -> int:
        """See `Scheduler.launching`."""
        return len(self._launching)

    def on_started(self, worker: Worker, lookahead: bool = False) -> None:
        """The worker's call is handed over."""
        worker.ready = True
        self._launching.pop(worker.calls[0], None)
        self._started[worker] = None

    def on_unsent(self, worker: Worker, task: Task, state: State) -> None:
        """The call did not go out; its worker has nothing else to do."""
        self._end(task, state)
        self._effects.append(Kill(worker))

    def on_result(
        self, worker: Worker, task: Task, seconds: float, failed: bool = False, leaving: bool = False
    ) -> None:
        """The call is over. Its cores are free when its process is about to exit, GPUs when it has exited."""
        self._end(task, FAILED if failed else DONE)
        if leaving and not worker.allocation.gpus:
            self._free(worker)

    def on_cancel(self, task: Task) -> None:
        """The call's future was cancelled before it was handed to a worker."""
        if task is self._blocked:
            self._unblock()
        self._stop_launch(task)
        super().on_cancel(task)

    def on_failed(self, task: Task) -> None:
        """The call cannot run: an input failed, or it cannot be sent."""
        self._stop_launch(task)
        super().on_failed(task)

    def _stop_launch(self, task: Task) -> None:
        worker = self._launching.pop(task, None)
        if worker is not None:
            # What starts slowly, such as a job that waits in a queue, need not start at all.
            self._effects.append(Kill(worker))

    def on_exit(self, worker: Worker, recalled: list[Task]) -> list[Task]:
        """The worker's resources are free; a call that it still had is lost, or runs again if its node was lost."""
        self._started.pop(worker, None)
        if worker.number not in self.workers:
            return []
        self._free(worker)
        (task,) = worker.calls
        self._launching.pop(task, None)
        if task.over:
            return []
        if any(share.node.lost for share in worker.allocation.shares) and self._may_run_again(task):
            task.move(READY)
            self.not_started += 1
            if self._blocked is not None and self._blocked.demand == task.demand:
                self._unblock()  # it is not the first of its queue any more, and nodes must not be kept behind that
            self._enqueue(task, first=True)
            return []
        self._end(task, FAILED)
        return [task]

    def _may_run_again(self, task: Task) -> bool:
        """Whether a call whose node is lost is to run elsewhere, which is counted if it may have begun."""
        if not self.ledger.could_hold(task.demand):
            return False
        if task.state is RUNNING:
            count = self._restarts.get(task, 0) + 1
            if count > self.restart_limit:
                return False
            self._restarts[task] = count
        return True

    def _end(self, task: Task, state: State) -> None:
        super()._end(task, state)
        if self._restarts:
            self._restarts.pop(task, None)

    def on_node_lost(self, node: Node) -> list[Worker]:
        """See `Scheduler.on_node_lost`; calls that need more than what is left now fail."""
        if node.kept_for is not None:
            self._unblock()
        self.ledger.remove(node)
        self._lost.append(node.name)
        for demand in [demand for demand in self._queues if not self.ledger.could_hold(demand)]:
            queue = self._queues.pop(demand)
            for task in queue:
                self._fail_homeless(task)
            self._open.pop(queue, None)
            self._shut.pop(queue, None)
        return self._workers_on(node)

    def _fail_homeless(self, task: Task) -> None:
        demand = task.demand
        self._end(task, FAILED)
        where = f"{demand.nodes} nodes" if demand.nodes > 1 else "one node"
        whole = ", which nobody else uses" if demand.exclusive else ""
        self._effects.append(
            Fail(
                task,
                f"it needs {demand.cores} cores and {demand.gpus} GPUs on {where}{whole}, which the "
                f"{len(self.ledger.nodes)} nodes that are left do not have since {', '.join(self._lost[-8:])} failed",
            )
        )

    def _free(self, worker: Worker) -> None:
        del self.workers[worker.number]
        allocation = worker.allocation
        self.ledger.release(allocation)
        if self._shut:
            self._reopen_for(allocation.node)
            for share in allocation.further:
                self._reopen_for(share.node)

    def _reopen_for(self, node: Node) -> None:
        """Look again at the demands that may fit now that something on the node was given back."""
        if node.lost:
            return
        gpus, cores = node.available()
        for queue in list(self._shut):
            if queue.cores <= cores and queue.gpus <= gpus and (not queue.exclusive or node.idle):
                self._reopen(queue)
        if node.kept_for is not None and node.keeps_all:
            queue = self._queues[node.kept_for.demand]
            if queue in self._shut:
                self._reopen(queue)

    def _reopen(self, queue: DemandQueue) -> None:
        del self._shut[queue]
        self._open[queue] = None

    def _enqueue(self, task: Task, first: bool = False) -> None:
        demand = task.demand
        queue = self._queues.get(demand)
        if queue is None:
            if self._lost and not self.ledger.could_hold(demand):
                self._fail_homeless(task)
                return
            queue = self._queues[demand] = DemandQueue(demand)
        if first:
            queue.push_back(task)
        else:
            queue.push(task)
        if queue not in self._shut:
            self._open[queue] = None
        elif self._blocked is not None and _turn(task) < _turn(self._blocked):
            self._reopen(queue)

    def _fill(self) -> None:
        if self._started:
            self._tell_started()
        if not self._open:
            return
        heads = self._heads()
        while heads and (self.max_calls is None or len(self.workers) < self.max_calls):
            _, _, task, queue = heads[0]
            allocation = self._allocate(task)
            if allocation is None:
                heapq.heappop(heads)
                del self._open[queue]
                self._shut[queue] = None
            else:
                queue.pop()
                self._start(task, allocation)
                following = queue.peek()
                if following is None:
                    heapq.heappop(heads)
                    del self._open[queue]
                else:
                    heapq.heapreplace(heads, (-following.resources.priority, following.number, following, queue))
            if self._reopened:
                heads = self._heads()

    def _heads(self) -> list[tuple[int, int, Task, DemandQueue]]:
        """The next call of every open queue, as a heap in the order of their turn."""
        self._reopened = False
        heads = []
        for queue in list(self._open):
            task = queue.peek()
            if task is None:
                del self._open[queue]
            else:
                heads.append((-task.resources.priority, task.number, task, queue))
        heapq.heapify(heads)
        return heads

    def _tell_started(self) -> None:
        for worker in self._started:
            (task,) = worker.calls
            if task.over:  # cancelled while the worker was started
                self._effects.append(Kill(worker))
            else:
                task.move(RUNNING)
                self._effects.append(Send(worker, [task]))
        self._started.clear()

    def _allocate(self, task: Task) -> Allocation | None:
        blocked = self._blocked
        if task is blocked:
            if self._reserved is None:
                return self.ledger.allocate(task.demand)
            allocation = self.ledger.allocate_reserved(self._reserved)
            if allocation is not None:
                self._reserved = None
                self._reopen_all()
            return allocation
        allocation = self.ledger.allocate(task.demand)
        if allocation is None and blocked is not None and _turn(task) < _turn(blocked):
            # From now on this one is the first, and what is kept for the other may be what it needs.
            was_reserved = self._reserved is not None
            self._unblock()
            if was_reserved:
                allocation = self.ledger.allocate(task.demand)
        return allocation

    def _start(self, task: Task, allocation: Allocation) -> None:
        self.not_started -= 1
        task.move(LAUNCHING)
        worker = self._new_worker(0, allocation)
        worker.calls.append(task)
        self._launching[task] = worker
        self._effects.append(Launch(worker, task))
        if task is self._blocked:
            self._blocked = None
        elif self._shut:
            self._note_overtaken(task)

    def _note_overtaken(self, task: Task) -> None:
        """Keep nodes for the first call in turn that does not fit, once it was overtaken enough."""
        if self._blocked is None:
            self._blocked = self._first_shut()
            self._overtaken = 0
        if self._blocked is None or _turn(task) < _turn(self._blocked):
            return
        self._overtaken += 1
        if self._reserved is None and self._overtaken >= self._overtaken_limit:
            self._reserved = self.ledger.reserve(self._blocked.demand)

    def _first_shut(self) -> Task | None:
        heads = [task for queue in self._shut if (task := queue.peek()) is not None]
        return min(heads, key=_turn, default=None)

    def _unblock(self) -> None:
        if self._reserved is not None:
            self.ledger.unreserve(self._reserved)
            self._reserved = None
            self._reopen_all()
        self._blocked = None

    def _reopen_all(self) -> None:
        self._open.update(self._shut)
        self._shut.clear()
        self._reopened = True

    def check_invariants(self) -> None:
        """Raise AssertionError where the state contradicts itself; for tests."""
        self.ledger.check_invariants()
        held = sum(
            len(share.cores)
            for worker in self.workers.values()
            for share in worker.allocation.shares
            if not share.node.lost
        )
        assert held + self.ledger.free()[0] == sum(node.total_cores for node in self.ledger.nodes)
        if self.max_calls is not None:
            assert len(self.workers) <= self.max_calls
        for worker in self.workers.values():
            assert len(worker.calls) == 1
        launching = {worker.calls[0]: worker for worker in self.workers.values() if not worker.ready}
        assert self._launching == {task: worker for task, worker in launching.items() if not task.over}
        for demand, queue in self._queues.items():
            assert all(task.demand == demand for task in queue)
            assert (queue in self._open) + (queue in self._shut) == 1 or queue.peek() is None
        assert self._reserved is None or (self._blocked is not None and self._blocked.state is READY)
        assert 0 <= self.not_started <= self.unfinished


def _turn(task: Task) -> tuple[int, int]:
    """Whose turn it is: the smaller goes first."""
    return -task.resources.priority, task.number


# Calls that a worker holds beyond the one it runs. Their expected time together stays below LOOKAHEAD_SECONDS, so
# that a worker is never idle while the next call travels, yet little is tied to a worker; MAX_LOOKAHEAD bounds what
# has to be taken back when a call turns out long.
LOOKAHEAD_SECONDS = 0.005
MAX_LOOKAHEAD = 128
# Weight of the newest call in the moving average of call times.
_NEWEST = 0.2


class BlockScheduler(Scheduler):
    """A set of workers that take call after call.

    Args:
        size: Number of workers.
        restart_limit: How often each worker is replaced when it dies.
        ledger: Where the workers' resources come from.
        demand: Resources of each worker.
        lookahead: Whether workers may be handed calls before they are through with the one they run.
    """

    def __init__(
        self,
        size: int,
        restart_limit: int,
        ledger: Ledger,
        demand: Demand,
        lookahead: bool = True,
    ) -> None:
        super().__init__()
        self.size = size
        self.restart_limit = restart_limit
        self.ledger = ledger
        self.demand = demand
        self._may_look_ahead = lookahead
        self._queue = ReadyQueue()
        self._ready_calls = 0
        self._slots: list[Worker | None] = [None] * size  # who holds each executorlib_worker_id
        self._restarts = [0] * size
        self._average: float | None = None
        self._hungry: dict[Worker, None] = {}  # workers that may be handed calls, in the order of their last result
        self._may_recall = True
        self._incomplete = True  # some slot may lack its worker
        self._lost: list[str] = []  # names of nodes
        self._broken = ""

    def on_started(self, worker: Worker, lookahead: bool = False) -> None:
        """The worker takes calls."""
        worker.ready = True
        worker.lookahead = lookahead and self._may_look_ahead
        self._set_hungry(worker)

    def on_result(
        self, worker: Worker, task: Task, seconds: float, failed: bool = False, leaving: bool = False
    ) -> None:
        """The call is over, the worker takes another."""
        self._end(task, FAILED if failed else DONE)
        worker.calls.remove(task)
        known = self._average
        self._average = seconds if known is None else known + _NEWEST * (seconds - known)
        self._set_hungry(worker)

    def on_unsent(self, worker: Worker, task: Task, state: State) -> None:
        """The call did not go out; the worker takes another."""
        self._end(task, state)
        worker.calls.remove(task)
        self._set_hungry(worker)

    def on_recalled(self, worker: Worker, tasks: list[Task]) -> None:
        """A worker gave these calls back before it started them; they go to another."""
        for task in tasks:
            worker.calls.remove(task)
        self._requeue(tasks)

    def on_exit(self, worker: Worker, recalled: list[Task]) -> list[Task]:
        """Replace the worker while its restarts last; only the call that it ran is lost."""
        del self.workers[worker.number]
        self._hungry.pop(worker, None)
        self.ledger.release(worker.allocation)
        self._requeue([task for task in recalled if task.state is RUNNING])
        lost = [task for task in worker.calls if task.state is RUNNING]
        for task in lost:
            self._end(task, FAILED)
        worker.calls.clear()
        self._slots[worker.slot] = None
        self._restarts[worker.slot] += not worker.stopping
        self._incomplete = True
        return lost

    def on_node_lost(self, node: Node) -> list[Worker]:
        """See `Scheduler.on_node_lost`."""
        self.ledger.remove(node)
        self._lost.append(node.name)
        return self._workers_on(node)

    def on_planned_exit(self, worker: Worker) -> None:
        """The worker's next exit is our doing: it does not count as a restart."""
        worker.stopping = True
        worker.ready = False
        self._hungry.pop(worker, None)

    def on_resize(self, size: int) -> None:
        """Grow or shrink the block, whose workers may be restarted anew. Surplus ones end once their calls are over."""
        self._restarts = [0] * len(self._slots)
        missing = size * self.demand.cores - sum(node.total_cores for node in self.ledger.nodes)
        if missing > 0 and not self._lost:  # only where calls are counted, not cores
            (node, *_) = self.ledger.nodes
            self.ledger.grow(node, range(node.total_cores, node.total_cores + missing))
        for _ in range(len(self._slots), size):
            self._slots.append(None)
            self._restarts.append(0)
        for slot, worker in enumerate(self._slots):
            if worker is not None:
                worker.retiring = slot >= size
                self._set_hungry(worker)
                if worker.retiring and not worker.ready and not worker.stopping:
                    # What has not started need not start; a job could wait in its queue for hours.
                    self.on_planned_exit(worker)
                    self._effects.append(Kill(worker))
        self.size = size
        self._incomplete = True

    def on_break(self, reason: str) -> None:
        """No worker can be started any more: fail all calls, now and later, with this reason."""
        self._broken = reason

    # -- decisions --------------------------------------------------------------------------------------------

    def _enqueue(self, task: Task) -> None:
        self._queue.push(task)

    def _requeue(self, tasks: list[Task]) -> None:
        for task in reversed(tasks):
            task.move(READY)
            self.not_started += 1
            self._queue.push_back(task)

    def _fill(self) -> None:
        if self._incomplete and not self._broken:
            self._launch_missing()
        if self._hungry:
            self._feed()
        if self._broken or not self.workers:
            self._fail_all()

    def _set_hungry(self, worker: Worker) -> None:
        if worker.ready:
            self._hungry[worker] = None
            self._may_recall = True

    def _launch_missing(self) -> None:
        for slot in range(self.size):
            if self._slots[slot] is None and self._restarts[slot] <= self.restart_limit:
                allocation = self.ledger.allocate(self.demand)
                if allocation is None:  # held by a retiring worker
                    return
                worker = self._new_worker(slot, allocation)
                self._slots[slot] = worker
                self._effects.append(Launch(worker, None))
        self._incomplete = False

    def _feed(self) -> None:
        batches: dict[Worker, list[Task]] = {}
        # Who worked last goes first: its caches are warm.
        for worker in reversed(list(self._hungry)):
            if worker.retiring and not worker.calls:
                self.on_planned_exit(worker)
                self._effects.append(Stop(worker))
            elif not worker.calls and not worker.retiring:
                self._hand(worker, 1, batches)
        depth = self._depth()
        if depth > 1 and self._queue.peek() is not None:
            share = -(-(self.not_started + self._in_flight()) // max(1, len(self.workers)))
            for worker in list(self._hungry):
                # Refilled at half, so that calls travel several at a time.
                target = min(depth, share)
                if worker.lookahead and not worker.retiring and 2 * len(worker.calls) <= target:
                    self._hand(worker, target - len(worker.calls), batches)
        for worker, tasks in batches.items():
            self._effects.append(Send(worker, tasks))
        idle = [worker for worker in self._hungry if not worker.calls and not worker.retiring]
        if idle and self._may_recall:
            # Once for each change: what a worker does not give back now it has started, and will answer.
            self._may_recall = False
            self._recall_for(len(idle))
        self._hungry = dict.fromkeys(idle)

    def _hand(self, worker: Worker, count: int, batches: dict[Worker, list[Task]]) -> None:
        for _ in range(0 if self._broken else count):
            task = self._queue.peek()
            if task is None:
                return
            self._queue.pop()
            self.not_started -= 1
            task.move(RUNNING)
            worker.calls.append(task)
            batches.setdefault(worker, []).append(task)

    def _depth(self) -> int:
        if self._average is None:
            return 1
        return 1 + min(MAX_LOOKAHEAD, int(LOOKAHEAD_SECONDS / max(self._average, 1e-6)))

    def _in_flight(self) -> int:
        return self.unfinished - self.not_started

    def _recall_for(self, idle: int) -> None:
        """Idle workers and nothing queued: take back half of what others have not started."""
        for worker in self.workers.values():
            if len(worker.calls) > 1 and idle > 0:
                count = len(worker.calls) // 2
                self._effects.append(Recall(worker, count))
                idle -= count

    def _fail_all(self) -> None:
        often = f", each more often than restart_limit={self.restart_limit}" if self.restart_limit else ""
        reason = self._broken or (
            f"all {self.size} workers of the block have died{often}"
            if self.ledger.could_hold(self.demand)
            else f"no node that could hold a worker of the block is left since {', '.join(self._lost[-8:])} failed"
        )
        while (task := self._queue.peek()) is not None:
            self._queue.pop()
            self._end(task, FAILED)
            self._effects.append(Fail(task, reason))

    def check_invariants(self) -> None:
        """Raise AssertionError where the state contradicts itself; for tests."""
        for worker in self.workers.values():
            assert all(task.state is RUNNING for task in worker.calls)
            assert worker.lookahead or len(worker.calls) <= 1
        assert self._in_flight() == sum(len(worker.calls) for worker in self.workers.values())
        for slot, holder in enumerate(self._slots):
            assert holder is None or holder.slot == slot
        assert 0 <= self.not_started <= self.unfinished
