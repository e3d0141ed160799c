"""The interface between the loop and a launcher.

A new launcher derives from `Launcher` and reports through `Events`. Both sides live in the loop's thread, so nothing
here needs a lock, and nothing may block except `Launcher.close`.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from executorlib.poller import Waiting

if TYPE_CHECKING:
    from executorlib.resources import Resources
    from executorlib.serialize import Frame


class Lifetime(enum.Enum):
    """The lifetime of a worker."""

    CALL = "for one call"
    BLOCK = "for call after call, as a part of a block"


class Transport(Protocol):
    """A way to send messages to one worker. Messages from it arrive through `Events.on_message`."""

    def put(self, header: Any, frames: Sequence[Frame] = ()) -> int:
        """Append a message to those that `flush` sends; returns the bytes of its payload."""
        ...

    def flush(self) -> None:
        """Send them, now or as soon as the system accepts them. Never raises: the death of a worker is an event."""
        ...


class Call(Protocol):
    """A call, as far as launchers know it. Launchers of jobs, which need all of it, know `core.task.Task`."""

    @property
    def number(self) -> int:
        """Its number in its executor."""
        ...

    @property
    def name(self) -> str:
        """The function's name."""
        ...

    @property
    def over(self) -> bool:
        """True once it has ended, in whatever way."""
        ...


class Place(NamedTuple):
    """The part of a node that a worker holds.

    Attributes:
        node: The node's name.
        cores: Core numbers.
        gpus: GPU device names.
    """

    node: str
    cores: Sequence[int]
    gpus: Sequence[str]


class Permits(Protocol):
    """Says which of the calls that a worker holds it may start, such as `worker.protocol.SocketPermits`."""

    def grant(self, numbers: Sequence[int]) -> None:
        """Let the worker start these calls, which the next flush of its transport sends."""
        ...

    def take_back(self, most: int) -> Sequence[int]:
        """Take back up to this many calls that the worker has not started, and will not start.

        Returns:
            Numbers of those that are back at once. A worker on another node answers later, by `Events.on_recalled`.
        """
        ...


@dataclass
class Exit:
    """The end of a worker.

    Attributes:
        status: Wait status, as `os.waitpid` returns it; None if it is not known.
        text: What happened, as a clause for an error text.
        error: The exception for its call, if there is a better one than that the worker died.
        planned: Whether to replace the worker without counting this as a death.
        unstarted: Numbers of calls that were handed to it and that it is known not to have started.
    """

    status: int | None
    text: str
    error: BaseException | None = None
    planned: bool = False
    unstarted: Sequence[int] = ()


@dataclass(eq=False)  # compared by identity
class Process:
    """A worker's process, as seen by the launcher that started it.

    Attributes:
        number: The worker's number, unique in its executor; those of workers that run calls are counted from 1.
        resources: What its calls need.
        lifetime: How long it lives.
        slot: Its `executorlib_worker_id`.
        places: What it holds on each of its nodes; nodes with more ranks come first.
        calls: Calls handed to it and not over, in the order in which it runs them, or the only call that it is for.
        transport: How to send to it, once it takes messages.
        permits: For a worker that can hold calls which it has not started, once it takes messages.
        pid: Process id, 0 until it is known.
        host: Where it runs.
        stderr: The end of what it wrote to standard error.
        settings: Those of this session's settings (`session.settings`) that it was started with.
        verdict: If we are ending it: the exception for the calls that are lost with it.
        on_gone: Called once it is gone.
    """

    number: int
    resources: Resources
    lifetime: Lifetime = Lifetime.CALL
    slot: int = 0
    places: Sequence[Place] = ()
    calls: Sequence[Call] = ()
    transport: Transport | None = None
    permits: Permits | None = None
    pid: int = 0
    host: str = ""
    stderr: bytearray = field(default_factory=bytearray)
    settings: Mapping[str, Any] = field(default_factory=dict)
    verdict: BaseException | None = None
    on_gone: Callable[[], None] | None = None

    @property
    def busy(self) -> bool:
        """True while it has a call that is not over."""
        return any(not call.over for call in self.calls)


class Events(Waiting, Protocol):
    """The part of the loop that launchers may call."""

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` once at the end of this turn, so that queued messages go out together."""
        ...

    def on_connected(self, process: Process) -> None:
        """The worker can be sent messages through ``process.transport``."""
        ...

    def on_message(self, process: Process, header: list[Any], frames: list[Frame]) -> None:
        """The worker sent a message."""
        ...

    def on_recalled(self, process: Process, numbers: Sequence[int]) -> None:
        """The worker will not start these calls; the answer to `Permits.take_back`."""
        ...

    def on_exit(self, process: Process, end: Exit) -> None:
        """The worker is gone, and all its messages have been delivered."""
        ...

    def on_node_lost(self, name: str) -> None:
        """Nothing more can be started on this node; an `on_exit` follows for each worker there."""
        ...


class Launcher:
    """Starts workers and reports their ends. Optional methods have defaults here."""

    def prepare(self) -> None:
        """Do in advance what the first launch would otherwise have to wait for; by default nothing."""

    def launch(self, process: Process) -> None:
        """Start a worker; `Events.on_connected` or `Events.on_exit` follows, possibly from within this call."""
        raise NotImplementedError

    def setup(self, process: Process) -> dict[str, Any]:
        """Return the settings that make the worker see the user's process as it is now; for `worker.call.set_up`."""
        return {}

    def kill(self, process: Process, signal_number: int) -> None:
        """Signal a worker and everything it started; `Events.on_exit` follows once it is gone, or as good as gone.

        The worker may not have started yet, may have been signalled already, and questions about it may be open.
        """
        raise NotImplementedError

    def resume(self) -> None:
        """Continue the helpers that look after workers if they were suspended; called repeatedly during shutdown."""

    @property
    def busy(self) -> bool:
        """True if the launcher must go on although no call is left, to hand over what it was given."""
        return False

    def detach(self, on_taken: Callable[[], None]) -> None:
        """Let the launched workers go on without us, if they can; by default they end with their executor.

        Args:
            on_taken: Called once nothing more is needed from the calls themselves; no event follows.
        """
        on_taken()

    def close(self) -> None:
        """End everything that was started and not detached, and free all resources; no event follows."""
        raise NotImplementedError


class Timer:
    """Calls back once, at the earliest of the times requested since it last did.

    Args:
        events: The loop.
        callback: The function to call.
    """

    # How early a clock may be, in seconds.
    _EARLY = 0.001

    def __init__(self, events: Events, callback: Callable[[], None]) -> None:
        self._events = events
        self._callback = callback
        self._due: float | None = None

    def within(self, seconds: float) -> None:
        """Call back in this many seconds, unless an earlier time was requested already."""
        due = time.monotonic() + seconds
        if self._due is None or due < self._due:
            self._due = due
            self._events.call_later(seconds, self._fire)

    def _fire(self) -> None:
        # A later time that was requested first still fires, but finds nothing due.
        if self._due is not None and time.monotonic() >= self._due - self._EARLY:
            self._due = None
            self._callback()
