"""Helpers that look at failed calls. They are not in `functions`, which workers import."""

from __future__ import annotations

import re
from concurrent.futures import BrokenExecutor, Future
from typing import Any

WAIT = 40.0


def assert_broken(future: Future[Any], *texts: str, wait: float = WAIT) -> None:
    """The call's process was lost, with an error in which each of these patterns is found."""
    error = future.exception(wait)
    assert isinstance(error, BrokenExecutor), repr(error)
    for text in texts:
        assert re.search(text, str(error)), str(error)
