"""What the loop and a launcher know of each other.

A new launcher implements `Launcher` and reports through `Events`; both sides live in the loop's thread, so nothing
here needs a lock, and nothing may block.
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from executorlib.poller import Waiting

if TYPE_CHECKING:
    from executorlib.core.scheduler import Worker
    from executorlib.core.task import Task
    from executorlib.resources import Resources
    from executorlib.serialize import Frame

# What a dead worker wrote last is part of its error text; this much of it is kept.
STDERR_TAIL_BYTES = 16 * 1024


class Transport(Protocol):
    """A way to send messages to one worker; received ones come in through `Events.on_message`."""

    def put(self, header: Any, frames: Sequence[Frame] = ()) -> int:
        """Append a message to what `flush` sends; returns its payload's bytes."""
        ...

    def flush(self) -> None:
        """Send what was put, now or as soon as the system takes it. Never raises: a dead worker's exit is an event."""
        ...


@dataclass
class Exit:
    """How a worker ended.

    Attributes:
        status: Wait status, as `os.waitpid` has it; None where it is not known.
        text: What happened, as a clause for the error's text.
        error: The exception for its call, where it is not simply that it died.
        planned: Whether another worker is to take its place however many have died.
        unstarted: Numbers of the calls handed to it that it is known not to have started.
    """

    status: int | None
    text: str
    error: BaseException | None = None
    planned: bool = False
    unstarted: Sequence[int] = ()


@dataclass(eq=False)  # each is itself alone, whatever it has in common with another
class Process:
    """A worker's process, as the launcher that started it sees it.

    Attributes:
        worker: The worker.
        resources: What its calls need.
        transport: How to reach it, once it takes messages.
        permits: For a worker that can hold calls: where to put their numbers, and from where to take them back.
        recall: Likewise, for one that is elsewhere: asks for up to so many of them; `Events.on_recalled` follows.
        pid: Process id, 0 before it is known.
        host: Where it runs.
        stderr: The end of what it wrote to standard error.
        settings: What it has of this session's settings (`session.settings`) by birth.
        single: Whether it runs one call.
        verdict: Why it is being ended, where that is our doing: the exception for the calls lost with it.
        on_gone: Called once it is gone.
    """

    worker: Worker
    resources: Resources
    transport: Transport | None = None
    permits: tuple[socket.socket, socket.socket] | None = None
    recall: Callable[[int], None] | None = None
    pid: int = 0
    host: str = ""
    stderr: bytearray = field(default_factory=bytearray)
    settings: Mapping[str, Any] = field(default_factory=dict)
    single: bool = True
    verdict: BaseException | None = None
    on_gone: Callable[[], None] | None = None


class Events(Waiting, Protocol):
    """What a launcher may call in the loop."""

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` once, as soon as all that is at hand was decided upon: to send together what was put."""
        ...

    def on_connected(self, process: Process) -> None:
        """The worker takes messages through ``process.transport``."""
        ...

    def on_message(self, process: Process, header: list[Any], frames: list[Frame]) -> None:
        """The worker sent a message."""
        ...

    def on_recalled(self, process: Process, numbers: Sequence[int]) -> None:
        """The worker will not start these calls, of which `Process.recall` asked for some."""
        ...

    def on_exit(self, process: Process, end: Exit) -> None:
        """The worker is gone; all its messages were delivered."""
        ...

    def on_node_lost(self, name: str) -> None:
        """Nothing can be started on a node any more; an `on_exit` follows for each worker there."""
        ...


class JobEvents(Events, Protocol):
    """What a launcher may call beside, that makes each call a job: it pickles calls itself, into their entries."""

    def inputs_of(self, task: Task) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call that becomes a job, with references in the place of other jobs' results.

        Names the files of these in `Task.after`.
        """
        ...

    def is_changed(self, task: Task) -> bool:
        """Whether a call has become another one since it was looked up, by its key; it is named by the new one then."""
        ...


class Launcher(Protocol):
    """Starts workers and tells of their ends."""

    def prepare(self) -> None:
        """Do in advance what the first launch would have to wait for."""
        ...

    def launch(self, process: Process) -> None:
        """Start a worker; `Events.on_connected` or `Events.on_exit` follows, maybe from within."""
        ...

    def setup(self, process: Process) -> dict[str, Any]:
        """What the worker has to set up to see the user's process as it is now; see `worker.call.set_up`."""
        ...

    def kill(self, process: Process, signal_number: int) -> None:
        """Signal a worker and all that it started; `Events.on_exit` follows once it is gone, or is as good as gone.

        It may not have started yet, may have been signalled already, and questions about it may be open.
        """
        ...

    def resume(self) -> None:
        """Continue what looks after workers, in case it was suspended; asked again and again once we are to end."""
        ...

    @property
    def busy(self) -> bool:
        """Whether it has to go on although no call is left, to hand over what it was told."""
        ...

    def detach(self, on_taken: Callable[[], None]) -> None:
        """Let what was launched go on without us, where that can be.

        Args:
            on_taken: Called once nothing more is needed of the calls themselves; no event follows.
        """
        ...

    def close(self) -> None:
        """End everything that was started and is not detached, and free all that is held; no event follows."""
        ...


class Timer:
    """Calls back once, at the earliest of the times that it was asked for since it last did.

    Args:
        events: The loop.
        callback: Is called.
    """

    # What a clock may be early, in seconds.
    _EARLY = 0.001

    def __init__(self, events: Events, callback: Callable[[], None]) -> None:
        self._events = events
        self._callback = callback
        self._due: float | None = None

    def within(self, seconds: float) -> None:
        """Call back in so many seconds, unless that is due earlier."""
        due = time.monotonic() + seconds
        if self._due is None or due < self._due:
            self._due = due
            self._events.call_later(seconds, self._fire)

    def _fire(self) -> None:
        # One that was asked for first and has been overtaken finds nothing due any more.
        if self._due is not None and time.monotonic() >= self._due - self._EARLY:
            self._due = None
            self._callback()


# How `faulthandler`, which workers have, begins to tell where a thread is.
_STACK = "(most recent call first)"
# Below it, what is no help to users: frames of ours that called their function, and what else the process had loaded.
_OURS = re.compile(
    r'  File "(<string>|.*executorlib.(worker|launchers|relay|single_node|local_queue|transports).\w+\.py)", line '
)


def has_stack(stderr: bytes | bytearray) -> bool:
    """Whether a process has told where it is, as `faulthandler` does."""
    return _STACK.encode() in stderr


def tail_text(stderr: bytes | bytearray) -> str:
    """The last lines of what a process wrote, indented for an error text; of a stack, its innermost calls."""
    lines = bytes(stderr).decode(errors="replace").rstrip().splitlines()
    stack = next((index for index in reversed(range(len(lines))) if _STACK in lines[index]), None)
    if stack is not None:
        calls = [line for line in lines[stack:] if not _OURS.match(line) and not line.startswith("Extension modules: ")]
        lines = [*lines[:stack][-5:], *calls[:15]]
    return "\n".join(f"    {line}" for line in lines[-20:]).rstrip()
