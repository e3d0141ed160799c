"""The scheduler and its ledger on the largest machines, with simulated workers: no process, no I/O.

    python benchmarks/scale.py [--nodes N] [--calls N] [--seed N] [--failures N]

Calls of mixed needs take random times; nodes fail at random moments, and the calls that ran there are submitted again.
"""

from __future__ import annotations

import argparse
import gc
import heapq
import itertools
import random
import resource
import time
from concurrent.futures import Future
from typing import Any

from executorlib.core.fresh import FreshScheduler
from executorlib.core.ledger import Ledger, Node
from executorlib.core.scheduler import Launch, Send, Worker
from executorlib.core.task import Task
from executorlib.resources import Demand, Resources

CORES = 64
GPUS = 4  # on every fourth node
# The needs of a thousand calls, by number of calls. A call of several nodes is given as its resource_dict.
MIX: list[tuple[int, dict[str, Any]]] = [
    (520, {"cores": 1}),
    (230, {"cores": 2}),
    (200, {"threads_per_core": 4}),
    (30, {"gpus_per_core": 1}),
    (15, {"cores": 16, "num_nodes": 2}),
    (3, {"cores": 64}),
    (1, {"exclusive": True}),
    (1, {"cores": 256}),
]
SHORTEST, LONGEST = 0.1, 2.0  # simulated times, evenly distributed


class Simulation:
    """Runs calls to their end, from event to event."""

    def __init__(self, nodes: int, calls: int, failures: int, seed: int) -> None:
        self.chance = random.Random(seed)
        self.nodes = [
            Node(f"node{number}", range(CORES), map(str, range(0 if number % 4 else GPUS))) for number in range(nodes)
        ]
        self.cores = nodes * CORES
        self.ledger = Ledger(self.nodes)
        self.scheduler = FreshScheduler(self.ledger)
        self.numbers = itertools.count(1)
        self.order = itertools.count()
        self.events: list[tuple[float, int, Worker | Node]] = []
        self.now = 0.0
        self.in_use = 0
        self.work = 0.0  # core time of calls that were finished
        self.lost = 0
        self.decisions = 0
        self.future: Future[Any] = Future()
        needs = []
        for share, changes in MIX:
            resources = Resources().updated(changes, "the mix")
            demand = self.ledger.spread(resources)
            assert demand is not None
            needs += [(resources, demand)] * share
        self.tasks = [self.task(*self.chance.choice(needs)) for _ in range(calls)]
        for node in self.chance.sample(self.nodes, failures):
            self.later(self.chance.uniform(0, 2), node)

    def task(self, resources: Resources, demand: Demand) -> Task:
        return Task(next(self.numbers), abs, (), {}, self.future, resources, demand)

    def later(self, seconds: float, what: Worker | Node) -> None:
        heapq.heappush(self.events, (self.now + seconds, next(self.order), what))

    def run(self) -> dict[str, float]:
        before = _resident_mib()
        start = time.process_time()
        for task in self.tasks:
            self.scheduler.on_submit(task)
        self.tasks.clear()
        self.turn()
        used = there = saturated = 0.0
        while self.events:
            moment, _, what = heapq.heappop(self.events)
            if self.scheduler.not_started:
                used += self.in_use * (moment - self.now)
                there += self.cores * (moment - self.now)
                saturated = moment
            self.now = moment
            if isinstance(what, Node):
                self.fail(what)
            elif what.number in self.scheduler.workers:
                self.scheduler.on_result(what, what.calls[0], 0.0)
                self.exit(what)
            self.turn()
        seconds = time.process_time() - start
        assert self.scheduler.unfinished == 0
        assert self.ledger.free()[0] == self.cores
        return {
            "decisions": self.decisions,
            "decisions_per_s": self.decisions / seconds,
            "peak_mib": _resident_mib() - before,
            "lost": self.lost,
            "used_while_calls_wait": used / there,
            "until_queue_empty": saturated,
            "until_end": self.now,
        }

    def turn(self) -> None:
        while effects := self.scheduler.take_effects():
            for effect in effects:
                if isinstance(effect, Launch):
                    self.decisions += 1
                    self.in_use += self.held(effect.worker)
                    self.scheduler.on_started(effect.worker)
                else:
                    assert isinstance(effect, Send)
                    self.later(self.chance.uniform(SHORTEST, LONGEST), effect.worker)

    def held(self, worker: Worker) -> int:
        allocation = worker.allocation
        return len(allocation.cores) + sum(len(share.cores) for share in allocation.further)

    def exit(self, worker: Worker) -> None:
        self.in_use -= self.held(worker)
        self.scheduler.on_exit(worker, [])

    def fail(self, node: Node) -> None:
        there = self.scheduler.on_node_lost(node)
        self.cores -= CORES
        for worker in there:
            [task] = worker.calls
            self.exit(worker)
            self.lost += 1
            self.scheduler.on_submit(self.task(task.resources, task.demand))


def _resident_mib() -> float:
    """The most memory that the process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=10_000)
    parser.add_argument("--calls", type=int, default=1_000_000)
    parser.add_argument("--failures", type=int, default=100, help="nodes that fail")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    simulation = Simulation(options.nodes, options.calls, options.failures, options.seed)
    gc.collect()
    gc.freeze()
    for name, value in simulation.run().items():
        print(f"{name:24}{value:>14,.3f}")


if __name__ == "__main__":
    main()
