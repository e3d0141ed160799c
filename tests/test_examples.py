"""The examples run as a user runs them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.mpi
@pytest.mark.long
@pytest.mark.timeout(240)  # of 108 atoms it is ten seconds of work, twice; a loaded machine may take long
@pytest.mark.parametrize(
    "options", [["--cells", "1"], pytest.param([], marks=pytest.mark.slow)], ids=["small", "usual"]
)
def test_equation_of_state_finds_the_bulk_modulus_of_copper(tmp_path: Path, options: list[str]) -> None:
    for package in ("ase", "matplotlib", "mpi4py"):
        pytest.importorskip(package)
    outcome = subprocess.run(
        [sys.executable, EXAMPLES / "equation_of_state.py", "Cu", "--output", "curves.png", *options],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert outcome.returncode == 0, outcome.stderr
    row = re.search(r"^Cu +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+)$", outcome.stdout, re.MULTILINE)
    assert row, outcome.stdout
    a, _, b, experiment = map(float, row.groups())
    assert a == pytest.approx(3.59, abs=0.01)
    assert b == pytest.approx(134, abs=1)
    assert experiment == 137.0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_equation_of_state_names_the_metals_it_knows(tmp_path: Path) -> None:
    for package in ("ase", "matplotlib"):
        pytest.importorskip(package)
    outcome = subprocess.run(
        [sys.executable, EXAMPLES / "equation_of_state.py", "Fe"],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=55,
    )
    assert outcome.returncode == 2
    assert "no data for Fe" in outcome.stderr
    assert "Cu" in outcome.stderr
