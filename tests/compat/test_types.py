"""Type checkers accept users' right programs, and find the mistakes in wrong ones."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

PROGRAMS = Path(__file__).parent / "programs"

Lines = set[tuple[str, int]]


def mypy(folder: Path) -> Lines:
    """Where mypy finds errors in a folder's programs."""
    # A cache of its own, as what the package's settings have written there is of no use with others.
    cache = Path(__file__).parents[2] / ".mypy_cache" / "programs"
    options = ["--strict", "--config-file=", f"--cache-dir={cache}", "--output=json"]
    out = run("mypy", folder, *options, "right.py", "wrong.py")
    messages = [json.loads(line) for line in out.splitlines()]
    return {(Path(each["file"]).name, each["line"]) for each in messages if each["severity"] == "error"}


def pyright(folder: Path) -> Lines:
    """Where pyright does."""
    (folder / "pyrightconfig.json").write_text(json.dumps({"typeCheckingMode": "standard"}))
    messages = json.loads(run("basedpyright", folder, "--outputjson", "--pythonpath", sys.executable))
    return {
        (Path(each["file"]).name, each["range"]["start"]["line"] + 1)
        for each in messages["generalDiagnostics"]
        if each["severity"] == "error"
    }


def run(module: str, folder: Path, *arguments: str) -> str:
    """Return the output of a type checker; a status above 1 means that it could not work."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=folder, capture_output=True, text=True, timeout=250
    )
    assert done.returncode in (0, 1), done.stderr + done.stdout
    return done.stdout


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("checker", "module"), [(mypy, "mypy"), (pyright, "basedpyright")], ids=["mypy", "pyright"])
def test_programs(checker: Callable[[Path], Lines], module: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"needs {module}")
    for path in PROGRAMS.glob("*.py"):
        shutil.copy(path, tmp_path)
    wrong = (PROGRAMS / "wrong.py").read_text().splitlines()
    expected = {("wrong.py", number) for number, line in enumerate(wrong, 1) if re.search(r"# E$", line)}
    assert checker(tmp_path) == expected
