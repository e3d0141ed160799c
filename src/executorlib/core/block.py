"""The scheduler for workers that take call after call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from executorlib.core.ledger import Ledger, Node
from executorlib.core.scheduler import Fail, Kill, Launch, ReadyQueue, Recall, Scheduler, Send, Stop
from executorlib.core.task import DONE, FAILED, READY, RUNNING, State, Task
from executorlib.resources import Demand

if TYPE_CHECKING:
    from executorlib.core.scheduler import Worker

# A worker may hold calls beyond the one it runs. Together they are expected to take less than LOOKAHEAD_SECONDS:
# enough that a worker is never idle while the next call travels, yet little is tied to one worker. MAX_LOOKAHEAD
# bounds what has to be taken back when a call turns out to be long.
LOOKAHEAD_SECONDS = 0.005
MAX_LOOKAHEAD = 128
# The weight of the newest call in the moving average of call times.
_NEWEST = 0.2


class BlockScheduler(Scheduler):
    """Schedules calls on a fixed set of workers, each of which takes call after call.

    Args:
        size: Number of workers.
        restart_limit: How often each worker is replaced when it dies.
        ledger: Where the workers' resources come from.
        demand: Resources of each worker.
        lookahead: Whether workers may be handed calls before they have finished the one they run.
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
        self._slots: list[Worker | None] = [None] * size  # the holder of each executorlib_worker_id
        self._restarts = [0] * size
        self._average: float | None = None
        self._hungry: dict[Worker, None] = {}  # workers that may be handed calls, in the order of their last result
        self._may_recall = True
        self._incomplete = True  # some slot may have no worker
        self._lost: list[str] = []  # names of nodes
        self._broken = ""

    def on_started(self, worker: Worker, lookahead: bool = False) -> None:
        """The worker can take calls."""
        worker.ready = True
        worker.lookahead = lookahead and self._may_look_ahead
        self._set_hungry(worker)

    def on_result(
        self, worker: Worker, task: Task, seconds: float, failed: bool = False, leaving: bool = False
    ) -> None:
        """The call is over, so the worker can take another."""
        self._end(task, FAILED if failed else DONE)
        worker.calls.remove(task)
        known = self._average
        self._average = seconds if known is None else known + _NEWEST * (seconds - known)
        self._set_hungry(worker)

    def on_unsent(self, worker: Worker, task: Task, state: State) -> None:
        """The call was not sent, so the worker can take another."""
        self._end(task, state)
        worker.calls.remove(task)
        self._set_hungry(worker)

    def on_recalled(self, worker: Worker, tasks: list[Task]) -> None:
        """The worker gave these calls back without having started them; they go to other workers."""
        for task in tasks:
            worker.calls.remove(task)
        self._requeue(tasks)

    def on_exit(self, worker: Worker, recalled: list[Task]) -> list[Task]:
        """Replace the worker if it has restarts left. Only the call it was running is lost."""
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
        """The node is gone: no worker is started there any more."""
        self.ledger.remove(node)
        self._lost.append(node.name)
        return self._workers_on(node)

    def on_planned_exit(self, worker: Worker) -> None:
        """We are ending this worker ourselves, so its exit does not count as a restart."""
        worker.stopping = True
        worker.ready = False
        self._hungry.pop(worker, None)

    def on_resize(self, size: int) -> None:
        """Grow or shrink the block and reset the count of restarts. Surplus workers end once their calls are over."""
        self._restarts = [0] * len(self._slots)
        missing = size * self.demand.cores - sum(node.total_cores for node in self.ledger.nodes)
        if missing > 0 and not self._lost:  # only where the ledger counts calls and not cores
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
                    # It has not started and need not: a job could wait in its queue for hours.
                    self.on_planned_exit(worker)
                    self._effects.append(Kill(worker))
        self.size = size
        self._incomplete = True

    def on_break(self, reason: str) -> None:
        """No worker can be started any more: fail all calls, present and future, with this reason."""
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
                if allocation is None:  # a retiring worker still holds the resources
                    return
                worker = self._new_worker(slot, allocation)
                self._slots[slot] = worker
                self._effects.append(Launch(worker, None))
        self._incomplete = False

    def _feed(self) -> None:
        batches: dict[Worker, list[Task]] = {}
        # The worker that was busy last goes first: its caches are warm.
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
                # Refill a worker when it is half empty, so that several calls travel together.
                target = min(depth, share)
                if worker.lookahead and not worker.retiring and 2 * len(worker.calls) <= target:
                    self._hand(worker, target - len(worker.calls), batches)
        for worker, tasks in batches.items():
            self._effects.append(Send(worker, tasks))
        idle = [worker for worker in self._hungry if not worker.calls and not worker.retiring]
        if idle and self._may_recall:
            # Ask once after each change: calls that are not given back now have been started and will be answered.
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
        """Workers are idle and nothing is queued: take back half of the calls that other workers hold unstarted."""
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
            else f"no remaining node can hold a worker of the block (failed: {', '.join(self._lost[-8:])})"
        )
        while (task := self._queue.peek()) is not None:
            self._queue.pop()
            self._end(task, FAILED)
            self._effects.append(Fail(task, reason))

    def check_invariants(self) -> None:
        """Raise AssertionError if the state contradicts itself; for tests."""
        for worker in self.workers.values():
            assert all(task.state is RUNNING for task in worker.calls)
            assert worker.lookahead or len(worker.calls) <= 1
        assert self._in_flight() == sum(len(worker.calls) for worker in self.workers.values())
        for slot, holder in enumerate(self._slots):
            assert holder is None or holder.slot == slot
        assert 0 <= self.not_started <= self.unfinished
