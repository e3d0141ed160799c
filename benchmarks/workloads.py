"""The functions that the measured systems run; importable by the workers of all of them.

A fresh process imports this module for its call, so it imports next to nothing itself.
"""

from __future__ import annotations

import os
import time


def nothing() -> None:
    """Do nothing: what is left is the cost of the call itself."""


def identity(value: object) -> object:
    """Return the argument: a link of a chain, or an array in and out."""
    return value


def wait_for_file(path: str) -> None:
    """Keep a worker busy, at next to no CPU, until a file exists.

    Args:
        path: The file that ends the wait.
    """
    while not os.path.exists(path):
        time.sleep(0.02)
