"""Draw the medians: ``picture.py RESULTS.json PICTURE.png`` (needs matplotlib)."""

from __future__ import annotations

import json
import statistics
import sys
from typing import Any

import matplotlib as mpl

mpl.use("agg")

import matplotlib.pyplot as plt
from plan import FIGURES
from systems import SYSTEMS

# Figure, column, and what the axis says.
PANELS = [
    ("default", "calls_per_s", "Fresh process a call: calls/s (more is better)"),
    ("block", "calls_per_s", "Long-lived workers: calls/s (more is better)"),
    ("array", "megabytes_per_s", "10 MB array in and out: MB/s (more is better)"),
    ("round-trip", "round_trip_us", "Round trip: µs (less is better)"),
    ("first-result", "first_result_ms", "Construction to first result: ms (less is better)"),
    ("import", "import_ms", "import executorlib: ms (less is better)"),
]


def draw(results: dict[str, Any], path: str) -> None:
    """Draw a bar a system: the median, and a line from the lowest to the highest round.

    Args:
        results: What ``run.py`` measured.
        path: The picture to write.
    """
    figure, axes = plt.subplots(3, 2, figsize=(12, 9), layout="constrained")
    for axis, (name, column, title) in zip(axes.flat, PANELS, strict=True):
        measured = results["figures"].get(name, {})
        systems = [system for system in reversed(FIGURES[name].systems) if system in measured]
        for row, system in enumerate(systems):
            values = [found[column] for found in measured[system].values()]
            middle = statistics.median(values)
            colour = "tab:orange" if system.startswith("ours") else "tab:gray"
            axis.barh(row, middle, color=colour)
            axis.plot([min(values), max(values)], [row, row], color="black", linewidth=1)
            axis.annotate(f" {middle:,.4g}", (max(middle, *values), row), va="center")
        axis.set_yticks(range(len(systems)), [SYSTEMS[system].label for system in systems])
        axis.set_title(title, fontsize=10)
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        draw(json.load(file), sys.argv[2])
