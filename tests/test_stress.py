"""The programs of `make stress` work: a very short run of each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAMS = Path(__file__).parent / "stress"


@pytest.mark.linux
def test_interrupts() -> None:
    run("interrupts.py", "--rounds", "1", "--kinds", "polling", "constructing")


@pytest.mark.linux
@pytest.mark.mpi
def test_chaos() -> None:
    run("chaos.py", "--seconds", "0.5", "--round", "0.5", "--modes", "block")


def run(program: str, *arguments: str) -> None:
    done = subprocess.run([sys.executable, PROGRAMS / program, *arguments], capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 failures" in done.stdout
