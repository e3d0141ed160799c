"""The executor's end of relays (`relay.node_side`): sends to the workers behind them and receives their answers.

All messages for workers of one relay in one turn of the loop travel as one, and so do their answers.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from executorlib import serialize
from executorlib.errors import ExecutorlibSocketError
from executorlib.launchers.boot import boot_command
from executorlib.launchers.contract import Events, Exit, Lifetime, Process
from executorlib.serialize import Frame, nbytes
from executorlib.transports.messages import MAPPED_BYTES, Decoder, Message, encode
from executorlib.transports.router import Router


def relay_program(
    *, lifetime: Lifetime, stock: int, preload: Sequence[str], threads: int, given: Mapping[str, Any]
) -> list[str]:
    """The command that runs a relay, which expects its credentials in the environment.

    Args:
        lifetime: As in `LocalLauncher`.
        stock: As in `LocalLauncher`.
        preload: As in `LocalLauncher`.
        threads: As `default_threads` in `LocalLauncher`.
        given: As in `LocalLauncher`.
    """
    environ = {name: value for name, value in os.environ.items() if name.startswith("SLURM_")}
    environ.pop("SLURM_JWT", None)  # no secret belongs on a command line; in a Slurm job the relay has it already
    launcher = {
        "spawn": False,
        "lifetime": lifetime.name,
        "stock": stock,
        "preload": list(preload),
        "default_threads": threads,
        "given": dict(given),
    }
    return boot_command("executorlib.relay.node_side", f"({environ!r}, {launcher!r})")


class RelayEnd:
    """A relay, as the executor sees it.

    Attributes:
        peer: Its connection, once it has said hello.
        processes: Workers behind it, by number.
        recalling: Numbers of workers that were asked to give back calls and have not answered.
        killing: Numbers of workers that we are killing.
        settings: This session's settings that its workers, except ranks, are started with.
        lost: Why nothing is sent to it any more; empty while it is in use.
        parts: Messages to be sent, whose frames are all in `frames`.
    """

    def __init__(self) -> None:
        self.peer: bytes | None = None
        self.processes: dict[int, Process] = {}
        self.recalling: set[int] = set()
        self.killing: set[int] = set()
        self.settings: Mapping[str, Any] = {}
        self.lost = ""
        self.parts: list[list[Any]] = []
        self.frames: list[Frame] = []


# Called with a relay, the number of a worker that ended, the relay's report on that, and the error for its call.
OnExit = Callable[[RelayEnd, int, dict[str, Any], "BaseException | None"], None]


class _RelayTransport:
    """The transport to one worker behind a relay.

    Attributes:
        calls: How many calls were sent.
    """

    def __init__(self, relays: Relays, relay: RelayEnd, number: int) -> None:
        self._relays = relays
        self._relay = relay
        self._number = number
        self.calls = 0

    def put(self, header: Any, frames: Sequence[Frame] = ()) -> int:
        """Append a message to the next one to the relay."""
        self.calls += header[0] == "call"
        self._relays.put(self._relay, self._number, header, frames)
        return sum(map(nbytes, frames))

    def flush(self) -> None:
        """Nothing to do: messages for all workers of a relay go together at the end of the turn."""


class _StreamTransport(_RelayTransport):
    """The transport to a worker that takes many calls, and its permits. It encodes what the relay passes on to it.

    The worker's answers come back in the same way. So a call costs the relay next to nothing, and this process as much
    as a call on one node.

    Attributes:
        broken: Whether the worker's messages can no longer be told apart.
    """

    def __init__(self, relays: Relays, relay: RelayEnd, number: int) -> None:
        super().__init__(relays, relay, number)
        self.broken = False
        self._decoder = Decoder()
        self._put: list[Frame] = []
        self._put_calls = 0

    def put(self, header: Any, frames: Sequence[Frame] = ()) -> int:
        """Encode a message and append it; set-ups and large messages, which need a memory file, go unencoded."""
        size = sum(map(nbytes, frames))
        if header[0] == "setup" or size >= MAPPED_BYTES:
            self.flush()
            return super().put(header, frames)
        pieces, _, _ = encode(header, frames)
        self._put += pieces
        if header[0] == "call":
            self.calls += 1
            self._put_calls += 1
        return size

    def flush(self) -> None:
        """Append the encoded bytes to the next message to the relay."""
        if self._put:
            self._relays.put(self._relay, self._number, ["stream", self._put_calls], [b"".join(self._put)])
            self._put.clear()
            self._put_calls = 0

    def grant(self, numbers: Sequence[int]) -> None:
        """Let the worker start these calls; the relay gives the permits before it passes on any call."""
        self._relays.put(self._relay, self._number, ["grant", numbers])

    def take_back(self, most: int) -> Sequence[int]:
        """Ask for calls; `Events.on_recalled` follows."""
        # Ask one question at a time; otherwise the same calls would be asked for twice.
        if self._number not in self._relay.recalling:
            self._relay.recalling.add(self._number)
            self._relays.put(self._relay, self._number, ["recall", most])
        return ()

    def received(self, errors: Sequence[str], frames: Sequence[Frame]) -> list[Message]:
        """Accept a piece of the worker's stream; returns the messages that are complete."""
        return self._decoder.feed_passed(errors, frames)


class Relays:
    """Sends to relays, and passes on what they send.

    Args:
        events: The loop.
        router: The socket that they connect to.
        lifetime: How long workers live.
        on_exit: Called when a worker has ended; it must call `conclude`, unless it knows better what happened.
    """

    def __init__(self, events: Events, router: Router, lifetime: Lifetime, on_exit: OnExit) -> None:
        self._events = events
        self._router = router
        self._lifetime = lifetime
        self._on_exit = on_exit
        self._dirty: dict[RelayEnd, None] = {}

    def start(self, relay: RelayEnd, process: Process) -> None:
        """Have a connected relay start a worker."""
        number = process.number
        resources = process.resources
        relay.processes[number] = process
        if resources.cores == 1:
            process.settings = relay.settings
        if self._lifetime is Lifetime.BLOCK and resources.cores == 1:
            process.transport = process.permits = _StreamTransport(self, relay, number)
        else:
            process.transport = _RelayTransport(self, relay, number)
        self.put(relay, number, ["start", {"resources": resources.sent, "single": process.lifetime is Lifetime.CALL}])
        self._events.on_connected(process)

    def kill(self, relay: RelayEnd, number: int, signal_number: int) -> None:
        """Signal a worker and everything it started."""
        relay.killing.add(number)
        self.put(relay, number, ["kill", signal_number])

    def put(self, relay: RelayEnd, number: int, header: list[Any], frames: Sequence[Frame] = ()) -> None:
        """Append a message to what is sent to the relay at the end of this turn."""
        if not self._dirty:
            self._events.call_soon(self._send)
        self._dirty[relay] = None
        relay.parts.append([number, header, len(frames)])
        relay.frames += frames

    def _send(self) -> None:
        dirty, self._dirty = self._dirty, {}
        for relay in dirty:
            parts, frames = relay.parts, relay.frames
            relay.parts, relay.frames = [], []
            if relay.peer is not None and not relay.lost:
                self._router.send(relay.peer, ["do", parts], frames)

    # -- what comes back ------------------------------------------------------------------------------------------

    def on_done(self, relay: RelayEnd, parts: Sequence[list[Any]], frames: Sequence[Frame]) -> None:
        """Handle a relay's message, ``["done", parts]`` with frames."""
        position = 0
        for number, header, count in parts:
            self._on_part(relay, number, header, list(frames[position : position + count]))
            position += count

    def _on_part(self, relay: RelayEnd, number: int, header: list[Any], frames: list[Frame]) -> None:
        process = relay.processes.get(number)
        if process is None:
            return
        if header[0] == "stream":
            self._on_stream(relay, process, header[1], frames)
        elif header[0] == "recalled":
            relay.recalling.discard(number)
            self._events.on_recalled(process, header[1])
        elif header[0] == "exit":
            self._on_exit(relay, number, header[1], serialize.loads(frames) if frames else None)
        else:
            self._events.on_message(process, header, frames)

    def conclude(self, relay: RelayEnd, number: int, about: dict[str, Any], error: BaseException | None) -> None:
        """Tell the loop that a worker has ended, as its relay reported."""
        process = relay.processes.pop(number)
        relay.recalling.discard(number)
        relay.killing.discard(number)
        process.pid = about["pid"]
        process.stderr += about["stderr"].encode()
        # Calls that were still travelling are the last ones.
        calls = process.calls
        on_the_way = cast(_RelayTransport, process.transport).calls - about["handed"]
        unstarted = [*about["unstarted"], *(task.number for task in calls[len(calls) - on_the_way :])]
        self._events.on_exit(process, Exit(about["status"], about["text"], error, unstarted=unstarted))

    def _on_stream(self, relay: RelayEnd, process: Process, errors: list[str], frames: list[Frame]) -> None:
        transport = cast(_StreamTransport, process.transport)
        if transport.broken:
            return
        try:
            messages = transport.received(errors, frames)
        except (ValueError, IndexError):
            transport.broken = True
            process.verdict = process.verdict or ExecutorlibSocketError(
                f"A worker process on {process.host} sent data that cannot be read, so it was killed: its call wrote "
                "into the file descriptor of its connection."
            )
            self.kill(relay, process.number, signal.SIGKILL)
            return
        for message in messages:
            if message.error is not None:
                _, number, seconds, text, more = message.header
                text += "the result of the call could not be received on its node"
                header = ["error", number, seconds, text, more]
                self._events.on_message(process, header, serialize.dumps(message.error))
            else:
                self._events.on_message(process, message.header, message.frames)
