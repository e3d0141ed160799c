"""The Python blocks of the README and the documentation run, and print what they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROMISE = re.compile(r"^ *print\(.*\)  # (.*)$", re.MULTILINE)


def program_of(page: str) -> str:
    """The blocks as one program, each at the line number that it has in the page."""
    program = ""
    for block in BLOCK.finditer(page):
        program += "\n" * (page.count("\n", 0, block.start(1)) - program.count("\n")) + block[1]
    return program


PAGES = [
    path
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    if BLOCK.search(path.read_text())
]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_python_blocks_run_and_print_what_they_say(path: Path, tmp_path: Path) -> None:
    program = program_of(path.read_text())
    script = tmp_path / f"{path.stem}.py"
    script.write_text(program)
    outcome = subprocess.run(
        [sys.executable, "-W", "error", script.name],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert outcome.returncode == 0, f"line numbers are those of {path.name}\n{outcome.stderr}"
    promised = PROMISE.findall(program)
    printed = iter(outcome.stdout.splitlines())
    missing = [line for line in promised if line not in printed]
    assert not missing, f"printed:\n{outcome.stdout}"


def test_blocks_keep_the_line_numbers_of_their_page() -> None:
    page = "text\n\n```python\na = 1\n```\nmore\n```shell\nb\n```\n```python\nc = 3\n```\n"
    assert program_of(page) == "\n\n\na = 1\n\n\n\n\n\n\nc = 3\n"
