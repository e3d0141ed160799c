"""The errors that are ours, and the remote traceback that accompanies a function's own error."""

from __future__ import annotations

import signal
from concurrent.futures import BrokenExecutor


class ExecutorlibSocketError(BrokenExecutor):
    """The process that ran a call ended, or could not be started, before it gave a result.

    Only that call fails; the executor works on. The text names the process, its exit code or signal,
    its host and the last lines of its standard error.
    """


class RemoteTraceback(Exception):
    """The traceback of an exception as it was in the worker; the ``__cause__`` of the exception."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f'\n"""\n{self.text}"""'


def advise_unpicklable(error: BaseException, number: int, name: str) -> BaseException:
    """Add to what went wrong while a call was pickled which call it was, and what to do."""
    if isinstance(error, (OSError, MemoryError)):
        reason = (
            "the system gave out as its function and arguments were pickled. Submit less at once, or raise this "
            "process's limits (`ulimit -a`)."
        )
    else:
        reason = (
            "its function or one of its arguments cannot be pickled. Create such objects (open files, locks, "
            "connections) inside the function instead."
        )
    text = f"call {number} of {name} could not be sent to a worker: {reason}"
    if hasattr(error, "add_note"):
        error.add_note(text)
    elif error.__cause__ is None:
        error.__cause__ = RemoteTraceback(text)
    return error


def describe_split_world(ranks: int, starter: str, size: int, library: str, advice: str) -> str:
    """Say that the ranks of an MPI call do not find each other; each would believe that it is the first of few.

    Args:
        ranks: How many were started.
        starter: By what.
        size: How many a rank sees.
        library: The MPI that mpi4py uses.
        advice: What to do.
    """
    return (
        f"{ranks} ranks were started by {starter}, but mpi4py sees a world of size {size}: its MPI ({library}) does "
        f"not find what started it. Results would be wrong. {advice}"
    )


def describe_exit(wait_status: int) -> str:
    """Say in words how a process ended.

    Args:
        wait_status: Status as `os.waitpid` returns it.

    Returns:
        A phrase such as ``exited with code 3`` or ``was killed by SIGSEGV (signal 11)``.
    """
    number = wait_status & 0x7F
    if number == 0:
        return f"exited with code {wait_status >> 8}"
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = "an unknown signal"
    phrase = f"was killed by {name} (signal {number})"
    if number == signal.SIGKILL:
        phrase += "; where nobody sent it, the kernel's out-of-memory killer did"
    return phrase
