"""The processes that descend from this one, so that none of them is left behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time

# <linux/prctl.h>
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

# How long to look for processes that are left; SIGKILL takes effect in far less.
_REAP_SECONDS = 5.0
# Between two looks.
_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.0005, 0.05

_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def prctl(option: int, value: int) -> None:
    """The system call; does nothing where there is none."""
    if _libc is not None:
        _libc.prctl(option, value, 0, 0, 0)


def unblock() -> None:
    """Let all signals in.

    Some programs start others with signals blocked, and that is inherited: the agent would never hear of its children's
    ends, and a worker could not be asked to end. What is ignored (by `nohup`, say) stays so, as in any other program.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def adopt() -> None:
    """Become the parent of descendants that lose their own, so that they can be found."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)


def follow() -> None:
    """End with the parent process, also where that is killed."""
    parent = os.getppid()
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # it was gone before its death could be signalled


def lead() -> None:
    """Lead a process group, so that what this process starts can be ended with it."""
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)


def kill(pid: int, signal_number: int) -> bool:
    """Signal a process; False where it is gone, or another user's (who started it by `sudo`) and so not ours to end."""
    try:
        os.kill(pid, signal_number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def end() -> None:
    """Kill and reap all descendants, as far as the system tells of them."""
    give_up = time.monotonic() + _REAP_SECONDS
    pause = _PAUSE_SECONDS
    # Grandchildren become our children as their parents go (see `adopt`), so go on until there are none.
    while [pid for pid in children_of(os.getpid()) if kill(pid, signal.SIGKILL)] and time.monotonic() < give_up:
        if _reap():
            pause = _PAUSE_SECONDS
        else:
            # Not waited for without limit: one that sleeps in the kernel, for a dead file server say, stays.
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


def end_marked(mark: bytes) -> None:
    """Kill all processes that were started with a certain variable, and wait for their ends.

    For those whose ancestors are gone, by which they could be found.

    Args:
        mark: The variable and its value, as ``name=value``.
    """
    give_up = time.monotonic() + _REAP_SECONDS
    while [pid for pid in _marked(mark) if kill(pid, signal.SIGKILL)] and time.monotonic() < give_up:
        time.sleep(_PAUSE_SECONDS)


def _marked(mark: bytes) -> list[int]:
    found = []
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc"):
            if name.isdigit():
                # Another user's tells nothing; one that has ended and was not reaped has no environment any more.
                with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as environ:
                    if mark in environ.read().split(b"\0"):
                        found.append(int(name))
    return found


def _reap() -> bool:
    """Reap children that have ended; whether there were any."""
    found = False
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            found = True
    return found


def children_of(pid: int) -> list[int]:
    """Children of a process; none where the system does not tell (it is Linux's `/proc` that does)."""
    found = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children") as children:
                found += [int(child) for child in children.read().split()]
    return found


def is_alone(child: int) -> bool:
    """Whether a child of this process has none that runs; False where the system does not tell."""
    if child not in children_of(os.getpid()):
        return False
    for each in children_of(child):
        with contextlib.suppress(OSError), open(f"/proc/{each}/stat") as status:
            if status.read().rpartition(") ")[2][:1] != "Z":
                return False
    return True


def descendants(pid: int) -> list[int]:
    """Children of a process, and theirs."""
    found = []
    for child in children_of(pid):
        found += [child, *descendants(child)]
    return found
