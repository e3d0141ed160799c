"""Workers that connect on their own, over ZeroMQ: ranks of MPI worlds, and workers that a scheduler has started.

    launch ─▶ hello ─▶ setup, calls ─▶ results ─▶ stop ─▶ end

A launcher starts one with the credentials for it, and hands on what comes from its connection. What all such workers
have in common is here; how one is started, ended and given up is the launcher's.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from executorlib.errors import describe_split_world
from executorlib.launchers.contract import Events, Process
from executorlib.serialize import Frame
from executorlib.transports.router import Router, RouterTransport
from executorlib.transports.zeromq import SILENCE_SECONDS

# What a worker that has given its only result may take for MPI_Finalize and exit handlers, in seconds.
_FINALIZE_SECONDS = 10.0


def dismiss(router: Router, peer: bytes) -> None:
    """Tell a worker that nobody waits for to end, instead of leaving it to hold what it was given."""
    router.send(peer, ["stop"], [])


class _Transport(RouterTransport):
    """The way to a worker.

    Attributes:
        told_to_stop: When it was, on the monotonic clock.
    """

    told_to_stop: float | None = None

    def put(self, header: Any, frames: Sequence[Frame] = ()) -> int:
        """See `Transport.put`."""
        if header[0] == "stop":
            self.told_to_stop = time.monotonic()
        return super().put(header, frames)


class ConnectingWorker:
    """A worker, from its start to its end.

    Timers hold it weakly: it is over when the launcher lets go of it, and what waits for the worst must keep neither
    the worker nor by that a call and its result.

    Args:
        events: The loop.
        router: Where it connects to.
        process: The worker.
        end: Ends it, in the end by force.
        starter: What starts its ranks, for the error text if these do not find each other.
        advice: What to do then.
        leaves: Whether a worker of one call gives up what it holds with its result, not with its end.

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

    def left_in_silence(self) -> bool:
        """Whether a worker that was told to stop did not, when its connection has ended: it was suspended, say.

        Others close it at once, before they run exit handlers.
        """
        told = None if self._transport is None else self._transport.told_to_stop
        return told is not None and time.monotonic() - told > SILENCE_SECONDS / 2

    def on_message(self, peer: bytes, header: list[Any], frames: list[Frame]) -> None:
        """Take a message of the worker, or of one of its ranks."""
        process, kind = self.process, header[0]
        # The other ranks may wait for a failed one for ever, unless they are known to be through.
        split = kind == "error" and process.resources.cores > 1 and "whole" not in header[4]
        if kind == "hello":
            self._on_hello(peer, header[1])
        elif kind == "log":
            self._events.on_message(process, header, frames)
        elif not process.single:
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
            # Put back into its queue, and up again; the loss of the first is about to be noticed.
            dismiss(self._router, peer)
        elif about["size"] != ranks:
            # As many hellos as there are ranks, since each believes to be the first.
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
        """Its only call is over: let it go."""
        self.done = True
        if split:
            self._end()
        elif self.process.transport is not None:
            # It waits for this: an end that came before the result was read would count as a death.
            self.process.transport.put(["stop"])
            here = weakref.ref(self)

            def give_up() -> None:
                worker = here()
                if worker is not None:
                    worker._end()

            self._events.call_later(_FINALIZE_SECONDS, give_up)
