"""Docstrings, comments and pages are plain English: no words and openings that make readers start a sentence twice."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = [
    *(ROOT / "src").rglob("*.py"),
    *(ROOT / "docs").rglob("*.md"),
    *(ROOT / "benchmarks").glob("*.py"),
    *(ROOT / "examples").glob("*.py"),
    *(path for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__)),
    *ROOT.glob("*.md"),
    *(ROOT / ".ci").iterdir(),
    ROOT / "Makefile",
]
WORDS = re.compile(
    r"\b(likewise|thereby|so many|by who|gave out|heeds?|heeded|for worse|through with|no plain)\b|\(any more\)", re.I
)
OPENING = re.compile(r"(What|Whether|Whose)\b[^?]*$")


def problems(text: str, comments: bool = True) -> Iterator[tuple[int, str]]:
    """Find the lines to say otherwise: their numbers, with the reasons.

    Args:
        text: The content of a file.
        comments: True if lines that begin with # are comments, and not headings.
    """
    above = ""
    for number, line in enumerate(text.splitlines(), 1):
        if found := WORDS.search(line):
            yield number, f"{found[0]!r}: use a plainer word"
        here = line.strip()
        is_comment = comments and here.startswith("# ")
        begins = not above or here.startswith(('"""', "- ")) or (is_comment and not above.startswith("#"))
        if begins and (found := OPENING.match(here.lstrip('#"- ' if comments else '"- '))):
            yield number, f"'{found[1]} ...': open with the subject or, in a docstring, with a verb"
        above = here


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ('def f():\n    """Whether it is."""', [2]),
        ('def f():\n    """Return whether it is.\n\n    What else there is.\n    """', [4]),
        ("# What it holds.\nx = 1  # what it is", [1]),
        ("# A comment says\n# What follows, and does so\n# likewise.", [3]),
        ("What is a worker? A process.", []),
        ("- Whose it is\n- so many of them", [1, 2]),
    ],
)
def test_problems_are_found(text: str, lines: list[int]) -> None:
    assert [number for number, _ in problems(text)] == lines


def test_headings_of_pages_may_begin_with_what() -> None:
    assert not [*problems("text\n\n## What it does", comments=False)]


def test_texts_are_plain_english() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {reason}"
        for path in FILES
        for number, reason in problems(path.read_text(), comments=path.suffix != ".md")
    ]
    assert not found, "\n".join(["", *found])
