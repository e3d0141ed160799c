"""Measure this package against its peers: ``python benchmarks/run.py`` (or ``make bench``).

Every peer has a virtual environment of its own under ``.venvs/``, made at the first run (this needs
PyPI) with the Python that runs this file, 3.11 or later. Every measurement is a process of its own.
A round measures every system on every figure, in another order each time; the report gives medians
over the rounds, and ratios taken within a round.

The whole (five rounds) takes about 20 minutes on two cores, which should have nothing else to do.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

from environments import ROOT, EnvironmentFailed, python_of, versions_of
from plan import FIGURES
from report import RESULTS, Results, print_targets, write_report
from systems import QUIET, SYSTEMS

HERE = Path(__file__).resolve().parent
# A measurement takes a few seconds, the slowest peer half a minute; what takes longer hangs.
TIMEOUT_S = 120.0


def main() -> int:
    """Run the rounds, write the report, and say which targets are met.

    Returns:
        0 if all measured targets are met, else 1.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(FIGURES), metavar="FIGURE", help=", ".join(FIGURES))
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--quick", action="store_true", help="one round of short measurements")
    options = parser.parse_args()
    names = options.only or list(FIGURES)
    rounds = 1 if options.quick else options.rounds

    with tempfile.TemporaryDirectory(prefix="bench-source-") as folder:
        # A copy, so that editing the source meanwhile does not mix versions.
        source = shutil.copytree(ROOT / "src", Path(folder) / "src")
        results = measure_all(names, rounds, source, 0.3 if options.quick else 1.0)
    if options.only or options.quick or rounds < 5:
        print("Not written to docs/performance.md: that takes all figures and five rounds.")
    else:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1))
        write_report(results)
    return 0 if print_targets(results) else 1


def measure_all(names: list[str], rounds: int, source: Path, scale: float) -> Results:
    """Measure every system on every figure, round by round.

    Args:
        names: Keys of ``FIGURES``.
        rounds: Number of rounds.
        source: Folder that holds this package.
        scale: Factor to the length of each measurement.

    Returns:
        ``about``, ``figures`` (figure, system, round, column) and ``failures`` (figure, system).
    """
    results: Results = {"about": about(), "figures": {}, "failures": {}}
    for turn in range(rounds):
        for name in names:
            figure = FIGURES[name]
            shift = turn % len(figure.systems)
            for system in figure.systems[shift:] + figure.systems[:shift]:
                start = time.monotonic()
                try:
                    found = measure(name, system, scale * figure.seconds, source)
                except (MeasurementFailed, EnvironmentFailed) as error:
                    results["failures"].setdefault(name, {})[system] = str(error)
                    outcome = f"FAILED: {error}"
                else:
                    measured = results["figures"].setdefault(name, {}).setdefault(system, {})
                    measured[str(turn)] = found
                    outcome = ", ".join(f"{key} {value:,.4g}" for key, value in found.items())
                took = time.monotonic() - start
                print(f"{turn + 1}/{rounds} {name} {system} ({took:.0f} s): {outcome}", flush=True)
    return results


class MeasurementFailed(Exception):
    """A measurement gave no figures; the text is the reason."""


def measure(figure: str, system: str, seconds: float, source: Path) -> dict[str, float]:
    """Run ``measure.py`` in the system's environment.

    Args:
        figure: Key of ``FIGURES``.
        system: Key of ``SYSTEMS``.
        seconds: About how long the measurement itself takes.
        source: Folder that holds this package.

    Returns:
        The figures it printed.

    Raises:
        MeasurementFailed: It ended with an error, or took longer than ``TIMEOUT_S``.
        EnvironmentFailed: The system could not be installed.
    """
    environment = SYSTEMS[system].environment
    python = python_of(environment)
    paths = [str(HERE), *([str(source)] if environment == "ours" else [])]
    variables = os.environ | QUIET
    variables["PYTHONFAULTHANDLER"] = "1"
    variables["PATH"] = f"{python.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    variables["PYTHONPATH"] = os.pathsep.join(paths)
    command = [str(python), str(HERE / "measure.py"), figure, system, "--seconds", str(seconds)]
    # Whatever a system leaves on disk goes with this folder, its processes with the group.
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as folder:
        output, errors = Path(folder) / "stdout", Path(folder) / "stderr"
        # Files, not pipes: a process left behind cannot keep them open.
        with output.open("w") as stdout, errors.open("w") as stderr:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=variables | {"TMPDIR": folder},
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
            try:
                process.wait(TIMEOUT_S)
            except subprocess.TimeoutExpired:
                # Shows where each thread stands.
                process.send_signal(signal.SIGABRT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(5)
                print(errors.read_text(), file=sys.stderr)
                raise MeasurementFailed(f"hung: no end after {TIMEOUT_S:.0f} s") from None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if process.returncode != 0:
            last = (errors.read_text().strip().splitlines() or ["no message"])[-1]
            raise MeasurementFailed(f"exit code {process.returncode}: {last[:200]}")
        found: dict[str, float] = json.loads(output.read_text().splitlines()[-1])
    return found


def about() -> dict[str, Any]:
    """Describe the run: command, date, machine, and the versions measured."""
    peers = {
        "executorlib1x": "executorlib",
        "loky": "loky",
        "parsl": "parsl",
        "dask": "distributed",
        "ray": "ray",
        "hyperqueue": "hyperqueue",
    }
    versions = {}
    for environment, package in peers.items():
        with contextlib.suppress(EnvironmentFailed):
            versions[package] = versions_of(environment)[package]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {
        "command": shlex.join(["python", "benchmarks/run.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "machine": f"{cores} cores, {memory:.0f} GiB, {platform.system()} {platform.machine()}",
        "load": round(os.getloadavg()[0], 2),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "versions": versions,
    }


if __name__ == "__main__":
    sys.exit(main())
