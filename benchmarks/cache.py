"""Measure the cache directory alone: ``python benchmarks/cache.py``.

A look-up in a directory of 10 entries and in one of a million must cost the same; the command line must list
the million in little memory; and futures that follow entries of other sessions must cost next to nothing.

It needs h5py, about two minutes, and room for a million empty files, which it removes again (set ``TMPDIR``
for another file system).
"""

from __future__ import annotations

import argparse
import operator
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).resolve().parents[1] / "src"
sys.path.insert(0, str(SOURCE))

from executorlib.cache import directory as cache  # noqa: E402
from executorlib.cache import entries  # noqa: E402

ROUNDS = 5
LOOK_UPS = 300
FUTURES = 1_000
FOLLOWED_SECONDS = 10.0


def main() -> None:
    """Measure everything and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=1_000_000, help="of the large directory (default: 1000000)")
    parser.add_argument("--read", type=int, default=10_000, help="entries for get_cache_data (default: 10000)")
    options = parser.parse_args()
    # First, as it measures the peak memory of this process.
    with tempfile.TemporaryDirectory(prefix="bench-cache-") as folder:
        reading(Path(folder), options.read)
    with tempfile.TemporaryDirectory(prefix="bench-cache-") as folder:
        small, large = Path(folder, "small"), Path(folder, "large")
        print(f"10 empty entries: made in {make_entries(small, 10):.1f} s")
        print(f"{options.entries:,} empty entries: made in {make_entries(large, options.entries):.1f} s")
        look_ups(small, large)
        listing(large)
    with tempfile.TemporaryDirectory(prefix="bench-cache-") as folder:
        following(Path(folder))


def write(path: Path) -> None:
    """Write a small real entry."""
    entries.write_output(
        path, function=operator.add, args=(1, 2), kwargs={}, resource_dict={"cores": 1}, runtime=0.5, output=3
    )


def make_entries(directory: Path, count: int) -> float:
    """Fill a directory with entries that nobody reads, and give the seconds that it took."""
    start = time.perf_counter()
    directory.mkdir()
    for number in range(count):
        os.close(os.open(f"{directory}/add{number:032x}_o.h5", os.O_CREAT | os.O_WRONLY))
    return time.perf_counter() - start


def look_ups(small: Path, large: Path) -> None:
    """Print what one look-up costs in both directories, in alternating rounds."""
    actions: dict[str, Callable[[Path], Any]] = {
        "read_output, hit": lambda directory: entries.read_output(entries.entry_path(directory, "key")),
        "read_output, miss": lambda directory: entries.read_output(entries.entry_path(directory, "no")),
        "get_future_from_cache": lambda directory: cache.get_future_from_cache(directory, "key"),
        "write_output": lambda directory: write(entries.entry_path(directory, "key")),
    }
    for directory in (small, large):
        write(directory / "key_o.h5")
    print(f"\n{'microseconds a call':<24} {'few':>8} {'many':>8} {'ratio':>6}")
    for name, action in actions.items():
        costs: dict[Path, list[float]] = {small: [], large: []}
        for _ in range(ROUNDS):
            for directory, found in costs.items():
                start = time.perf_counter()
                for _ in range(LOOK_UPS):
                    action(directory)
                found.append(1e6 * (time.perf_counter() - start) / LOOK_UPS)
        few, many = (statistics.median(found) for found in costs.values())
        print(f"{name:<24} {few:8.1f} {many:8.1f} {many / few:6.2f}")


def listing(directory: Path) -> None:
    """Print what the commands of the command line cost."""
    print("\nexecutorlib cache ...               seconds   peak MB")
    for arguments in (["ls"], ["ls", "--sort", "size", "--limit", "20"], ["ls", "--sort", "key"], ["show", "key"]):
        seconds, megabytes = cost_of([*arguments, "-d", str(directory)])
        print(f"{' '.join(arguments):<32} {seconds:10.2f} {megabytes:9.0f}")
    for arguments in (["prune", "--older-than", "30d"], ["prune", "--max-size", "1K", "--dry-run"]):
        seconds, megabytes = cost_of([*arguments, "-d", str(directory)])
        print(f"{' '.join(arguments):<32} {seconds:10.2f} {megabytes:9.0f}")


def cost_of(arguments: list[str]) -> tuple[float, float]:
    """Run the command line and give its wall time in seconds and peak memory in MB."""
    command = [sys.executable, "-m", "executorlib", "cache", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    start = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, command
    return time.perf_counter() - start, megabytes_of(usage)


def megabytes_of(usage: resource.struct_rusage) -> float:
    """Give the peak memory; macOS counts it in bytes, Linux in KiB."""
    return usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e6 / 1024)


def reading(directory: Path, count: int) -> None:
    """Print what get_cache_data costs for real entries."""
    write(directory / "0_o.h5")
    content = (directory / "0_o.h5").read_bytes()
    for number in range(count):
        (directory / f"{number}_o.h5").write_bytes(content)
    before = megabytes_of(resource.getrusage(resource.RUSAGE_SELF))
    start = time.perf_counter()
    rows = cache.get_cache_data(directory)
    seconds = time.perf_counter() - start
    grown = megabytes_of(resource.getrusage(resource.RUSAGE_SELF)) - before
    assert len(rows) == count
    print(
        f"get_cache_data of {count:,} entries: {seconds:.1f} s, {1e6 * seconds / count:.0f} microseconds each, "
        f"{grown:.0f} MB more\n"
    )


def following(directory: Path) -> None:
    """Print what futures of entries that run elsewhere cost while nothing happens, and when they resolve."""
    for number in range(FUTURES):
        (directory / f"{number}_i.h5").touch()
    futures = [cache.get_future_from_cache(directory, str(number)) for number in range(FUTURES)]
    start = time.process_time()
    time.sleep(FOLLOWED_SECONDS)
    share = (time.process_time() - start) / FOLLOWED_SECONDS
    write(directory / "0_o.h5")
    start = time.perf_counter()
    assert futures[0].result() == 3
    print(
        f"\n{FUTURES:,} futures of running entries: {100 * share:.1f} % of a core; a result is there after "
        f"{time.perf_counter() - start:.2f} s"
    )


if __name__ == "__main__":
    main()
