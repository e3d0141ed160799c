"""Leftovers of MPI worlds that were killed."""

from __future__ import annotations

import mmap
import os
import secrets
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from executorlib.worker import world
from executorlib.worker.world import remove_unused_files

pytestmark = pytest.mark.linux


@pytest.fixture
def name(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A name as MPICH gives them, without the number at its end, in a folder apart from the worlds of other tests."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        monkeypatch.setattr(world, "_MEMORY", folder)
        yield f"{folder}/mpich_shm_{secrets.token_hex(4)}"


def test_only_unused_files_are_removed(name: str) -> None:
    since = time.time() - 10
    opened, mapped, old, both, unused, other_kind = (Path(f"{name}_{number}") for number in range(6))
    for path in (opened, mapped, old, both, unused):
        path.write_bytes(bytes(4096))
    os.utime(old, (since - 1, since - 1))
    vci = Path(f"{unused}".replace("_shm_", "_vci_"))
    vci.write_bytes(b"x")
    ucx = Path(name).with_name(f"ucx_shm_posix_{name.rpartition('_')[2]}")
    ucx.write_bytes(b"x")
    foreign = Path(f"{name}_tool")
    foreign.write_bytes(b"x")
    link = Path(f"{name}_17")
    link.symlink_to(foreign)
    os.mkfifo(other_kind)
    with mapped.open("r+b") as file:
        memory = mmap.mmap(file.fileno(), 4096)
    with memory, opened.open("r+b"), both.open("r+b") as file, mmap.mmap(file.fileno(), 4096):
        assert remove_unused_files(since)
        kept = {opened, mapped, old, both, foreign, other_kind}
        assert {path for path in (*kept, unused, vci, ucx) if path.exists()} == kept
        assert link.is_symlink()
    assert not remove_unused_files(since)
    assert {path for path in kept if path.exists()} == {old, foreign, other_kind}
