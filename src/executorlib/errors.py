"""The errors that are ours, and the remote traceback that accompanies a function's own error."""

from __future__ import annotations

import re
import signal
import sys
import threading
from concurrent.futures import BrokenExecutor
from pickle import PicklingError

TYPE_CHECKING = False  # importing it would load typing, which a starting worker does not need
if TYPE_CHECKING:
    from typing import Any, NoReturn


class ExecutorlibSocketError(BrokenExecutor):
    """The process that ran a call ended, or could not be started, before it returned a result.

    Only that call fails, and the executor works on. The text names the process, its exit code or signal, its host, and
    the last lines of its standard error.

    Attributes:
        wait_status: How the process ended, as `os.waitpid` returns it; None if that is not known.
        reason: Why there is no result, for those who know the call; empty if only the whole text says it.
    """

    wait_status: int | None = None
    reason: str = ""


class TimeLimitError(ExecutorlibSocketError, TimeoutError):
    """A call ran longer than its ``run_time_max`` and was ended."""


class RemoteTraceback(Exception):
    """The traceback that an exception had in the worker. It is the exception's ``__cause__``."""

    note = ""  # the exception's note, for which Python 3.10 has no other place

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f'\n"""\n{self.text}"""' + (f"\n{self.note}" if self.note else "")


class ChainNote(str):
    """A note of an exception that lists the calls which failed with it, each an input of the next.

    All of them have the same exception, so there is one note, which grows.

    Attributes:
        chains: The calls' names. If a call was an input of several, there are several chains.
        more: The number of calls that are not named.
    """

    chains: list[list[str]]
    more: int

    # The most chains to keep, and the most names to show at the start and at the end of each.
    _MOST_CHAINS, _MOST_SHOWN = 3, 4

    @classmethod
    def of(cls, chains: list[list[str]], more: int) -> ChainNote:
        """Make a note."""
        texts = []
        for chain in chains:
            left_out = len(chain) - 2 * cls._MOST_SHOWN
            if left_out > 0:
                chain = [*chain[: cls._MOST_SHOWN], f"({left_out} more)", *chain[-cls._MOST_SHOWN :]]
            texts.append(" -> ".join(chain))
        if more:
            texts.append(f"and {more} more")
        note = cls(f"Chain of calls that failed, each an input of the next: {'; '.join(texts)}")
        note.chains, note.more = chains, more
        return note

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (str(self),)

    def extended(self, source: str, dependent: str) -> ChainNote:
        """Return the note with another call in it."""
        chain = next((chain for chain in self.chains if chain[-1] == source), None)
        if chain is not None:
            chain.append(dependent)
        elif len(self.chains) < self._MOST_CHAINS:
            start = next((chain[: chain.index(source) + 1] for chain in self.chains if source in chain), [source])
            self.chains.append([*start, dependent])
        else:
            return self.of(self.chains, self.more + 1)
        return self.of(self.chains, self.more)


_chains = threading.Lock()  # the loops of several executors may share one exception


def note_chain(error: BaseException, source: str, dependent: str) -> None:
    """Note in an exception that a call failed with it because the call's input had failed.

    Args:
        error: The input's exception.
        source: The name of the input.
        dependent: The name of the call.
    """
    with _chains:
        if hasattr(error, "add_note"):
            notes = getattr(error, "__notes__", None)
            if not isinstance(notes, list):
                error.add_note(ChainNote.of([[source, dependent]], 0))
                return
            for index, note in enumerate(notes):
                if isinstance(note, ChainNote):
                    notes[index] = note.extended(source, dependent)
                    return
            notes.append(ChainNote.of([[source, dependent]], 0))
            return
        if error.__cause__ is None:
            error.__cause__ = RemoteTraceback("")
        cause = error.__cause__
        if isinstance(cause, RemoteTraceback):
            known = cause.note
            extended = known.extended(source, dependent) if isinstance(known, ChainNote) else None
            cause.note = extended or ChainNote.of([[source, dependent]], 0)


def contained(error: BaseException, who: str, kind: type[Exception] = ExecutorlibSocketError) -> BaseException:
    """Replace an exception that would end a program or an asyncio task if raised again, as no future may hold it.

    Exceptions of the user's own classes are kept, even if they are not an `Exception`, because callers can catch them.

    Args:
        error: What was raised, in another process or in the user's code.
        who: What raised it, as the subject of a sentence.
        kind: The class of the replacement.

    Returns:
        The replacement, which has the cause of the error, or the error itself.
    """
    asyncio = sys.modules.get("asyncio.exceptions")
    if isinstance(error, SystemExit):
        try:
            code = "" if error.code is None else repr(error.code)[:200]
        except Exception:  # raised by the user's own object
            code = f"<{type(error.code).__name__}>"
        did = f"called sys.exit({code})"
    elif isinstance(error, (KeyboardInterrupt, GeneratorExit)) or (
        asyncio is not None and isinstance(error, asyncio.CancelledError)
    ):
        did = f"raised {type(error).__name__}"
    else:
        return error
    replacement = kind(f"{who} {did}")
    replacement.__cause__ = error.__cause__
    return replacement


_FRAME = re.compile(r'([ |+-]*)File "(.+)", line (\d+), in ')


def with_source_lines(text: str) -> str:
    """Add lines to a traceback from elsewhere that only this process has: those of notebooks and prompts."""
    linecache = sys.modules.get("linecache")  # without it there are no such lines
    if linecache is None:
        return text
    lines = text.split("\n")
    shown = []
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        shown.append(line)
        frame = _FRAME.match(line)
        if frame is not None and frame[2] in linecache.cache and not following.startswith(f"{frame[1]}  "):
            code = linecache.getline(frame[2], int(frame[3])).strip()
            if code:
                shown.append(f"{frame[1]}  {code}")
    return "\n".join(shown)


FUTURE_ADVICE = (
    "A future is replaced by its result if it is an argument of a call, or is inside lists, tuples, sets, dicts and "
    "dataclasses in one, at any depth. It is not looked for in arrays, data frames, attributes, partials, closures and "
    "the like: pass the future as an argument of its own, or pass future.result() once it is done."
)
EXECUTOR_ADVICE = (
    "An executor belongs to the process that made it. Make one inside the function, or pass the arguments to make it "
    "with."
)


def refuse_future(self: Any) -> NoReturn:
    """Refuse to pickle a future, as its ``__reduce__``.

    Raises:
        TypeError: Always.
    """
    raise TypeError(f"a {type(self).__name__} cannot be pickled. {FUTURE_ADVICE}")


CHANGED_CALL = (
    "it ran with other code or inputs than were looked up in the cache: its function, an argument, a global that it "
    "reads, or the file of one of your modules was changed between submit and run. Its result is that of the changed "
    "call and is not kept under the key that was looked up. Submit copies of objects that you go on changing, such as "
    "array.copy(), and change no module while calls that use it wait."
)


def advise_unpicklable(error: BaseException, number: int, name: str, misplaced: str = "") -> BaseException:
    """Add to an error from pickling a call which call it was, and what to do.

    Args:
        error: The exception that pickling raised.
        number: The number of the call.
        name: The name of its function.
        misplaced: What `futures.inputs.misplaced` found in the call.
    """
    error = contained(error, "pickling its function or arguments", PicklingError)
    subject = f"call {number} of {name} could not be sent to a worker"
    if misplaced:
        told = TypeError(f"{subject}: {misplaced}")
        told.__cause__ = error
        return told
    if isinstance(error, (OSError, MemoryError)):
        reason = (
            "the system ran out of resources while its function and arguments were pickled. Submit less at once, or "
            "raise this process's limits (`ulimit -a`)."
        )
    else:
        reason = (
            "its function or one of its arguments cannot be pickled. Create such objects (open files, locks, "
            "connections) inside the function instead."
        )
    add_advice(error, f"{subject}: {reason}")
    return error


def add_advice(error: BaseException, text: str) -> None:
    """Add a note to an exception of the user's; before Python 3.11, to its cause."""
    if hasattr(error, "add_note"):
        error.add_note(text)
    elif error.__cause__ is None:
        error.__cause__ = RemoteTraceback(text)
    elif isinstance(error.__cause__, RemoteTraceback) and not error.__cause__.note:
        error.__cause__.note = text


def describe_split_world(ranks: int, starter: str, size: int, library: str, advice: str) -> str:
    """Describe that the ranks of an MPI call do not find each other, so that each sees a smaller world.

    Args:
        ranks: The number of ranks that were started.
        starter: What started them.
        size: The number of ranks that a rank sees.
        library: The MPI that mpi4py uses.
        advice: What to do.
    """
    return (
        f"{starter} started {ranks} ranks, but mpi4py sees a world of size {size}: its MPI ({library}) cannot find the "
        f"program that started it. Results would be wrong. {advice}"
    )


def over_time(subject: str, limit: float) -> str:
    """Describe that a call was ended because it ran longer than ``limit`` seconds, its ``run_time_max``."""
    return (
        f"{subject} ran longer than its run_time_max of {limit:g} s and was ended; give it more time with "
        "resource_dict={'run_time_max': seconds}."
    )


def describe_exit(wait_status: int) -> str:
    """Describe how a process ended.

    Args:
        wait_status: The status that `os.waitpid` returned.

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
        phrase += "; if nobody sent it, the kernel's out-of-memory killer did"
    return phrase
