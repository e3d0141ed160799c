"""Measure calls as Slurm jobs: ``make bench-slurm``, or ``python benchmarks/cluster.py`` where Slurm's commands work.

Beside this package: plain ``sbatch``, and executorlib 1.x with pysqa in an environment of its own under ``.venvs/``
(made at the first run, this needs PyPI). Every session is a process of its own. A round measures every system on every
figure, in another order each time; the results go into docs/performance.md once three rounds are complete.

Nothing else may use the cluster meanwhile, as the controller's counters are everybody's. Three rounds take about half
an hour on the virtual cluster of tests/slurm/cluster, most of it in executorlib 1.x.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
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
from typing import Any, NamedTuple

from environments import REQUIREMENTS, copy_source, python_of, versions_of
from table import Found, Rounds, Target, preamble, report

REQUIREMENTS["slurm-ours"] = ["cloudpickle", "pyzmq", "pysqa>=1", "h5py"]
REQUIREMENTS["slurm-executorlib1x"] = ["executorlib>=1,<2", "pysqa>=1", "h5py"]

CALLS = 200
MANY_CALLS = 1_000
# After the first call of a session, which has to find out the cluster's settings.
LATER_CALLS = 5
WATCHED_SECONDS = 60.0
# Longer than the measurement: nothing ends meanwhile. And short enough that most of the jobs run in that minute.
LONG_CALL_SECONDS, SHORT_CALL_SECONDS = 600.0, 2.0
# The slowest, 200 calls of executorlib 1.x, takes about two minutes.
SESSION_TIMEOUT = 900.0
IDLE_TIMEOUT = 120.0

# The one that executorlib 1.x has by default needs a partition and has each job read the login environment
# (--get-user-env=L), which takes more than a second. This one does neither.
PEER_TEMPLATE = """\
#!/bin/bash
#SBATCH --job-name={{job_name}}
#SBATCH --chdir={{working_directory}}
#SBATCH --output=job.out
#SBATCH --ntasks={{cores}}
{{command}}
"""
# The messages of slurmd to the controller, and sdiag's own request.
NOT_OURS = {
    "MESSAGE_EPILOG_COMPLETE",
    "MESSAGE_NODE_REGISTRATION_STATUS",
    "REQUEST_COMPLETE_BATCH_SCRIPT",
    "REQUEST_COMPLETE_PROLOG",
    "REQUEST_STATS_INFO",
    "REQUEST_STEP_COMPLETE",
}


class System(NamedTuple):
    """An executor that is measured: the environment it is in, and what it needs to be told here."""

    environment: str
    resource_dict: dict[str, Any]


SYSTEMS = {
    "ours": System("slurm-ours", {}),
    "executorlib1x": System("slurm-executorlib1x", {"partition": "main"}),
    "executorlib1x-lean": System("slurm-executorlib1x", {"submission_template": PEER_TEMPLATE}),
}


# -- sessions: each in a process of its own ---------------------------------------------------------------------------


def noop(number: int) -> int:
    """The call that is measured."""
    return number


def sleep(seconds: float, number: int) -> int:
    """A call that uses no CPU."""
    import time

    time.sleep(seconds)
    return number


def open_executor(system: str) -> Any:
    """This package's executor or, in its own environment, that of executorlib 1.x."""
    from executorlib import SlurmClusterExecutor

    return SlurmClusterExecutor(cache_directory="cache", resource_dict=SYSTEMS[system].resource_dict)


def map_calls(system: str, count: int) -> Found:
    """A session that maps over ``count`` numbers: seconds, and which requests the controller got."""
    before = requests()
    with open_executor(system) as executor:
        start = time.perf_counter()
        assert list(executor.map(noop, range(count))) == list(range(count))
        seconds = time.perf_counter() - start
    after = requests()
    counted = {name: after[name] - before.get(name, 0) for name in after if after[name] > before.get(name, 0)}
    return {"seconds": seconds, "requests": sum(counted.values()), "by_type": counted}


def single_calls(system: str) -> Found:
    """A session of calls one after another: seconds of the first one, and median of the later ones."""
    with open_executor(system) as executor:
        seconds = []
        for number in range(1 + LATER_CALLS):
            start = time.perf_counter()
            assert executor.submit(noop, number).result() == number
            seconds.append(time.perf_counter() - start)
    return {"first": seconds[0], "later": statistics.median(seconds[1:])}


def watched(system: str, call_seconds: float) -> Found:
    """A session whose jobs run: CPU seconds to submit them, then percent of a core, commands that it runs included."""
    from executorlib import terminate_tasks_in_cache

    # Left by cancelling all jobs.
    executor = open_executor(system)
    before = cpu_seconds()
    futures = [executor.submit(sleep, call_seconds, number) for number in range(MANY_CALLS)]
    while not any(future.running() or future.done() for future in futures):
        time.sleep(0.5)
    # The last of the arrays is on its way when the first one runs.
    time.sleep(3)
    submitted = cpu_seconds()
    time.sleep(WATCHED_SECONDS)
    share = 100 * (cpu_seconds() - submitted) / WATCHED_SECONDS
    ended = sum(future.done() for future in futures)
    running = sum(future.running() for future in futures)
    executor.shutdown(wait=False)
    terminate_tasks_in_cache(cache_directory="cache", backend="slurm")
    return {"cpu": share, "submit_cpu": submitted - before, "ended": ended, "running": running}


def cpu_seconds() -> float:
    """CPU time of this process and the children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def fill_peer_cache(system: str) -> Found:
    """Let executorlib 1.x make its entries, its jobs replaced by a function, as 1,000 of them take ten minutes."""
    from executorlib.standalone.hdf import dump
    from executorlib.task_scheduler.file.backend import backend_execute_task_in_file
    from executorlib.task_scheduler.file.task_scheduler import create_file_executor

    def run_here(file_name: str, data_dict: dict[str, Any], **options: Any) -> None:
        os.makedirs(os.path.dirname(file_name), exist_ok=True)
        dump(file_name=file_name, data_dict=data_dict)
        backend_execute_task_in_file(file_name=file_name)

    options = {"cores": 1, "cache_directory": "cache"}
    with create_file_executor(executor_kwargs=options, execute_function=run_here) as executor:
        futures = [executor.submit(noop, number) for number in range(MANY_CALLS)]
        assert [future.result() for future in futures] == list(range(MANY_CALLS))
    return {}


def read_back(system: str) -> Found:
    """A session that submits 1,000 calls whose results are there: seconds from the first submit to the last result."""
    before = requests().get("REQUEST_SUBMIT_BATCH_JOB", 0)
    with open_executor(system) as executor:
        start = time.perf_counter()
        futures = [executor.submit(noop, number) for number in range(MANY_CALLS)]
        assert [future.result() for future in futures] == list(range(MANY_CALLS))
        seconds = time.perf_counter() - start
    assert requests().get("REQUEST_SUBMIT_BATCH_JOB", 0) == before, "calls were not found in the cache"
    return {"seconds": seconds}


SESSIONS: dict[str, Callable[[str], Found]] = {
    "map": lambda system: map_calls(system, CALLS),
    "many": lambda system: map_calls(system, MANY_CALLS),
    "one": single_calls,
    "cpu-long": lambda system: watched(system, LONG_CALL_SECONDS),
    "cpu-short": lambda system: watched(system, SHORT_CALL_SECONDS),
    "fill": fill_peer_cache,
    "read": read_back,
}


# -- rounds -----------------------------------------------------------------------------------------------------------


def requests() -> dict[str, int]:
    """Return the numbers of requests that the controller has got from commands, by type."""
    output = subprocess.run(["sdiag"], capture_output=True, text=True, check=True).stdout
    by_type, _, _ = output.partition("statistics by user")
    found = re.findall(r"^\s+(\w+)\s+\(\s*\d+\)\s+count:(\d+)", by_type, re.MULTILINE)
    return {name: int(count) for name, count in found if name not in NOT_OURS}


def wait_for_jobs(job_id: str | None = None, interval: float = 0.5, timeout: float = SESSION_TIMEOUT) -> None:
    """Poll until a job, or all of them, are gone from the queue."""
    which = ["--jobs", job_id] if job_id else []
    give_up = time.monotonic() + timeout
    while subprocess.run(["squeue", "--noheader", *which], capture_output=True, text=True).stdout.strip():
        if time.monotonic() > give_up:
            raise SystemExit("The cluster has jobs that do not end (see squeue): measure where nothing else runs.")
        time.sleep(interval)


def bare(arguments: list[str], command: str, interval: float) -> float:
    """Submit with plain ``sbatch``, poll to the end, and give the seconds."""
    python = str(python_of("slurm-ours"))
    script = shlex.join([python, "-c", command])
    start = time.perf_counter()
    submit = ["sbatch", "--parsable", "--output=/dev/null", *arguments, "--wrap", script]
    job_id = subprocess.run(submit, capture_output=True, text=True, check=True).stdout.strip()
    wait_for_jobs(job_id, interval)
    seconds = time.perf_counter() - start
    print(f"  {submit[3:]}: {seconds:.2f} s", flush=True)
    return seconds


def session(name: str, system: str, source: Path, folder: Path) -> Found:
    """Run a session in its environment and folder, and return its figures.

    Args:
        name: Key of ``SESSIONS``.
        system: Key of ``SYSTEMS``.
        source: Folder that holds this package.
        folder: Its working directory, with the cache directory.
    """
    wait_for_jobs(timeout=IDLE_TIMEOUT)
    folder.mkdir(exist_ok=True)
    paths = [str(Path(__file__).parent), *([str(source)] if system == "ours" else [])]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore"}
    command = [str(python_of(SYSTEMS[system].environment)), __file__, "--session", name, system]
    done = subprocess.run(
        command, cwd=folder, env=variables, stdout=subprocess.PIPE, text=True, check=True, timeout=SESSION_TIMEOUT
    )
    found: Found = json.loads(done.stdout.splitlines()[-1])
    print(f"  {name}, {system}: {json.dumps(found)}", flush=True)
    return found


def measure_round(turn: int, only: list[str], source: Path, folder: Path, rounds: Rounds) -> None:
    """Measure everything once.

    Args:
        turn: Number of the round, which changes the order.
        only: Which of ``GROUPS``.
        source: Folder that holds this package.
        folder: Where the sessions run, empty.
        rounds: Gets a value for each measured quantity.
    """

    def keep(name: str, system: str, found: Found) -> None:
        for column, value in found.items():
            if column != "by_type":
                rounds.setdefault(f"{name} {system} {column}", []).append(value)

    def run(name: str, system: str, where: str = "") -> None:
        keep(name, system, session(name, system, source, folder / (where or f"{name}-{system}")))

    def bare_map() -> None:
        wait_for_jobs(timeout=IDLE_TIMEOUT)
        keep("map", "sbatch", {"seconds": bare([f"--array=0-{CALLS - 1}"], "pass", 0.1)})

    def bare_one() -> None:
        wait_for_jobs(timeout=IDLE_TIMEOUT)
        keep("one", "sbatch", {"seconds": statistics.median(bare([], "import h5py", 0.05) for _ in range(LATER_CALLS))})

    def ours_read() -> None:
        # The entries are those of a session of jobs.
        run("many", "ours", "read-ours")
        run("read", "ours", "read-ours")

    def peer_read() -> None:
        run("fill", "executorlib1x", "read-executorlib1x")
        run("read", "executorlib1x", "read-executorlib1x")

    groups: dict[str, list[Callable[[], None]]] = {
        "map": [bare_map, *(partial(run, "map", system) for system in SYSTEMS)],
        "one": [bare_one, *(partial(run, "one", system) for system in SYSTEMS)],
        "read": [ours_read, peer_read],
        "cpu": [partial(run, name, "ours") for name in ("cpu-long", "cpu-short")],
    }
    for name in only:
        steps = groups[name]
        shift = turn % len(steps)
        for step in steps[shift:] + steps[:shift]:
            step()


GROUPS = ("map", "one", "read", "cpu")


# -- report -----------------------------------------------------------------------------------------------------------


ARRAY, SINGLE, PEER, LEAN = "`sbatch --array`", "`sbatch`, `import h5py`", "executorlib 1.x", "the same, lean template"
MAP, ONE, FIRST = "200 no-op calls by `map`", "one call, submit to result", "first call of a session"
TARGETS = [
    Target(MAP, "map ours seconds", "s", "map sbatch seconds", ARRAY, 2.5),
    Target(MAP, "map ours seconds", "s", "map executorlib1x seconds", PEER, 0.25),
    Target(MAP, "map ours seconds", "s", "map executorlib1x-lean seconds", LEAN, 0.25),
    Target("the same, requests to the controller", "map ours requests", "", "", "", 19),
    Target("1,000 no-op calls, requests to the controller", "many ours requests", "", "", "", 19),
    Target(ONE, "one ours later", "s", "one sbatch seconds", SINGLE, 1.5),
    Target(ONE, "one ours later", "s", "one executorlib1x later", PEER, 0.5),
    Target(ONE, "one ours later", "s", "one executorlib1x-lean later", LEAN, 0.5),
    Target(FIRST, "one ours first", "s", "one sbatch seconds", SINGLE, 1.5),
    Target(FIRST, "one ours first", "s", "one executorlib1x first", PEER, 0.5),
    Target(FIRST, "one ours first", "s", "one executorlib1x-lean first", LEAN, 0.5),
    Target("client CPU, 1,000 long calls", "cpu-long ours cpu", "% of a core", "", "", 2),
    Target("client CPU, 1,000 calls of 2 s", "cpu-short ours cpu", "% of a core", "", "", 2),
    Target("1,000 cached calls in a new session", "read ours seconds", "s", "read executorlib1x seconds", PEER, 0.1),
]
OTHERS = {
    "200 no-op calls, executorlib 1.x: requests to the controller": "map executorlib1x requests",
    "1,000 no-op calls by `map`, s": "many ours seconds",
    "1,000 long calls: CPU seconds until all are submitted": "cpu-long ours submit_cpu",
    "1,000 long calls: jobs that run at the end of the minute": "cpu-long ours running",
    "1,000 calls of 2 s: ended by the end of the minute": "cpu-short ours ended",
}


def main() -> None:
    """Run a session, or the rounds and the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=GROUPS, help="may be given several times; default: all")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--session", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.session:
        name, system = options.session
        print(json.dumps(SESSIONS[name](system)))
        return
    if shutil.which("sdiag") is None:
        parser.error("Slurm's commands are not on PATH")
    load, rounds = os.getloadavg()[0], Rounds()
    with tempfile.TemporaryDirectory(prefix="bench-slurm-", ignore_cleanup_errors=True) as work:
        source = copy_source(Path(work))
        for turn in range(options.rounds):
            print(f"round {turn + 1} of {options.rounds}", flush=True)
            folder = Path(work) / str(turn)
            folder.mkdir()
            measure_round(turn, options.only or list(GROUPS), source, folder, rounds)
    nodes = dict(line.split() for line in output("sinfo", "--noheader", "--Node", "--format=%N %c").splitlines())
    peer, ours = versions_of("slurm-executorlib1x"), versions_of("slurm-ours")
    first = preamble(
        shlex.join(["python", "benchmarks/cluster.py", *sys.argv[1:]]),
        options.rounds,
        f"{output('sbatch', '--version')}, {len(nodes)} nodes of {' or '.join(sorted(set(nodes.values())))} CPUs",
        {"executorlib": peer["executorlib"], "pysqa": ours["pysqa"], "h5py": ours["h5py"]},
        load,
    )
    report(first, TARGETS, rounds, "cluster", "cluster.py", options.only is None and options.rounds >= 3, OTHERS)


def output(*command: str) -> str:
    """Return the output of a command."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
