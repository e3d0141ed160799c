"""Tables of figures: what was measured in rounds, what it is compared with, and whether a target is met."""

from __future__ import annotations

import os
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from typing import Any, NamedTuple

from environments import ROOT

Found = dict[str, Any]
Rounds = dict[str, list[float]]

PAGE = ROOT / "docs" / "performance.md"
HEAD = ["figure", "executorlib", "compared with", "there", "ratio", "target", "met"]


class Target(NamedTuple):
    """A row of the table: a quantity of ours, maybe another one to divide it by, and the target.

    Attributes:
        text: What is measured.
        ours: Name of the quantity.
        unit: Of it.
        other: Name of the other quantity; empty for none.
        other_label: The owner of the other quantity.
        bound: The ratio to reach, or the value if there is no other quantity.
        at_least: Whether the bound is the least; otherwise the most.
    """

    text: str
    ours: str
    unit: str
    other: str
    other_label: str
    bound: float
    at_least: bool = False


def table(targets: Sequence[Target], rounds: Rounds) -> list[str]:
    """The lines of a Markdown table; targets with missing measurements are left out."""
    lines = [row(HEAD), row(["---"] * len(HEAD))]
    for target in targets:
        ours, there = rounds.get(target.ours, []), rounds.get(target.other, [])
        if not ours or (target.other and not there):
            continue
        ratios = [mine / other for mine, other in zip(ours, there, strict=True)] if target.other else []
        reached = statistics.median(ratios or ours)
        met = reached >= target.bound if target.at_least else reached <= target.bound
        unit = f" {target.unit}" if target.unit else ""
        compared = [target.other_label, spread(there) + unit, spread(ratios)] if ratios else ["", "", ""]
        goal = f"{'≥' if target.at_least else '≤'} {target.bound:g}"
        lines.append(row([target.text, spread(ours) + unit, *compared, goal, "yes" if met else "**no**"]))
    return lines


def spread(values: Iterable[float]) -> str:
    """The median, and the range where there is one."""
    numbers = sorted(values)
    middle, low, high = (
        f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
        for value in (statistics.median(numbers), numbers[0], numbers[-1])
    )
    return middle if low == high else f"{middle} ({low} to {high})"


def row(cells: Iterable[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def preamble(command: str, rounds: int, where: str, versions: dict[str, str], load: float) -> str:
    """The first lines of a section: what was measured, when, by which command and on what.

    Args:
        command: The command.
        rounds: Number of rounds.
        where: The cluster.
        versions: Versions of what was measured.
        load: Average load at the start.
    """
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"Measured {date.today().isoformat()} at `{commit}` with `{command}`, {rounds} rounds: {where}, on "
        f"{len(os.sched_getaffinity(0))} cores, load {load:.2g} at the start. {listed}.\n\n"
        "Values are medians over the rounds, with the lowest and highest in brackets; a ratio is ours by the other's, "
        "taken within a round."
    )


def report(
    first: str,
    targets: Sequence[Target],
    rounds: Rounds,
    name: str,
    program: str,
    complete: bool,
    others: Mapping[str, str] | None = None,
) -> None:
    """Print what was measured, and put it between its marks in docs/performance.md if it is complete.

    Args:
        first: The first lines.
        targets: Rows of the table.
        rounds: What was measured.
        name: Of the marks.
        program: Which program writes it.
        complete: Whether it is all that there is to measure, often enough.
        others: Quantities that are shown besides, by what to call them.
    """
    lines = [first, "", *table(targets, rounds)]
    if others is not None:
        lines += ["", row(["besides", ""]), row(["---"] * 2)]
        lines += [row([text, spread(rounds[each])]) for text, each in others.items() if each in rounds]
    text = "\n".join(lines) + "\n"
    print(text)
    if not complete:
        print("Not written to docs/performance.md: that takes all figures and three rounds.")
        return
    begin = f"<!-- {name}: begin (written by benchmarks/{program}) -->"
    end = f"<!-- {name}: end -->"
    before, found, rest = PAGE.read_text().partition(begin)
    assert found, f"docs/performance.md has no mark {begin}"
    _, _, after = rest.partition(end)
    PAGE.write_text(f"{before}{begin}\n\n{text}\n{end}{after}")
