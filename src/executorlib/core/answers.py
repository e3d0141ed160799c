"""Rebuilds values and exceptions from the answers of workers."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from executorlib import serialize
from executorlib.errors import RemoteTraceback, contained, with_source_lines
from executorlib.worker.call import traceback_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from executorlib.core.task import Task
    from executorlib.serialize import Frame


def rebuild(
    task: Task, header: list[Any], frames: list[Frame], loads: Callable[[list[Frame]], Any]
) -> tuple[Any, BaseException | None]:
    """Return what a call has returned, or the exception that its future is to have.

    Args:
        task: The call.
        header: The header of the answer.
        frames: Its frames.
        loads: Unpickles the value of one process.
    """
    kind, _, _, text, more = header
    if kind == "error":
        return None, rebuild_error(frames, text, task.name, loads)
    try:
        return _load_ranks(frames, more["counts"]) if "counts" in more else loads(frames), None
    except BaseException as error:
        call = f"call {task.number} of {task.name}"
        told = f"{call} returned, but its result could not be unpickled here"
        if not isinstance(error, Exception):
            told += "\n" + traceback_text(error)
        error.__cause__ = error.__cause__ or RemoteTraceback(told)
        return None, contained(error, f"{call}: unpickling the result of the function")


def _load_ranks(frames: list[Frame], counts: list[int]) -> list[Any]:
    """The results of all ranks; ``counts`` tells how many frames each rank has sent."""
    each = iter(frames)
    return [serialize.loads(list(itertools.islice(each, count))) for count in counts]


def rebuild_error(frames: list[Frame], text: str, subject: str, loads: Callable[[list[Frame]], Any]) -> BaseException:
    """Return the exception of a worker, with its traceback there as the cause.

    Args:
        frames: Its pickle.
        text: Its traceback.
        subject: The name of what raised it.
        loads: Unpickles it.
    """
    error: BaseException
    try:
        error = loads(frames)
        if not isinstance(error, BaseException):
            raise TypeError(f"{type(error).__name__} is not an exception")
    except BaseException as reason:
        error = RuntimeError(
            f"{subject} raised an exception that cannot be unpickled here ({type(reason).__name__}: {reason}); "
            "its traceback is shown above as the cause."
        )
    error.__cause__ = RemoteTraceback(with_source_lines(text))
    return contained(error, f"{subject}: the function")  # a job may have been run by another version
