"""This process's standard streams, which may be closed: their numbers then belong to whatever is opened next."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys


def fill() -> None:
    """Put the null device where a standard stream is closed.

    Otherwise one of our own descriptors would get its number, and what a library writes to standard error with it.
    """
    with contextlib.suppress(OSError):  # no descriptor is left, so neither is one of these
        while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(descriptor)


def is_users(number: int) -> bool:
    """Whether a standard stream (1 or 2) is the user's, and not a file of the same number.

    A stream is inherited, or put in place by `os.dup2`, so it is inheritable. What Python opens is not.
    """
    if (sys.__stdout__ if number == 1 else sys.__stderr__) is None:  # it was closed when Python started
        return False
    try:
        return not fcntl.fcntl(number, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    except OSError:
        return False
