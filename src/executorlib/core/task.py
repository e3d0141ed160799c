"""The record of one call, from submission to result, and the states that it may pass through."""

from __future__ import annotations

import enum
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from executorlib.errors import refuse_future
from executorlib.futures.lean import LeanFuture
from executorlib.resources import Demand, Resources

if TYPE_CHECKING:
    from executorlib.keys.fingerprint import Key


class State(enum.IntEnum):
    """The progress of a call."""

    WAITING = 0  # for its input futures
    READY = 1  # for resources
    LAUNCHING = 2  # has resources; its worker is being started
    RUNNING = 3  # handed to a worker
    DONE = 4
    FAILED = 5
    CANCELLED = 6


WAITING, READY, LAUNCHING, RUNNING = State.WAITING, State.READY, State.LAUNCHING, State.RUNNING
DONE, FAILED, CANCELLED = State.DONE, State.FAILED, State.CANCELLED

LEGAL_MOVES: dict[State, frozenset[State]] = {
    # WAITING → DONE: found in the cache. RUNNING → READY: a worker gave it back before starting it.
    WAITING: frozenset({READY, DONE, FAILED, CANCELLED}),
    READY: frozenset({LAUNCHING, RUNNING, FAILED, CANCELLED}),
    LAUNCHING: frozenset({RUNNING, READY, FAILED, CANCELLED}),
    RUNNING: frozenset({READY, DONE, FAILED, CANCELLED}),
    DONE: frozenset(),
    FAILED: frozenset(),
    CANCELLED: frozenset(),
}


# The same as bit masks: a call changes its state four times, and the scheduler has ten microseconds for all its work.
_LEGAL = tuple(sum(1 << target for target in LEGAL_MOVES[state]) for state in State)


class CallFuture(LeanFuture[Any]):
    """The future of a submitted call; cancelling it tells the executor at once."""

    _on_cancel: Callable[[], None] | None = None
    _stored: Any = None  # see `futures.inputs.Stored`
    _failed_call = ""  # the name of the call, once it has failed

    def cancel(self) -> bool:
        """Cancel the call if it has not started, as `concurrent.futures.Future.cancel` does."""
        notify = self._on_cancel
        try:
            return super().cancel()
        finally:
            # Even if one of the callbacks raised.
            if notify is not None and self.cancelled():
                notify()

    __reduce__ = refuse_future

    def _abandon(self) -> None:
        """Cancel this future even if the call is running: it goes on, but nobody here waits for it."""
        self._on_cancel = None
        with self._condition:
            if self._state == "RUNNING":
                self._state = "PENDING"
        try:
            super().cancel()
        finally:
            if self.cancelled():
                self.set_running_or_notify_cancel()


class Task:
    """A call and all that is known about it.

    Attributes:
        number: Position in the order of submission, unique in its executor; 1 is the first.
        fn, args, kwargs: The call; released once it is over.
        future: The future that `submit` returned.
        resources: What the call needs.
        demand: What it takes from the ledger.
        missing: Number of input futures that are not done yet or, for calls that become jobs, not launched.
        dependents: Calls that become jobs and wait for this one to be launched.
        after: Files of results that the call reads when it starts.
        cache_path: File of its cache entry, once it was looked up.
        key: The key that names its entry; None if the user named it.
        announced: Whether the future was told that the call runs or is cancelled, which may be done only once.
        state: Current state; only `move` changes it.
    """

    __slots__ = (
        "after",
        "announced",
        "args",
        "cache_path",
        "demand",
        "dependents",
        "fn",
        "future",
        "key",
        "kwargs",
        "missing",
        "number",
        "resources",
        "state",
    )

    def __init__(
        self,
        number: int,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        future: Future[Any],
        resources: Resources,
        demand: Demand,
        missing: int = 0,
    ) -> None:
        self.number = number
        self.fn: Callable[..., Any] | None = fn
        self.args = args
        self.kwargs = kwargs
        self.future = future
        self.resources = resources
        self.demand = demand
        self.missing = missing
        self.dependents: list[Task] | None = None
        self.after: tuple[str, ...] = ()
        self.cache_path: str | None = None
        self.key: Key | None = None
        self.announced = False
        self.state = WAITING

    def move(self, state: State) -> None:
        """Change the state.

        Raises:
            RuntimeError: The move is not legal, which is a bug of the caller.
        """
        if not _LEGAL[self.state] >> state & 1:
            raise RuntimeError(f"{self}: illegal move to {state.name}")
        self.state = state

    def release(self) -> None:
        """Drop the references to the function and its inputs."""
        self.fn = None
        self.args = ()
        self.kwargs = {}

    @property
    def over(self) -> bool:
        """True if the call has ended, in whatever way."""
        return self.state > RUNNING

    @property
    def name(self) -> str:
        """The function's name, for messages."""
        return function_name(self.fn)

    def __repr__(self) -> str:
        return f"<call {self.number} of {self.name}, {self.state.name.lower()}>"


def function_name(fn: object) -> str:
    """Name a callable for messages: its qualified name, or that of its type."""
    wrapped = getattr(fn, "func", None)  # functools.partial
    if callable(wrapped):
        return f"partial of {function_name(wrapped)}"
    name = getattr(fn, "__qualname__", None) or getattr(fn, "__name__", None)
    return str(name or type(fn).__qualname__)
