"""One measurement of one system, in a process of its own; prints its figures as a line of JSON.

    python benchmarks/measure.py FIGURE SYSTEM [--seconds S]

The interpreter must be that of the system's environment (``run.py`` sees to it). The number of
calls follows the system's speed, so that a measurement takes about ``--seconds``.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NoReturn

import simulate
import workloads
from systems import SYSTEMS, WORKERS, Pool, System

Figures = dict[str, float]


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("figure", choices=sorted(FIGURES))
    parser.add_argument("system", choices=sorted(SYSTEMS))
    parser.add_argument("--seconds", type=float, default=1.0)
    arguments = parser.parse_args()
    figures = FIGURES[arguments.figure](SYSTEMS[arguments.system], arguments.seconds)
    _print(figures)


def throughput(system: System, seconds: float) -> Figures:
    """Calls that do nothing: submit all, wait for all."""
    with system.open() as pool:
        _run_plain(pool, 2 * WORKERS)
        return {"calls_per_s": _rate(lambda count: _run_plain(pool, count), seconds)}


def round_trip(system: System, seconds: float) -> Figures:
    """Submit one call, wait for its result, again: the median in microseconds."""
    with system.open() as pool:
        _warm_up(pool)
        return {"round_trip_us": _round_trip(pool, seconds)}


def chain(system: System, seconds: float) -> Figures:
    """Calls that take earlier calls' futures: one after the other, and layer on layer."""
    layer = 2000
    with system.open() as pool:
        _warm_up(pool)
        single = _round_trip(pool, seconds / 2)

        def links(count: int) -> None:
            future = pool.submit(workloads.identity, 0)
            for _ in range(count - 1):
                future = pool.submit(workloads.identity, future)
            pool.gather([future])

        link = 1e6 / _rate(links, seconds / 2)

        def plain() -> None:
            pool.gather([pool.submit(workloads.identity, i) for i in range(2 * layer)])

        def layered() -> None:
            first = [pool.submit(workloads.identity, i) for i in range(layer)]
            second = [pool.submit(workloads.identity, future) for future in first]
            assert pool.gather(second) == list(range(layer))

        # In turn, so that both see the same state of the machine.
        times: dict[Callable[[], None], list[float]] = {plain: [], layered: []}
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            for run, taken in times.items():
                taken.append(_time(run))
        plain_s, layered_s = (statistics.median(taken) for taken in times.values())
    return {
        "round_trip_us": single,
        "link_us": link,
        "link_per_round_trip": link / single,
        "plain_calls_per_s": 2 * layer / plain_s,
        "layered_calls_per_s": 2 * layer / layered_s,
        "layered_per_plain": plain_s / layered_s,
    }


def array(system: System, seconds: float) -> Figures:
    """A 10 MB array to a worker and back, two calls a worker in flight: MB/s, both ways added."""
    import numpy

    data = numpy.random.default_rng(0).random(10_000_000 // 8)
    megabytes = 2 * data.nbytes / 1e6

    with system.open() as pool:

        def run(count: int) -> None:
            pending: deque[Any] = deque()
            for _ in range(count):
                if len(pending) == 2 * WORKERS:
                    receive(pending.popleft())
                pending.append(pool.submit(workloads.identity, data))
            while pending:
                receive(pending.popleft())

        def receive(future: Any) -> None:
            (result,) = pool.gather([future])
            assert result.shape == data.shape
            assert result[-1] == data[-1]

        _warm_up(pool)
        return {"megabytes_per_s": megabytes * _rate(run, seconds)}


def queued(system: System, seconds: float) -> NoReturn:
    """100,000 calls waiting behind busy workers: memory, threads and the slowest submit.

    Workers are busy until the caller kills the process group. (executorlib 1.x hangs in shutdown
    when queued calls were cancelled, so not every system can end in an orderly way.)
    """
    import psutil

    count = 100_000
    this = psutil.Process()
    pauses = _CollectorPauses()
    with system.open() as pool:
        _warm_up(pool)
        for _ in range(WORKERS):
            pool.submit(workloads.wait_for_file, "no-such-file")
        # Some more, so that everything made lazily exists before memory is counted.
        futures = [pool.submit(workloads.nothing) for _ in range(100)]
        taken: list[float] = []
        gc.collect()
        rss = this.memory_info().rss
        for i in range(count):
            paused = pauses.seconds
            start = time.perf_counter()
            futures.append(pool.submit(workloads.identity, i))
            taken.append(time.perf_counter() - start - (pauses.seconds - paused))
        grown = this.memory_info().rss - rss
        _print(
            {
                "bytes_per_call": grown / count,
                "threads": threading.active_count() - 1,
                "longest_submit_ms": 1e3 * max(taken),
                "submits_per_s": count / sum(taken),
            }
        )
        os._exit(0)


def idle(system: System, seconds: float) -> Figures:
    """Processor time of the whole process tree of an executor that waits, in percent of a core."""
    import psutil

    seconds = 10 * seconds
    with system.open() as pool:
        _warm_up(pool)
        time.sleep(1.0)
        tree = [psutil.Process(), *psutil.Process().children(recursive=True)]
        before = _cpu_seconds(tree)
        start = time.perf_counter()
        time.sleep(seconds)
        used = _cpu_seconds(tree) - before
        wall = time.perf_counter() - start
    return {"percent_of_core": 100 * used / wall, "processes": len(tree)}


def first_result(system: System, seconds: float) -> Figures:
    """From construction to the first result, in milliseconds; the import is not counted."""
    if system.environment in ("ours", "executorlib1x"):
        from executorlib import SingleNodeExecutor  # noqa: F401

    start = time.perf_counter()
    with system.open() as pool:
        pool.gather([pool.submit(workloads.nothing)])
        taken = time.perf_counter() - start
    return {"first_result_ms": 1e3 * taken}


def import_time(system: System, seconds: float) -> Figures:
    """Time that ``import executorlib`` adds to the start of Python, and the heavy modules that it loads."""

    def start(code: str) -> None:
        subprocess.run([sys.executable, "-c", code], check=True)

    codes = {
        "bare": "pass",
        "import": "import executorlib",
        "class": "from executorlib import SingleNodeExecutor",
    }
    times: dict[str, list[float]] = {name: [] for name in codes}
    for _ in range(max(3, int(10 * seconds))):
        for name, code in codes.items():
            times[name].append(_time(lambda: start(code)))  # noqa: B023 (called at once)
    bare, package, single = (1e3 * statistics.median(taken) for taken in times.values())
    heavy = "import sys, executorlib; print(len({'zmq', 'numpy', 'h5py'} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", heavy], check=True, capture_output=True)
    return {
        "import_ms": package - bare,
        "import_class_ms": single - bare,
        "heavy_modules": int(loaded.stdout),
    }


def scheduler(system: System, seconds: float) -> Figures:
    """The scheduler alone; short measurements leave out the million calls."""
    return simulate.scheduler(largest=1_000_000 if seconds >= 1 else 100_000)


FIGURES: dict[str, Callable[[System, float], Figures]] = {
    "default": throughput,
    "block": throughput,
    "round-trip": round_trip,
    "chain": chain,
    "array": array,
    "queued": queued,
    "idle": idle,
    "first-result": first_result,
    "import": import_time,
    "scheduler": scheduler,
}


class _CollectorPauses:
    """Seconds spent in Python's garbage collector since this was made."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._started = 0.0
        gc.callbacks.append(self._on_collection)

    def _on_collection(self, phase: str, _: dict[str, int]) -> None:
        if phase == "start":
            self._started = time.perf_counter()
        else:
            self.seconds += time.perf_counter() - self._started


def _print(figures: Figures) -> None:
    print("\n" + json.dumps(figures), flush=True)


def _run_plain(pool: Pool, count: int) -> None:
    pool.gather([pool.submit(workloads.nothing) for _ in range(count)])


def _warm_up(pool: Pool) -> None:
    for _ in range(3):
        _run_plain(pool, 2 * WORKERS)


def _time(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _rate(run: Callable[[int], None], seconds: float) -> float:
    """Grow the count until a run takes at least half of ``seconds``; give its count a second."""
    count = 2 * WORKERS
    while True:
        taken = _time(lambda: run(count))  # noqa: B023 (called at once)
        if taken >= seconds / 2:
            return count / taken
        # At most eightfold: the first runs pay for starting workers.
        count = int(count * min(8.0, max(1.5, seconds / taken)))


def _round_trip(pool: Pool, seconds: float) -> float:
    taken: list[float] = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(taken) < 5:
        taken.append(_time(lambda: _run_plain(pool, 1)))
    return 1e6 * statistics.median(taken)


def _cpu_seconds(processes: list[Any]) -> float:
    """User and system time, also of children that have ended."""
    return sum(sum(process.cpu_times()[:4]) for process in processes)


if __name__ == "__main__":
    main()
