"""Finds leftovers of a program under test: threads, descriptors, processes, files."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

MARK = "EXECUTORLIB_STRESS"


def marked(value: str) -> list[int]:
    """The processes, but for this one, whose environment has the mark with this value."""
    wanted = f"{MARK}={value}".encode()
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            try:
                if wanted in Path(f"/proc/{entry}/environ").read_bytes().split(b"\0"):
                    found.append(int(entry))
            except OSError:
                continue
    return found


def command(pid: int) -> str:
    """Return the command line of a process, if it still exists."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def descriptors() -> dict[str, str]:
    """The open descriptors of this process, and what they refer to."""
    found = {}
    for number in os.listdir("/proc/self/fd"):
        try:
            found[number] = os.readlink(f"/proc/self/fd/{number}")
        except OSError:
            continue
    return found


def children() -> list[int]:
    """The children of this process."""
    found: list[int] = []
    for task in os.listdir("/proc/self/task"):
        try:
            found += map(int, Path(f"/proc/self/task/{task}/children").read_text().split())
        except OSError:
            continue
    return found


def settled(look: Callable[[], list[str]], seconds: float) -> list[str]:
    """Return the findings of ``look``, once there are none or this many seconds have passed."""
    give_up = time.monotonic() + seconds
    while (left := look()) and time.monotonic() < give_up:
        gc.collect()
        time.sleep(0.02)
    return left


class Baseline:
    """Record the present state of this process. Anything more, later on, was left behind."""

    def __init__(self) -> None:
        self._threads = set(threading.enumerate())
        self._descriptors = descriptors()
        self._children = set(children())

    def left(self, seconds: float = 20.0) -> list[str]:
        """Return the leftovers, after waiting for them to go."""
        return settled(self._look, seconds)

    def _look(self) -> list[str]:
        left = [f"thread {thread.name}" for thread in threading.enumerate() if thread not in self._threads]
        left += [f"child {pid} {command(pid)[:200]}" for pid in children() if pid not in self._children]
        now = descriptors()
        if len(now) > len(self._descriptors):
            left += [f"descriptor {key} {value}" for key, value in now.items() if self._descriptors.get(key) != value]
        return left
