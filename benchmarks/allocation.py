"""Measure calls inside a Slurm allocation: ``make bench-slurm``, or this program where Slurm's commands work.

Beside `SlurmJobExecutor`: executorlib 1.x, which starts an ``srun`` for each call, in an environment of its own under
``.venvs/`` (made at the first run, this needs PyPI), `SingleNodeExecutor` of this package on this machine, and a bare
``srun`` of ranks. All is measured inside one allocation, every session in a process of its own, in another order in
each round; the results go into docs/performance.md once three rounds are complete.

Nothing else may use the cluster meanwhile, as the controller's counters are everybody's. Three rounds take about three
minutes on the virtual cluster of tests/slurm/cluster.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from cluster import requests
from environments import REQUIREMENTS, copy_source, python_of, versions_of
from table import Found, Rounds, Target, preamble, report

REQUIREMENTS["allocation-ours"] = ["cloudpickle", "pyzmq", "mpi4py", "mpich"]
REQUIREMENTS["allocation-executorlib1x"] = ["executorlib>=1,<2"]

NODES, CPUS = 4, 4
CALLS = 200
COUNTED_CALLS = (200, 1_000, 2_000)
BLOCK_WORKERS = 4
BLOCK_CALLS, BLOCK_TURNS = 4_000, 7
RANKS, RANK_CALLS, RANK_PAUSE = 4, 7, 0.3
SESSION_TIMEOUT = 300.0


# -- sessions: each in a process of its own ---------------------------------------------------------------------------


def noop(number: int) -> int:
    """The call that is measured."""
    return number


def rank() -> int:
    """A call of several ranks."""
    from mpi4py import MPI

    return int(MPI.COMM_WORLD.Get_rank())


def default_mode(count: int) -> Found:
    """A fresh process, or step, for each call: calls per second, counted from the constructor, and then once more."""
    from executorlib import SlurmJobExecutor

    rates = []
    start = time.perf_counter()
    with SlurmJobExecutor(max_cores=NODES * CPUS) as executor:
        for _ in range(2):
            futures = [executor.submit(noop, number) for number in range(count)]
            assert [future.result() for future in futures] == list(range(count))
            now = time.perf_counter()
            rates.append(count / (now - start))
            start = now
    return {"first": rates[0], "later": rates[1]}


def counted(count: int) -> Found:
    """Requests to the controller in a session of this many calls."""
    from executorlib import SlurmJobExecutor

    before = requests()
    with SlurmJobExecutor() as executor:
        assert sum(executor.map(noop, range(count))) == sum(range(count))
    after = requests()
    by_type = {name: after[name] - before.get(name, 0) for name in after if after[name] > before.get(name, 0)}
    return {"requests": sum(by_type.values()), "by_type": by_type}


def block_mode() -> Found:
    """Workers that stay, in the allocation and on this machine alone, in turn: calls a second."""
    from executorlib import SingleNodeExecutor, SlurmJobExecutor

    kinds = {"allocation": SlurmJobExecutor, "one_node": SingleNodeExecutor}
    taken: dict[str, list[float]] = {name: [] for name in kinds}
    executors = {name: kind(max_workers=BLOCK_WORKERS, block_allocation=True) for name, kind in kinds.items()}
    try:
        for turn in range(-2, BLOCK_TURNS):
            for name, executor in executors.items():
                start = time.perf_counter()
                futures = [executor.submit(noop, number) for number in range(BLOCK_CALLS)]
                assert [future.result() for future in futures] == list(range(BLOCK_CALLS))
                if turn >= 0:  # the first ones are while workers start
                    taken[name].append(time.perf_counter() - start)
    finally:
        for executor in executors.values():
            executor.shutdown()
    return {name: BLOCK_CALLS / statistics.median(seconds) for name, seconds in taken.items()}


def ranks() -> Found:
    """Calls of four ranks, one after another, and the same ranks by ``srun`` alone, on one node, in turn: seconds."""
    from executorlib import SlurmJobExecutor

    bare = ["srun", "--overlap", "--nodes=1", f"--ntasks={RANKS}", "--mpi=pmi2"]
    bare += [sys.executable, "-c", "from mpi4py import MPI"]
    taken: dict[str, list[float]] = {"srun": [], "mpiexec": [], "pmi2": []}
    needs = {"cores": RANKS}
    with (
        SlurmJobExecutor(resource_dict=needs) as by_mpiexec,
        SlurmJobExecutor(resource_dict=needs, pmi_mode="pmi2") as by_srun,
    ):
        for turn in range(-1, RANK_CALLS):
            for name in taken:
                start = time.perf_counter()
                if name == "srun":
                    subprocess.run(bare, check=True)
                else:
                    executor = by_mpiexec if name == "mpiexec" else by_srun
                    assert executor.submit(rank).result() == list(range(RANKS))
                if turn >= 0:
                    taken[name].append(time.perf_counter() - start)
                time.sleep(RANK_PAUSE)  # the ranks of a call leave MPI after its result
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


SESSIONS: dict[str, Callable[[], Found]] = {
    "default": partial(default_mode, CALLS),
    "peer": partial(default_mode, CALLS),
    **{f"requests-{count}": partial(counted, count) for count in COUNTED_CALLS},
    "block": block_mode,
    "mpi": ranks,
}
GROUPS = {
    "default": ["default", "peer"],
    "requests": [f"requests-{count}" for count in COUNTED_CALLS],
    "block": ["block"],
    "mpi": ["mpi"],
}


# -- rounds: inside the allocation ------------------------------------------------------------------------------------


def session(name: str, source: Path, folder: Path) -> Found:
    """Run a session in its environment, and return its figures.

    Args:
        name: Key of ``SESSIONS``.
        source: Folder that holds this package.
        folder: Its working directory.
    """
    ours = name != "peer"
    paths = [str(Path(__file__).parent), *([str(source)] if ours else [])]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore"}
    python = python_of("allocation-ours" if ours else "allocation-executorlib1x")
    done = subprocess.run(
        [str(python), __file__, "--session", name],
        cwd=folder,
        env=variables,
        capture_output=True,  # srun says for every call of the peer that it has to wait
        text=True,
        timeout=SESSION_TIMEOUT,
    )
    if done.returncode != 0:
        raise SystemExit(f"Session {name} has failed:\n{done.stderr[-8000:]}")
    found: Found = json.loads(done.stdout.splitlines()[-1])
    print(f"  {name}: {json.dumps(found)}", flush=True)
    return found


def measure(rounds: int, only: list[str], work: Path) -> Rounds:
    """Measure everything in this many rounds; return a list of values for each quantity."""
    values = Rounds()
    for turn in range(rounds):
        print(f"round {turn + 1} of {rounds}, load {os.getloadavg()[0]:.1f}", flush=True)
        for group in only:
            names = GROUPS[group]
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                for column, value in session(name, work / "src", work).items():
                    if column != "by_type":
                        values.setdefault(f"{name} {column}", []).append(value)
    return values


# -- report -----------------------------------------------------------------------------------------------------------


PEER, ONE_NODE, SRUN = "executorlib 1.x", "`SingleNodeExecutor`", "`srun`, `from mpi4py import MPI`"
MPI_CALL = f"call of {RANKS} ranks, submit to result"
TARGETS = [
    Target(f"{CALLS} no-op calls in a new executor, calls/s", "default first", "", "peer first", PEER, 50, True),
    Target(f"{CALLS} more, calls/s", "default later", "", "peer later", PEER, 50, True),
    Target(
        f"block mode, {BLOCK_WORKERS} workers, no-op calls/s",
        "block allocation",
        "",
        "block one_node",
        ONE_NODE,
        0.8,
        True,
    ),
    Target(
        "requests to the controller, 1,000 calls",
        "requests-1000 requests",
        "",
        "requests-200 requests",
        "200 calls",
        1,
        False,
    ),
    Target(
        "requests to the controller, 2,000 calls",
        "requests-2000 requests",
        "",
        "requests-200 requests",
        "200 calls",
        1,
        False,
    ),
    Target(f"{MPI_CALL}, `mpiexec`", "mpi mpiexec", "s", "mpi srun", SRUN, 1.5, False),
    Target(f"{MPI_CALL}, `pmi2`", "mpi pmi2", "s", "mpi srun", SRUN, 1.5, False),
]


def main() -> None:
    """Run a session, the rounds within the allocation, or all of it and the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=GROUPS, help="may be given several times; default: all")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--session", choices=SESSIONS, help=argparse.SUPPRESS)
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    options = parser.parse_args()
    only = options.only or list(GROUPS)
    if options.session:
        print(json.dumps(SESSIONS[options.session]()))
        return
    if options.inside:
        work = Path(options.inside)
        (work / "found.json").write_text(json.dumps(measure(options.rounds, only, work)))
        return
    if shutil.which("salloc") is None:
        parser.error("Slurm's commands are not on PATH")
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="bench-allocation-", ignore_cleanup_errors=True) as folder:
        copy_source(Path(folder))
        allocation = ["salloc", "--quiet", f"--nodes={NODES}", f"--ntasks-per-node={CPUS}"]
        again = [sys.executable, __file__, "--inside", folder, *sys.argv[1:]]
        if subprocess.run([*allocation, *again]).returncode != 0:
            raise SystemExit("The measurement in the allocation has failed; see above.")
        rounds: dict[str, Any] = json.loads((Path(folder) / "found.json").read_text())
    slurm = subprocess.run(["sinfo", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    peer, ours = versions_of("allocation-executorlib1x"), versions_of("allocation-ours")
    versions = {"executorlib": peer["executorlib"], "mpi4py": ours["mpi4py"], "mpich": ours["mpich"]}
    command = shlex.join(["python", "benchmarks/allocation.py", *sys.argv[1:]])
    first = preamble(command, options.rounds, f"{slurm}, {NODES} nodes of {CPUS} CPUs", versions, load)
    report(first, TARGETS, rounds, "allocation", "allocation.py", options.only is None and options.rounds >= 3)


if __name__ == "__main__":
    main()
