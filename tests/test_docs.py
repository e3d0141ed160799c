"""The Python blocks of the README and the documentation run, and print what they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A block with a title is a file that the others import; the rest of a page is one program.
BLOCK = re.compile(r'^```python(?: title="(\w+\.py)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
PROMISE = re.compile(r"^ *print\(.*\)  # (.*)$", re.MULTILINE)


def files_of(page: str) -> dict[str, str]:
    """The blocks by file, each at its line number in the page; the program is main.py."""
    files: dict[str, str] = {"main.py": ""}
    for block in BLOCK.finditer(page):
        name = block[1] or "main.py"
        text = files.get(name, "")
        gap = page.count("\n", 0, block.start(2)) - text.count("\n")
        files[name] = text + "\n" * gap + block[2]
    return files


PAGES = [path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))] if BLOCK.search(path.read_text())]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_python_blocks_run_and_print_what_they_say(path: Path, tmp_path: Path) -> None:
    if path.name == "graph.md":
        pytest.importorskip("pygraphviz", exc_type=ImportError)
    files = files_of(path.read_text())
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    outcome = subprocess.run(
        [sys.executable, "-W", "error", "main.py"],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert outcome.returncode == 0, f"line numbers are those of {path.name}\n{outcome.stderr}"
    promised = PROMISE.findall(files["main.py"])
    printed = iter(outcome.stdout.splitlines())
    missing = [line for line in promised if line not in printed]
    assert not missing, f"printed:\n{outcome.stdout}"


def test_blocks_keep_the_line_numbers_of_their_page() -> None:
    page = '# A\n```python\na = 1\n```\n```python title="b.py"\nb = 2\n```\n```python\nc = 3\n```\n'
    assert files_of(page) == {
        "main.py": "\n\na = 1\n\n\n\n\n\nc = 3\n",
        "b.py": "\n\n\n\n\nb = 2\n",
    }


def test_each_promise_has_its_tests() -> None:
    """The table of CONTRIBUTING.md names all test files, and none that is not there."""
    _, _, table = (ROOT / "CONTRIBUTING.md").read_text().partition("| Promise | Tests |\n")
    table, _, _ = table.partition("\n\n")
    named = {name for row in table.splitlines() for name in re.findall(r"`([\w/]+\.py)`", row.rpartition(" | ")[2])}
    tests = ROOT / "tests"
    assert named == {path.relative_to(tests).as_posix() for path in tests.rglob("test_*.py")}
