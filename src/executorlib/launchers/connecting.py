"""Workers that connect by themselves over ZeroMQ: ranks of MPI worlds, and workers that a scheduler starts.

    launch ─▶ hello ─▶ setup, calls ─▶ results ─▶ stop ─▶ end

A launcher starts a worker with the credentials to connect, and passes on the messages from its connection. This module
has what all such workers have in common; the launcher decides how one is started, ended and given up.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from executorlib.errors import describe_split_world
from executorlib.launchers.contract import Events, Lifetime, Process
from executorlib.serialize import Frame
from executorlib.transports.router import Router, RouterTransport
from executorlib.transports.zeromq import SILENCE_SECONDS

# Seconds that a worker may take for MPI_Finalize and exit handlers after its only result.
_FINALIZE_SECONDS = 10.0


def dismiss(router: Router, peer: bytes) -> None:
    """Tell a worker that nobody waits for to end; otherwise it would go on holding its resources."""
    router.send(peer, ["stop"], [])


class _Transport(RouterTransport):
    """The transport to a worker.

    Attributes:
        told_to_stop: When the worker was told to stop, on the monotonic clock.
    """

    told_to_stop: float | None = None

    def put(self, header: Any, frames: Sequence[Frame] = ()) -> int:
        """Append a message, and note the time if it tells the worker to stop."""
        if header[0] == "stop":
            self.told_to_stop = time.monotonic()
        return super().put(header, frames)


class ConnectingWorker:
    """A worker, from its start to its end.

    It is over when the launcher lets go of it. Timers hold it weakly, so that a timeout never keeps a worker, its call
    or a result alive.

    Args:
        events: The loop.
        router: The socket it connects to.
        process: The worker.
        end: Ends the worker, by force as a last resort.
        starter: What starts its ranks, for the error text if they do not find each other.
        advice: What to do in that case.
        leaves: Whether a worker of one call releases its resources with its result rather than when it ends.

    Attributes:
        peer: Its connection, once it has said hello.
        done: Whether its only call is over.
    """

    def __init__(
        self,
        events: Events,
        router: Router,
        process: Process,
        end: Callable[[], None],
        *,
        starter: str,
        advice: str,
        leaves: bool = False,
    ) -> None:
        self._events = events
        self._router = router
        self.process = process
        self._end = end
        self._starter = starter
        self._advice = advice
        self._leaves = leaves
        self._transport: _Transport | None = None
        self.peer: bytes | None = None
        self.done = False

    @property
    def told_to_stop(self) -> bool:
        """True once it was told to stop."""
        return self._transport is not None and self._transport.told_to_stop is not None

    def left_in_silence(self) -> bool:
        """Return whether a connection ended long after its worker was told to stop, as when the worker was suspended.

        Other workers close it at once, before they run exit handlers.
        """
        told = None if self._transport is None else self._transport.told_to_stop
        return told is not None and time.monotonic() - told > SILENCE_SECONDS / 2

    def on_message(self, peer: bytes, header: list[Any], frames: list[Frame]) -> None:
        """Handle a message from the worker, or from one of its ranks."""
        process, kind = self.process, header[0]
        # The other ranks may wait forever for a rank that failed, unless all are known to have come through.
        split = kind == "error" and process.resources.cores > 1 and "whole" not in header[4]
        if kind == "hello":
            self._on_hello(peer, header[1])
        elif kind == "log":
            self._events.on_message(process, header, frames)
        elif process.lifetime is Lifetime.BLOCK:
            self._events.on_message(process, header, frames)
            if split:
                self._end()
        elif kind != "ready" and not self.done:
            if self._leaves:
                header[4]["leaving"] = True
            self._events.on_message(process, header, frames)
            self._finish(split)

    def _on_hello(self, peer: bytes, about: dict[str, Any]) -> None:
        process = self.process
        ranks = process.resources.cores
        if self.peer is not None:
            # The job was requeued and has started again; the loss of its first connection will be noticed soon.
            dismiss(self._router, peer)
        elif about["size"] != ranks:
            # Every rank believes that it is the first of its own world, so each of them sends a hello.
            if process.verdict is None:
                text = describe_split_world(ranks, self._starter, about["size"], about["library"], self._advice)
                process.verdict = RuntimeError(text)
                self._end()
        elif process.verdict is None:
            self.peer = peer
            if not process.pid:
                process.host, process.pid = about["host"], about["pid"]
            process.transport = self._transport = _Transport(self._router, peer)
            self._events.on_connected(process)

    def _finish(self, split: bool) -> None:
        """The worker's only call is over, so let it end."""
        self.done = True
        if split:
            self._end()
        elif self.process.transport is not None:
            # The worker waits for this message: if it ended before its result was read, that would count as a death.
            self.process.transport.put(["stop"])
            here = weakref.ref(self)

            def give_up() -> None:
                worker = here()
                if worker is not None:
                    worker._end()

            self._events.call_later(_FINALIZE_SECONDS, give_up)
