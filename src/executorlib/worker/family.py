"""The processes that descend from this one, and how to leave none of them behind."""

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

# How long to look for processes that are left. SIGKILL works in far less.
_REAP_SECONDS = 5.0
# The pause between two looks.
_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.0005, 0.05

_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def prctl(option: int, value: int) -> None:
    """Make the system call, or do nothing on systems without it."""
    if _libc is not None:
        _libc.prctl(option, value, 0, 0, 0)


def unblock() -> None:
    """Unblock all signals.

    Some programs start others with signals blocked, and these inherit that: the agent would never hear of its
    children's ends, and a worker could not be asked to end. Signals that are ignored (due to `nohup`, say) stay
    ignored, as in any other program.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def adopt() -> None:
    """Become the parent of descendants that lose theirs, so that they can be found."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)


def follow() -> None:
    """End with the parent process, even if that is killed."""
    parent = os.getppid()
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # it died before its death could be signalled


def lead() -> None:
    """Lead a process group, so that everything this process starts can be ended with it."""
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)


def kill(pid: int, signal_number: int) -> bool:
    """Signal a process. Return False if it is gone, or is another user's (by `sudo`) and so not ours to end."""
    try:
        os.kill(pid, signal_number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def end() -> None:
    """Kill and reap all descendants that the system reports."""
    give_up = time.monotonic() + _REAP_SECONDS
    pause = _PAUSE_SECONDS
    # Grandchildren become our children when their parents end (see `adopt`), so this goes on until there are none.
    while [pid for pid in children_of(os.getpid()) if kill(pid, signal.SIGKILL)] and time.monotonic() < give_up:
        if _reap():
            pause = _PAUSE_SECONDS
        else:
            # There is a limit, because a process that sleeps in the kernel (for a dead file server, say) does not end.
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


def end_marked(mark: bytes) -> None:
    """Kill all processes that were started with a certain variable, and wait for their ends.

    This is for processes that cannot be found by their ancestors, because these are gone.

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
                # Other users' processes cannot be read, and one that ended without being reaped has no environment.
                with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as environ:
                    if mark in environ.read().split(b"\0"):
                        found.append(int(name))
    return found


def _reap() -> bool:
    """Reap children that have ended, and return whether there were any."""
    found = False
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            found = True
    return found


def children_of(pid: int) -> list[int]:
    """Return the children of a process; none if the system does not say (only Linux's `/proc` does)."""
    found = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children") as children:
                found += [int(child) for child in children.read().split()]
    return found


def is_alone(child: int) -> bool:
    """Return True if a child of this process has no running child; False if the system does not say."""
    if child not in children_of(os.getpid()):
        return False
    for each in children_of(child):
        with contextlib.suppress(OSError), open(f"/proc/{each}/stat") as status:
            if status.read().rpartition(") ")[2][:1] != "Z":
                return False
    return True


def descendants(pid: int) -> list[int]:
    """Return the children of a process, and theirs, and so on."""
    found = []
    for child in children_of(pid):
        found += [child, *descendants(child)]
    return found
