"""Kills and suspends the processes of executors at random: every future resolves, and nothing is left.

    python tests/stress/chaos.py [--seconds 600] [--seed 1] [--modes default block mpi block-mpi]

Rounds of a few seconds, each with a new executor: calls of all lengths, chains, and arrays that travel by memory files,
while SIGKILL, or SIGSTOP and later SIGCONT, goes to agents, workers, mpiexec, its proxies and ranks. In the end every
future has a result that is right, or says that its worker died; `shutdown` returns; and there is no thread,
descriptor, process, file in TMPDIR or in /dev/shm that was not there before. Run as root it has a /dev/shm of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import BrokenExecutor, Future, wait
from pathlib import Path
from typing import Any

from leftovers import MARK, Baseline, command, marked, settled

from executorlib import SingleNodeExecutor

HANG_SECONDS = 120.0
# Set where this program has been started again with a /dev/shm of its own.
_OWN_SHM = "EXECUTORLIB_STRESS_SHM"


def nap(seconds: float, value: int) -> int:
    time.sleep(seconds)
    return value


def large(value: int) -> bytes:
    return bytes([value % 256]) * 3_000_000


def length(data: bytes) -> int:
    return len(data)


def rank_sum(value: int) -> int:
    from mpi4py import MPI

    total: int = MPI.COMM_WORLD.allreduce(value)
    return total


MODES: dict[str, dict[str, Any]] = {
    "default": {"max_workers": 3},
    "block": {"max_workers": 3, "block_allocation": True, "restart_limit": 1_000_000},
    "mpi": {"max_workers": 2, "resource_dict": {"cores": 2, "openmpi_oversubscribe": True}},
    "block-mpi": {
        "max_workers": 2,
        "block_allocation": True,
        "restart_limit": 1_000_000,
        "resource_dict": {"cores": 2, "openmpi_oversubscribe": True},
    },
}


def submit(executor: Any, is_mpi: bool, random_: random.Random) -> list[tuple[Future[Any], Any]]:
    """Submit a few calls; returns their futures and right results."""
    value = random_.randrange(100)
    if is_mpi:
        first = executor.submit(rank_sum, value)
        return [(first, [2 * value] * 2), (executor.submit(nap, random_.uniform(0, 0.2), value), [value] * 2)]
    data = executor.submit(large, value)
    first = executor.submit(nap, random_.uniform(0, 0.05), value)
    return [
        (first, value),
        (executor.submit(nap, 0.0, first), value),
        (data, large(value)),
        (executor.submit(length, data), 3_000_000),
    ]


class Chaos(threading.Thread):
    """Sends signals to what descends from this program, until it is told to stop."""

    def __init__(self, mark: str, pause: float, random_: random.Random) -> None:
        super().__init__(name="chaos")
        self.sent: Counter[str] = Counter()
        self._pause = pause
        self._mark = mark
        self._random = random_
        self._over = threading.Event()

    def run(self) -> None:
        stopped: list[tuple[float, int]] = []
        while not self._over.wait(self._random.uniform(0.0, self._pause)):
            now = time.monotonic()
            for due, pid in [each for each in stopped if each[0] <= now]:
                stopped.remove((due, pid))
                _send(pid, signal.SIGCONT)
            victims = marked(self._mark)
            if not victims:
                continue
            pid = self._random.choice(victims)
            if self._random.random() < 0.5:
                stopped.append((now + self._random.uniform(0.0, 1.5), pid))
                number = signal.SIGSTOP
            else:
                number = signal.SIGKILL
            self.sent[f"{number.name} to {_kind(pid)}"] += 1
            _send(pid, number)
        for _, pid in stopped:
            _send(pid, signal.SIGCONT)

    def stop(self) -> None:
        self._over.set()
        self.join()


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _kind(pid: int) -> str:
    text = command(pid)
    for kind in ("worker.agent", "worker.mpi", "mpiexec", "hydra_pmi_proxy", "prterun", "multiprocessing"):
        if kind in text:
            return "agent or worker" if kind == "worker.agent" else kind
    return text[:60] or "one that is gone"


def play(mode: str, seconds: float, mark: str, seed: int) -> tuple[Counter[str], Counter[str]]:
    """One round; returns how its futures ended, and what was sent to whom."""
    random_ = random.Random(seed)
    ends: Counter[str] = Counter()
    chaos = Chaos(mark, 1.0 if "mpi" in mode else 0.4, random.Random(seed + 1))  # worlds take a while to start
    with SingleNodeExecutor(**MODES[mode]) as executor:
        calls: list[tuple[Future[Any], Any]] = []
        chaos.start()
        try:
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                calls += submit(executor, "mpi" in mode, random_)
                # Some, not all, end meanwhile: with a worker killed before it has started, over and over, none may.
                wait([future for future, _ in calls[-12:-8]], 0.5)
        finally:
            chaos.stop()
        _, pending = wait([future for future, _ in calls], HANG_SECONDS)
        assert not pending, f"{mode}, seed {seed}: {len(pending)} futures do not end"
        for future, right in calls:
            error = future.exception(0)
            if error is None:
                assert future.result(0) == right, f"{mode}, seed {seed}: a wrong result"
            elif not isinstance(error, BrokenExecutor):
                raise error
            ends["a result" if error is None else type(error).__name__] += 1
        return ends, chaos.sent


def main() -> None:
    """Play rounds until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--round", type=float, default=5, help="seconds of each round")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    options = parser.parse_args()
    # Where it is not possible, such as below chroot, /dev/shm is left out.
    own_shm = _OWN_SHM not in os.environ and os.geteuid() == 0 and shutil.which("unshare")
    if own_shm and subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0:
        shell = 'mount -t tmpfs -o size=512m tmpfs /dev/shm && exec "$0" "$@"'
        os.environ[_OWN_SHM] = "1"
        os.execvp("unshare", ["unshare", "--mount", "sh", "-c", shell, sys.executable, *sys.argv])
    mark = os.environ[MARK] = f"chaos-{os.getpid()}"
    folder = tempfile.mkdtemp(prefix="chaos-")
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    folders = [folder, *(["/dev/shm"] if _OWN_SHM in os.environ else [])]
    with SingleNodeExecutor(max_workers=2) as executor:  # what is loaded once is there from now on
        executor.submit(rank_sum, 1, resource_dict={"cores": 2, "openmpi_oversubscribe": True}).result(HANG_SECONDS)
    executor = None
    before = Baseline()

    def look() -> list[str]:
        files = [str(path) for each in folders for path in Path(each).rglob("*")]
        return [f"process {pid} {command(pid)[:200]}" for pid in marked(mark)] + files

    began = time.monotonic()
    failures = number = 0
    totals: dict[str, tuple[Counter[str], Counter[str]]] = {mode: (Counter(), Counter()) for mode in options.modes}
    while time.monotonic() - began < options.seconds:
        mode = options.modes[number % len(options.modes)]
        seed = options.seed * 1000 + number
        number += 1
        faulthandler.dump_traceback_later(options.round + 3 * HANG_SECONDS, exit=True)
        wrong: list[str] = []
        try:
            for total, new in zip(totals[mode], play(mode, options.round, mark, seed), strict=True):
                total.update(new)
        except Exception as error:
            wrong.append(f"{type(error).__name__}: {error}")
        wrong += before.left() + settled(look, 20.0)
        if wrong:
            failures += 1
            print(f"-- round {number - 1}, {mode}, seed {seed}:", *wrong, sep="\n   ", flush=True)
            for pid in marked(mark):
                _send(pid, signal.SIGKILL)
            for each in folders:
                for path in Path(each).iterdir():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            before = Baseline()
    faulthandler.cancel_dump_traceback_later()
    shutil.rmtree(folder)
    for mode, (ends, sent) in totals.items():
        print(f"{mode}: {dict(ends)}; sent {dict(sent)}")
    print(f"seed {options.seed}: {number} rounds in {time.monotonic() - began:.0f} s, {failures} failures")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
