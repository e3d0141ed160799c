"""From the results to docs/performance.md and its picture.

``python benchmarks/report.py`` writes both again from the last full run.
"""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from environments import ROOT, EnvironmentFailed, python_of
from plan import FIGURES, LESS_IS_BETTER, TARGETS, Figure, Target
from systems import SYSTEMS

Results = dict[str, Any]

RESULTS = ROOT / "build" / "benchmarks.json"
PAGE = ROOT / "docs" / "performance.md"
PICTURE = ROOT / "docs" / "img" / "performance.png"
# The text around these is written by hand and kept.
BEGIN = "<!-- benchmarks: begin (written by benchmarks/run.py) -->"
END = "<!-- benchmarks: end -->"
EMPTY_PAGE = f"# Performance\n\n{BEGIN}\n{END}\n"


def write_report(results: Results) -> None:
    """Write the tables into docs/performance.md, and the picture beside it.

    Args:
        results: What ``run.py`` measured.
    """
    page = PAGE.read_text() if PAGE.exists() else EMPTY_PAGE
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{markdown(results)}\n{END}{after}")
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    try:
        python = python_of("picture")
    except EnvironmentFailed as error:
        print(f"No picture: matplotlib {error}")
        return
    script = Path(__file__).with_name("picture.py")
    subprocess.run([str(python), str(script), str(RESULTS), str(PICTURE)], check=True)


def markdown(results: Results) -> str:
    """Give the generated part of the page.

    Args:
        results: What ``run.py`` measured.

    Returns:
        Markdown: how it was measured, the targets, every figure.
    """
    about = results["about"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        f"Measured {about['date']} at `{about['commit']}` with `{about['command']}`: "
        f"{about['machine']}, {about['python']} for all, load {about['load']} at the start. "
        f"{versions}. Two workers each.",
        "",
        "Values are medians over the rounds, with the lowest and highest in brackets. A ratio says "
        "how many times as good as the other this package is; it is taken within a round.",
        "",
        "![Medians over the rounds](img/performance.png)",
        "",
        "## Targets",
        "",
        "| figure | executorlib | compared with | there | ratio | target | met |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [_row(cells) for cells in _target_rows(results)]
    for name, figure in FIGURES.items():
        lines += ["", f"## {figure.title}", "", *_figure_table(results, name, figure)]
    return "\n".join(lines) + "\n"


def print_targets(results: Results) -> bool:
    """Print the targets that were measured.

    Args:
        results: What ``run.py`` measured.

    Returns:
        Whether all of them are met.
    """
    rows = [cells for cells in _target_rows(results) if cells[1]]
    for text, ours, rival, theirs, ratio, target, met in rows:
        versus = f" / {rival} {theirs} = {ratio}" if rival else ""
        print(f"{met.strip('*'):>12}  {text} (target {target}): {ours}{versus}")
    return all(cells[-1] == "yes" for cells in rows)


def _target_rows(results: Results) -> Iterator[list[str]]:
    for target in TARGETS:
        ours = _values(results, target.figure, target.system, target.column)
        cells = [target.text, _spread(ours.values()) if ours else ""]
        if not target.rival:
            sign = "≥" if target.at_least else "≤"
            met = _met(target, statistics.median(ours.values())) if ours else "not measured"
            yield [*cells, "", "", "", f"{sign} {target.bound:,g}", met]
            continue
        theirs = _values(results, target.figure, target.rival, target.column)
        ratios = [_ratio(target, ours[turn], theirs[turn]) for turn in ours if turn in theirs]
        yield [
            *cells,
            SYSTEMS[target.rival].label,
            _spread(theirs.values()) if theirs else "",
            _spread(ratios) if ratios else "",
            f"≥ {target.bound:,g} times",
            _met(target, statistics.median(ratios)) if ratios else "not measured",
        ]


def _met(target: Target, value: float) -> str:
    more_is_better = target.at_least or bool(target.rival)
    return "yes" if (value >= target.bound if more_is_better else value <= target.bound) else "**no**"


def _ratio(target: Target, ours: float, theirs: float) -> float:
    return theirs / ours if target.column in LESS_IS_BETTER else ours / theirs


def _figure_table(results: Results, name: str, figure: Figure) -> list[str]:
    table = [["", *figure.columns.values()]]
    for system in figure.systems:
        columns = [_values(results, name, system, column) for column in figure.columns]
        failure = results["failures"].get(name, {}).get(system, "")
        cells = [_spread(values.values()) if values else "" for values in columns]
        label = SYSTEMS[system].label
        table.append([f"{label} ({failure})" if failure else label, *cells])
    if len(figure.columns) > len(figure.systems):
        table = [list(row) for row in zip(*table, strict=True)]
    return [_row(table[0]), _row(["---"] * len(table[0])), *(_row(row) for row in table[1:])]


def _values(results: Results, figure: str, system: str, column: str) -> dict[str, float]:
    measured = results["figures"].get(figure, {}).get(system, {})
    return {turn: found[column] for turn, found in measured.items() if column in found}


def _spread(values: Iterable[float]) -> str:
    numbers = sorted(values)
    middle, low, high = (_number(n) for n in (statistics.median(numbers), numbers[0], numbers[-1]))
    return middle if low == high else f"{middle} ({low} to {high})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    write_report(json.loads(RESULTS.read_text()))
