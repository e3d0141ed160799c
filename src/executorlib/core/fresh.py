"""The scheduler that starts a worker for every call."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

from executorlib.core.ledger import Allocation, Ledger, Node, Reservation
from executorlib.core.scheduler import Fail, Kill, Launch, ReadyQueue, Scheduler, Send
from executorlib.core.task import DONE, FAILED, LAUNCHING, READY, RUNNING, State, Task
from executorlib.resources import Demand

if TYPE_CHECKING:
    from executorlib.core.scheduler import Worker


class DemandQueue(ReadyQueue):
    """Calls with the same demand, and how much a node must have free for one of them to fit."""

    def __init__(self, demand: Demand) -> None:
        super().__init__()
        self.cores, self.gpus = demand.shares()[-1]  # the smallest share
        self.exclusive = demand.exclusive


# After this many later calls for each core of the largest node have overtaken a call that does not fit, nodes are
# kept for it. So each core can be filled about four more times before a large call gets its turn.
OVERTAKEN_PER_CORE = 4


class FreshScheduler(Scheduler):
    """Gives every call a worker of its own as soon as what it needs is free.

    The queue of a demand that does not fit is shut, and opened again when a node has enough free for one share of it.
    So no event makes the scheduler look at calls that it cannot help.

    Args:
        ledger: The resources.
        max_calls: Most calls at once; None for as many as the ledger holds.
        restart_limit: How often a call is run again when a node it runs on is lost.
    """

    def __init__(self, ledger: Ledger, max_calls: int | None = None, restart_limit: int = 0) -> None:
        super().__init__()
        self.ledger = ledger
        self.max_calls = max_calls
        self.restart_limit = restart_limit
        self._restarts: dict[Task, int] = {}  # of calls that are running again or about to
        self._queues: dict[Demand, DemandQueue] = {}
        self._open: dict[DemandQueue, None] = {}  # queues whose next call may fit
        self._shut: dict[DemandQueue, None] = {}  # queues whose next call does not fit
        self._reopened = False
        self._launching: dict[Task, Worker] = {}
        self._started: dict[Worker, None] = {}  # workers that have not been handed their call yet
        self._blocked: Task | None = None  # the first in turn that does not fit; None: not known
        self._overtaken = 0  # how many calls have overtaken it
        self._reserved: Reservation | None = None  # for the blocked call
        self._lost: list[str] = []  # names of nodes
        self._overtaken_limit = OVERTAKEN_PER_CORE * max(node.total_cores for node in ledger.nodes)

    @property
    def launching(self) -> int:
        """Number of calls whose worker is being started."""
        return len(self._launching)

    def on_connected(self, worker: Worker) -> None:
        """The worker can be handed its call at once, together with its set-up."""
        self.on_started(worker)

    def on_started(self, worker: Worker, lookahead: bool = False) -> None:
        """The worker is ready, so its call is handed over."""
        worker.ready = True
        self._launching.pop(worker.calls[0], None)
        self._started[worker] = None

    def on_unsent(self, worker: Worker, task: Task, state: State) -> None:
        """The call was not sent, and its worker has nothing else to do."""
        self._end(task, state)
        self._effects.append(Kill(worker))

    def on_result(
        self, worker: Worker, task: Task, seconds: float, failed: bool = False, leaving: bool = False
    ) -> None:
        """The call is over. Its cores are free once its process is about to exit, its GPUs only when it has exited."""
        self._end(task, FAILED if failed else DONE)
        if leaving and not worker.allocation.gpus:
            self._free(worker)

    def on_cancel(self, task: Task) -> None:
        """The call's future was cancelled before the call was handed to a worker."""
        if task is self._blocked:
            self._unblock()
        self._stop_launch(task)
        super().on_cancel(task)

    def on_failed(self, task: Task) -> None:
        """The call cannot run: one of its inputs failed, or it cannot be sent."""
        self._stop_launch(task)
        super().on_failed(task)

    def _stop_launch(self, task: Task) -> None:
        worker = self._launching.pop(task, None)
        if worker is not None:
            # A worker that is slow to start, such as a job that waits in a queue, need not start at all.
            self._effects.append(Kill(worker))

    def on_exit(self, worker: Worker, recalled: list[Task]) -> list[Task]:
        """Free the worker's resources. Its call, if it still had one, is lost, or runs again if a node was lost."""
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
                self._unblock()  # it is no longer the first of its queue, so no nodes may be kept for it
            self._enqueue(task, first=True)
            return []
        self._end(task, FAILED)
        return [task]

    def _may_run_again(self, task: Task) -> bool:
        """Return whether a call whose node is lost may run elsewhere; counts the attempt if the call may have begun."""
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
        """The node is gone: calls that need more than what is left fail now."""
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
                f"it needs {demand.cores} cores and {demand.gpus} GPUs on {where}{whole}, which the remaining nodes "
                f"cannot provide (nodes left: {len(self.ledger.nodes)}; failed: {', '.join(self._lost[-8:])})",
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
        """Something on the node was given back: open the queues whose calls may now fit."""
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
        """The next call of every open queue, as a heap ordered by turn."""
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
            if task.over:  # cancelled while its worker started
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
            # This call is now first in turn, and what is kept for the other one may be what it needs.
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
        """Keep nodes for the first call that does not fit, once enough calls have overtaken it."""
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
        """Raise AssertionError if the state contradicts itself; for tests."""
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
    """Sort key of the order in which calls get their turn; the smallest goes first."""
    return -task.resources.priority, task.number
