"""Measure calls as Flux jobs: ``make bench-flux``, or this program in a Flux instance (``flux start``).

Beside this package: a bare `flux.job.FluxExecutor`, and executorlib 1.x in an environment of its own under ``.venvs/``
(made at the first run, this needs PyPI, and the version of Python that Flux's bindings are for). Every session is a
process of its own, in another order in each round. Three rounds take about ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from environments import REQUIREMENTS, copy_source, python_of, versions_of
from table import Found, Rounds, Target, preamble, report

_BINDINGS = ["cffi", "ply", "pyyaml"]
REQUIREMENTS["flux-ours"] = ["cloudpickle", "pyzmq", *_BINDINGS]
REQUIREMENTS["flux-executorlib1x"] = ["executorlib>=1,<2", "pysqa>=1", "h5py", *_BINDINGS]

CALLS, AT_ONCE = 100, 2
BLOCK_CALLS, BLOCK_TURNS = 2_000, 5
LATER_CALLS = 5
SESSION_TIMEOUT = 300.0


def noop(number: int) -> int:
    """The call that is measured."""
    return number


def default_mode() -> Found:
    """A job for each call, two at a time: seconds for all, in a session that has just begun."""
    from executorlib import FluxJobExecutor

    with FluxJobExecutor(max_workers=AT_ONCE) as executor:
        start = time.perf_counter()
        futures = [executor.submit(noop, number) for number in range(CALLS)]
        assert [future.result() for future in futures] == list(range(CALLS))
        return {"seconds": time.perf_counter() - start}


def bare() -> Found:
    """The same number of jobs that run ``python -c pass``, two at a time, by Flux's own executor."""
    from concurrent.futures import FIRST_COMPLETED, wait

    from flux.job import FluxExecutor, JobspecV1

    spec = JobspecV1.from_command([sys.executable, "-c", "pass"], environment=dict(os.environ))
    with FluxExecutor() as executor:
        start = time.perf_counter()
        running: set[Any] = set()
        for _ in range(CALLS):
            if len(running) == AT_ONCE:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                assert all(future.result() == 0 for future in done)
            running.add(executor.submit(spec))
        assert all(future.result() == 0 for future in running)
        return {"seconds": time.perf_counter() - start}


def block_mode() -> Found:
    """Two workers that stay: calls a second, once they are there."""
    from executorlib import FluxJobExecutor

    rates = []
    with FluxJobExecutor(max_workers=AT_ONCE, block_allocation=True) as executor:
        for turn in range(-1, BLOCK_TURNS):
            start = time.perf_counter()
            futures = [executor.submit(noop, number) for number in range(BLOCK_CALLS)]
            assert [future.result() for future in futures] == list(range(BLOCK_CALLS))
            if turn >= 0:
                rates.append(BLOCK_CALLS / (time.perf_counter() - start))
    return {"rate": statistics.median(rates)}


def single_calls() -> Found:
    """Calls of the cluster executor one after another: seconds of the first one, and median of the later ones."""
    from executorlib import FluxClusterExecutor

    seconds = []
    with FluxClusterExecutor(cache_directory="cache", resource_dict={"cores": 1}) as executor:
        for number in range(1 + LATER_CALLS):
            start = time.perf_counter()
            assert executor.submit(noop, number).result() == number
            seconds.append(time.perf_counter() - start)
    return {"first": seconds[0], "later": statistics.median(seconds[1:])}


SESSIONS: dict[str, Callable[[], Found]] = {
    "default": default_mode,
    "bare": bare,
    "block": block_mode,
    "cluster": single_calls,
}
# The environment of each session. The bare executor shares ours.
STEPS = [
    ("default", "ours"),
    ("bare", "ours"),
    ("default", "executorlib1x"),
    ("block", "ours"),
    ("block", "executorlib1x"),
    ("cluster", "ours"),
    ("cluster", "executorlib1x"),
]
BARE, PEER = "`FluxExecutor`, `python -c pass`", "executorlib 1.x"
DEFAULT = f"{CALLS} no-op calls, {AT_ONCE} at a time"
TARGETS = [
    Target(DEFAULT, "default ours seconds", "s", "bare ours seconds", BARE, 1.5),
    Target(DEFAULT, "default ours seconds", "s", "default executorlib1x seconds", PEER, 0.5),
    Target("block mode, no-op calls/s", "block ours rate", "", "block executorlib1x rate", PEER, 5, at_least=True),
    Target("one call of the cluster executor", "cluster ours later", "s", "cluster executorlib1x later", PEER, 0.5),
    Target("the first of a session", "cluster ours first", "s", "cluster executorlib1x first", PEER, 0.5),
]


def session(name: str, system: str, source: Path, folder: Path) -> Found:
    """Run a session in its environment and a folder of its own, and give what it found."""
    folder.mkdir()
    paths = [os.environ.get("PYTHONPATH", ""), *([str(source)] if system == "ours" else [])]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONWARNINGS": "ignore"}
    command = [str(python_of(f"flux-{system}")), __file__, "--session", name]
    done = subprocess.run(
        command, cwd=folder, env=variables, stdout=subprocess.PIPE, text=True, check=True, timeout=SESSION_TIMEOUT
    )
    found: Found = json.loads(done.stdout.splitlines()[-1])
    print(f"  {name}, {system}: {json.dumps(found)}", flush=True)
    return found


def main() -> None:
    """Run a session, or the rounds and the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--session", choices=SESSIONS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.session:
        print(json.dumps(SESSIONS[options.session]()))
        return
    if "FLUX_URI" not in os.environ:
        parser.error("this is not a Flux instance; run it with `flux start`, or `make bench-flux`")
    load = os.getloadavg()[0]
    rounds = Rounds()
    with tempfile.TemporaryDirectory(prefix="bench-flux-", ignore_cleanup_errors=True) as work:
        source = copy_source(Path(work))
        for turn in range(options.rounds):
            print(f"round {turn + 1} of {options.rounds}", flush=True)
            shift = turn % len(STEPS)
            for name, system in STEPS[shift:] + STEPS[:shift]:
                found = session(name, system, source, Path(work) / f"{turn}-{name}-{system}")
                for column, value in found.items():
                    rounds.setdefault(f"{name} {system} {column}", []).append(value)
    version = subprocess.run(["flux", "version"], capture_output=True, text=True, check=True).stdout.split()[1]
    peer = versions_of("flux-executorlib1x")
    command = shlex.join(["python", "benchmarks/in_flux.py", *sys.argv[1:]])
    first = preamble(
        command, options.rounds, f"flux-core {version}, one broker", {"executorlib": peer["executorlib"]}, load
    )
    report(first, TARGETS, rounds, "flux", "in_flux.py", options.rounds >= 3)


if __name__ == "__main__":
    main()
