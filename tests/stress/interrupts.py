"""One Ctrl-C at a random moment, many times: nothing hangs, nothing is left, and the executor goes on.

    python tests/stress/interrupts.py [--rounds 200] [--seed 1] [--kinds polling collecting submitting constructing]

A round is one Ctrl-C while a program does one of these four things. A program has ten rounds. In all but the last it
catches the KeyboardInterrupt inside the ``with`` block and goes on: all futures must resolve, and nothing may count as
not started. The last one leaves the block, after which no thread, descriptor or process may be left. A program that
hangs prints the stacks of its threads and counts as a hang.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, Future, as_completed, wait
from typing import Any

from leftovers import MARK, Baseline, command, marked, settled

from executorlib import SingleNodeExecutor

ROUNDS_A_PROGRAM = 10
HANG_SECONDS = 60.0


class Alarm:
    """Raises KeyboardInterrupt, once, a random time after it is set: as Ctrl-C does, but for its being so near."""

    def __init__(self, random_: random.Random) -> None:
        self._random = random_
        self.span = 0.05
        signal.signal(signal.SIGALRM, signal.default_int_handler)

    def set(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, self._random.uniform(0.0001, self.span))

    @staticmethod
    def stop() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)


def poll(executor: Any, futures: list[Future[Any]]) -> None:
    while not all([future.done() for future in futures]):  # noqa: C419  # a list takes more of the time for `done`
        pass


def collect(executor: Any, futures: list[Future[Any]]) -> None:
    for _ in as_completed(futures[::2]):
        pass
    left = set(futures)
    while left:
        _, left = wait(left, 0.001, FIRST_COMPLETED)
    for future in futures:
        future.result()


def submit(executor: Any, futures: list[Future[Any]]) -> None:
    while True:
        futures.append(executor.submit(abs, -1))


DOES = {"polling": poll, "collecting": collect, "submitting": submit}


def use(kind: str, rounds: int, random_: random.Random) -> str:
    """Interrupt an executor in use; returns what came of it."""
    alarm = Alarm(random_)
    struck = 0
    block = random_.random() < 0.7
    count = 400 if block else 30
    with SingleNodeExecutor(max_workers=2, block_allocation=block) as executor:
        for number in range(rounds):
            futures = [] if kind == "submitting" else [executor.submit(abs, -1) for _ in range(count)]
            # Submitting makes calls as long as it is not interrupted, and fresh workers take a while for each.
            alarm.span = 0.02 if block else 0.004 if kind == "submitting" else 0.06
            faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
            try:
                alarm.set()
                DOES[kind](executor, futures)
                alarm.stop()
            except KeyboardInterrupt:
                struck += 1
                if number == rounds - 1:
                    raise
            for future in futures:
                assert future.result(HANG_SECONDS) == 1
            assert executor.submit(abs, -2).result(HANG_SECONDS) == 2
            assert len(executor) == 0, f"{len(executor)} calls count as not started"
    return f"{struck} struck"


def construct(rounds: int, random_: random.Random) -> str:
    """Interrupt constructors; returns what came of it."""
    alarm = Alarm(random_)
    alarm.span = 0.004
    before = Baseline()
    struck = 0
    for _ in range(rounds):
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
        executors = []
        try:
            alarm.set()
            while True:
                executors.append(SingleNodeExecutor(max_workers=1))
        except KeyboardInterrupt:
            struck += 1
        for executor in executors:
            executor.shutdown(wait=False)
        del executors
        executor = None
        assert not (left := before.left()), left
        with SingleNodeExecutor(max_workers=1) as executor:
            assert executor.submit(abs, -2).result(HANG_SECONDS) == 2
        executor = None
    return f"{struck} struck"


def program(kind: str, rounds: int, seed: int) -> None:
    """One program, in a process of its own."""
    faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
    random_ = random.Random(seed)
    with SingleNodeExecutor(max_workers=1) as executor:  # what is loaded once is there from now on
        executor.submit(abs, -1).result()
    executor = None
    gc.collect()
    before = Baseline()
    said = "struck on the way out"
    with contextlib.suppress(KeyboardInterrupt):
        said = construct(rounds, random_) if kind == "constructing" else use(kind, rounds, random_)
    left = before.left()
    assert not left, left
    print(said)


def run(kind: str, rounds: int, seed: int) -> tuple[str, str]:
    """Run a program; returns what came of it in a word, and what it said."""
    value = f"{os.getpid()}-{kind}-{seed}"
    process = subprocess.Popen(
        [sys.executable, __file__, "--program", kind, "--rounds", str(rounds), "--seed", str(seed)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, MARK: value},
        start_new_session=True,
    )
    try:
        out, _ = process.communicate(timeout=rounds * HANG_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, _ = process.communicate()
        return "hang", f"{out}\nit did not end"
    left = settled(lambda: [f"process {pid} {command(pid)[:200]}" for pid in marked(value)], 10)
    for entry in left:
        os.kill(int(entry.split()[1]), signal.SIGKILL)
    if "Timeout (" in out:
        return "hang", out
    if left:
        return "left", f"{out}\n{left}"
    return ("fine" if process.returncode == 0 else "failed"), out


def main() -> None:
    """Run programs of every kind, and tell what came of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200, help="for each kind")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", choices=[*DOES, "constructing"], default=[*DOES, "constructing"])
    parser.add_argument("--program", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.program:
        program(options.program, options.rounds, options.seed)
        return
    began = time.monotonic()
    failures = 0
    for kind in options.kinds:
        outcomes: Counter[str] = Counter()
        for number in range(-(-options.rounds // ROUNDS_A_PROGRAM)):
            rounds = min(ROUNDS_A_PROGRAM, options.rounds - number * ROUNDS_A_PROGRAM)
            outcome, said = run(kind, rounds, options.seed * 1000 + number)
            outcomes[outcome] += 1
            if outcome != "fine":
                failures += 1
                print(f"-- {kind}, program {number}: {outcome}\n{said}", flush=True)
        print(f"{kind}: {options.rounds} rounds, programs: {dict(outcomes)}", flush=True)
    python = sys.version.split()[0]
    print(f"Python {python}, seed {options.seed}, {time.monotonic() - began:.0f} s, {failures} failures")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
