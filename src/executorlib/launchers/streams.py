"""This process's standard streams. If one is closed, the next file to be opened would get its number."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys


def fill() -> None:
    """Open the null device in place of closed standard streams.

    Otherwise one of our own descriptors would get the number of one, and libraries would write their errors into it.
    """
    with contextlib.suppress(OSError):  # no descriptor is left, so none of these is free either
        while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(descriptor)


def is_users(number: int) -> bool:
    """Return whether a standard stream (1 or 2) is the user's, and not another file with the same number.

    A standard stream is inherited, or put in place by `os.dup2`, so it is inheritable. Files that Python opens are not.
    """
    if (sys.__stdout__ if number == 1 else sys.__stderr__) is None:  # it was closed when Python started
        return False
    try:
        return not fcntl.fcntl(number, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    except OSError:
        return False
