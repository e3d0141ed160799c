"""The two tables of the benchmark: the measurements with their systems, and the targets."""

from __future__ import annotations

from dataclasses import dataclass

import simulate


@dataclass(frozen=True)
class Figure:
    """A row of what is measured.

    Attributes:
        title: The heading in the report.
        systems: Keys of ``systems.SYSTEMS``.
        columns: Key of the measurement to its heading, with the unit.
        seconds: How long a measurement takes, about.
    """

    title: str
    systems: tuple[str, ...]
    columns: dict[str, str]
    seconds: float = 1.0


@dataclass(frozen=True)
class Target:
    """The target for a figure.

    With ``rival``, this package must be at least ``bound`` times as good as that system in the same
    round. Without, the measured value itself must be at most ``bound`` (at least, with
    ``at_least``).

    Attributes:
        text: The figure in words.
        figure: Key of ``FIGURES``.
        column: Key of ``Figure.columns``.
        bound: The limit.
        system: Which row is meant, a key of ``systems.SYSTEMS``.
        rival: The system compared with.
        at_least: For a target without rival: whether more is better.
    """

    text: str
    figure: str
    column: str
    bound: float
    system: str = "ours-block"
    rival: str = ""
    at_least: bool = False


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


FIGURES = {
    "default": Figure(
        "No-op calls, a fresh process each",
        ("ours", "executorlib1x", "process-pool-fresh", "hyperqueue"),
        {"calls_per_s": "calls/s"},
        seconds=3.0,
    ),
    "block": Figure(
        "No-op calls, long-lived workers",
        (
            "ours-block",
            "executorlib1x-block",
            "process-pool",
            "multiprocessing",
            "loky",
            "parsl",
            "dask",
            "ray",
        ),
        {"calls_per_s": "calls/s"},
    ),
    "round-trip": Figure(
        "Round trip of one call, long-lived workers",
        ("ours-block", "executorlib1x-block", "process-pool", "multiprocessing", "loky", "ray"),
        {"round_trip_us": "µs"},
    ),
    "chain": Figure(
        "Calls that take other calls' futures, long-lived workers",
        ("ours-block", "executorlib1x-block", "ray"),
        {
            "round_trip_us": "round trip, µs",
            "link_us": "link of a chain, µs",
            "link_per_round_trip": "link / round trip",
            "plain_calls_per_s": "4,000 plain calls, calls/s",
            "layered_calls_per_s": "two layers of 2,000, calls/s",
            "layered_per_plain": "layered / plain",
        },
    ),
    "array": Figure(
        "10 MB numpy array in and out, long-lived workers",
        ("ours-block", "executorlib1x-block", "process-pool", "dask", "ray"),
        {"megabytes_per_s": "MB/s, both ways added"},
    ),
    "queued": Figure(
        "100,000 queued calls",
        ("ours", "ours-block", "executorlib1x", "executorlib1x-block", "process-pool"),
        {
            "bytes_per_call": "bytes a call",
            "threads": "threads added",
            "longest_submit_ms": "longest submit, ms",
            "submits_per_s": "submits/s",
        },
    ),
    "idle": Figure(
        "An executor that waits, all its processes",
        ("ours", "ours-block", "executorlib1x", "executorlib1x-block"),
        {"percent_of_core": "% of a core", "processes": "processes"},
    ),
    "import": Figure(
        "`import executorlib`",
        ("ours", "executorlib1x"),
        {
            "import_ms": "`import executorlib`, ms",
            "import_class_ms": "`from executorlib import SingleNodeExecutor`, ms",
            "heavy_modules": "of zmq, numpy, h5py loaded",
        },
    ),
    "first-result": Figure(
        "Construction to first result",
        ("ours", "ours-block", "executorlib1x", "executorlib1x-block"),
        {"first_result_ms": "ms"},
    ),
    "scheduler": Figure(
        "The scheduler alone, 64 cores a node, a core a call",
        ("ours",),
        {
            **{
                f"us_{nodes}_{calls}": f"{_count(nodes, 'node')}, {calls:,} calls: µs a call"
                for nodes in simulate.NODES
                for calls in simulate.CALLS
            },
            **{f"decisions_per_s_{nodes}": f"{_count(nodes, 'node')}: decisions/s" for nodes in simulate.NODES},
            **{
                f"growth_{nodes}": f"{_count(nodes, 'node')}: cost at 1,000,000 / at 1,000 calls"
                for nodes in simulate.NODES
            },
        },
    ),
}

MODES = {"default": "ours", "block": "ours-block"}

TARGETS = [
    *(
        Target("default mode, no-op calls/s", "default", "calls_per_s", bound, "ours", rival)
        for rival, bound in {
            "executorlib1x": 80,
            "process-pool-fresh": 10,
            "hyperqueue": 1,
        }.items()
    ),
    *(
        Target("block mode, no-op calls/s", "block", "calls_per_s", bound, rival=rival)
        for rival, bound in {
            "process-pool": 3,
            "loky": 1,
            "multiprocessing": 1,
            "parsl": 1,
            "dask": 1,
            "ray": 1,
        }.items()
    ),
    Target("block mode, round trip", "round-trip", "round_trip_us", 1, rival="process-pool"),
    Target("chain of dependent calls, link / own round trip", "chain", "link_per_round_trip", 1.5),
    Target(
        "two layers of 2,000 calls / plain throughput",
        "chain",
        "layered_per_plain",
        0.8,
        at_least=True,
    ),
    Target("10 MB array in and out, MB/s", "array", "megabytes_per_s", 4, rival="process-pool"),
    Target("10 MB array in and out, MB/s", "array", "megabytes_per_s", 1, rival="ray"),
    *(
        Target(f"100,000 queued calls, {mode} mode, {text}", "queued", column, bound, system)
        for mode, system in MODES.items()
        for text, column, bound in (
            ("bytes a call", "bytes_per_call", 1500),
            ("threads", "threads", 1),
            # "Never blocks": less than a person notices; garbage collection is not counted.
            ("longest submit, ms", "longest_submit_ms", 50),
        )
    ),
    *(
        Target(f"idle, {mode} mode, % of a core", "idle", "percent_of_core", 0.5, system)
        for mode, system in MODES.items()
    ),
    Target("`import executorlib`, ms", "import", "import_ms", 3, "ours", "executorlib1x"),
    Target("zmq, numpy or h5py loaded by it", "import", "heavy_modules", 0, "ours"),
    Target(
        "construction to first result, default mode, ms",
        "first-result",
        "first_result_ms",
        2,
        "ours",
        "executorlib1x",
    ),
    *(
        target
        for nodes in simulate.NODES
        for target in (
            Target(
                f"scheduler alone, {_count(nodes, 'node')}, decisions/s",
                "scheduler",
                f"decisions_per_s_{nodes}",
                100_000,
                "ours",
                at_least=True,
            ),
            # Flat: a thousand times the calls at most half as much again each.
            Target(
                f"scheduler alone, {_count(nodes, 'node')}, cost at 1,000,000 / at 1,000 calls",
                "scheduler",
                f"growth_{nodes}",
                1.5,
                "ours",
            ),
        )
    ),
]

# Columns where less is better, for the direction of ratios.
LESS_IS_BETTER = {"round_trip_us", "import_ms", "first_result_ms"}
