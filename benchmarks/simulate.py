"""The scheduler alone: simulated workers, no process, no I/O.

Every event is followed by everything that the scheduler decides upon it, as if each came alone. A
decision counted here is a call that was placed; its cost is all that the scheduler does for the
call, from its submission until its worker is gone.
"""

from __future__ import annotations

import gc
import time
from collections import deque
from concurrent.futures import Future
from typing import Any

NODES = (1, 1_000)
CALLS = (1_000, 10_000, 100_000, 1_000_000)
CORES_PER_NODE = 64


def scheduler(largest: int) -> dict[str, float]:
    """Measure the microseconds a call for all ``NODES`` and ``CALLS``.

    Args:
        largest: Numbers of calls above this are left out.

    Returns:
        Costs, decisions a second with 100,000 calls, and how the cost grows with the calls.
    """
    figures: dict[str, float] = {}
    for nodes in NODES:
        costs = {count: _cost_us(nodes, count) for count in CALLS if count <= largest}
        figures |= {f"us_{nodes}_{count}": cost for count, cost in costs.items()}
        figures[f"decisions_per_s_{nodes}"] = 1e6 / costs[100_000]
        figures[f"growth_{nodes}"] = costs[max(costs)] / costs[min(costs)]
    return figures


def _cost_us(nodes: int, count: int) -> float:
    # Small numbers of calls several times, for the same precision.
    repetitions = max(1, 20_000 // count)
    return 1e6 * sum(_simulate(nodes, count) for _ in range(repetitions)) / (repetitions * count)


def _simulate(nodes: int, count: int) -> float:
    """Submit ``count`` calls of one core each, then end the oldest running one until none is left.

    Returns:
        Processor seconds, without those for making the calls.
    """
    from executorlib.core.fresh import FreshScheduler
    from executorlib.core.ledger import Ledger, Node
    from executorlib.core.scheduler import Launch, Send, Worker
    from executorlib.core.task import Task
    from executorlib.resources import Resources

    ledger = Ledger([Node(f"node{i}", range(CORES_PER_NODE)) for i in range(nodes)])
    tested = FreshScheduler(ledger, max_calls=None)
    future: Future[Any] = Future()
    resources = Resources()
    demand = resources.demand
    tasks = [Task(i, abs, (), {}, future, resources, demand) for i in range(count)]
    running: deque[Worker] = deque()

    def obey() -> None:
        while effects := tested.take_effects():
            for effect in effects:
                if isinstance(effect, Launch):
                    tested.on_started(effect.worker)
                elif isinstance(effect, Send):
                    running.append(effect.worker)

    gc.collect()
    start = time.process_time()
    for task in tasks:
        tested.on_submit(task)
        obey()
    while running:
        worker = running.popleft()
        tested.on_result(worker, worker.calls[0], 0.0)
        tested.on_exit(worker, [])
        obey()
    taken = time.process_time() - start
    assert tested.unfinished == 0
    return taken
