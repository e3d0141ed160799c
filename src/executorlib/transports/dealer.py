"""A worker's end of messages over ZeroMQ. It finds the executor, and notices when the executor is gone.

The executor's machine may have several addresses, and some of them may be out of reach from here. The first is tried,
after a moment all others as well, and the first connection on which the executor lets us in is kept. The executor's key
proves that it is ours, whoever else may listen at such an address and port.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import zmq

from executorlib.serialize import Frame
from executorlib.transports import address
from executorlib.transports.curve import ClientKeys, Credentials
from executorlib.transports.messages import Message
from executorlib.transports.zeromq import (
    CONNECT_SECONDS,
    SILENCE_SECONDS,
    UNCOPIED_BYTES,
    beat,
    milliseconds,
    monitor_of,
    pack,
    read_event,
    unpack,
)

# The time limit of an attempt to reach an address, and the pause after it has failed, in seconds.
_ATTEMPT_SECONDS = 10.0
_PAUSE_SECONDS = 1.0
# How long the first address is tried alone, in seconds. It belongs to the default route and is nearly always the right
# one. Each further address costs both ends an attempt, and each name costs a thread.
_HEAD_START_SECONDS = 0.05
# How often to check for names that have been resolved, in seconds.
_RESOLVE_SECONDS = 0.05
# How long a worker that leaves waits for its last message to be accepted, in seconds.
_LINGER_SECONDS = 30.0

_NO_ANSWER = "no answer"
_NOBODY = "nothing listens there, or it cannot be reached"
# If every address has refused connections for this many seconds, the executor has ended, because it listens until then.
_REFUSED_SECONDS = 3.0
_REFUSED = "it refuses this worker's key"

_ATTEMPT_EVENTS = (
    zmq.EVENT_CONNECTED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_MONITOR_STOPPED
)


class Dealer:
    """A worker's end, which blocks.

    Args:
        credentials: Where the executor is, and the keys.
        name: The worker's identity. The text after a dot distinguishes ranks of one world.
        on_lost: Called in a thread of its own when the connection is lost, whatever the worker is doing then.
        seconds: How long to try to connect.

    Raises:
        ConnectionError: The executor was not reached.
    """

    def __init__(
        self,
        credentials: Credentials,
        name: str,
        on_lost: Callable[[], None] | None = None,
        seconds: float = CONNECT_SECONDS,
    ) -> None:
        self._on_lost = on_lost
        self._context = zmq.Context()
        try:
            attempt = _Search(self._context, credentials, name, seconds).run()
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self._socket = attempt.socket
        self._monitor = attempt.monitor
        self.endpoint = attempt.endpoint
        self._lost = threading.Event()
        self._lost_read, self._lost_write = os.pipe()  # becomes readable when it is set
        self._watcher = threading.Thread(target=self._watch, name="executorlib connection", daemon=True)
        self._watcher.start()

    def _watch(self) -> None:
        """Wait for the end of the connection. No other event matters any more."""
        while True:
            event, _ = read_event(self._monitor)
            if event == zmq.EVENT_MONITOR_STOPPED:
                return
            if event == zmq.EVENT_DISCONNECTED:
                self._lost.set()
                os.write(self._lost_write, b"\0")
                if self._on_lost is not None:
                    self._on_lost()

    def _wait(self, event: int) -> None:
        while not int(self._socket.getsockopt(zmq.EVENTS)) & event:
            ready = dict(zmq.zmq_poll([(self._socket, event), (self._lost_read, zmq.POLLIN)]))
            if self._lost_read in ready and self._socket not in ready:
                raise self._end()

    def _end(self) -> EOFError:
        return EOFError(
            f"the connection to the executor at {self.endpoint} was lost: the executor has ended, or its machine has "
            f"not answered for {SILENCE_SECONDS:g} s."
        )

    def send(self, header: Any, frames: Sequence[Frame] = ()) -> None:
        """Send a message.

        Frames may be read until they have arrived, so nobody may write to them before the executor has answered.

        Raises:
            EOFError: The connection was lost.
        """
        while not self._lost.is_set():
            self._wait(zmq.POLLOUT)
            # The connection may end at this point, and a blocking call would then wait forever.
            with contextlib.suppress(zmq.Again):
                self._socket.send_multipart(pack(header, frames), zmq.NOBLOCK, copy=False)
                return
        raise self._end()

    def receive(self) -> Message:
        """Wait for a message.

        Raises:
            EOFError: The connection was lost.
        """
        while True:
            self._wait(zmq.POLLIN)
            parts = self._socket.recv_multipart(copy=False)
            if len(parts[0]):
                return Message(*unpack(parts), [])

    def take(self) -> Message | None:
        """Return the next message, or None if there is none yet. One of `descriptors` announces the next one.

        Sending may hide that event, so call this after sending.

        Raises:
            EOFError: The connection was lost.
        """
        while int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            parts = self._socket.recv_multipart(copy=False)
            if len(parts[0]):
                return Message(*unpack(parts), [])
        if self._lost.is_set():
            raise self._end()
        return None

    @property
    def descriptors(self) -> tuple[int, int]:
        """Descriptors to wait for, for callers that also wait for other things. Nobody else may read from them."""
        return int(self._socket.getsockopt(zmq.FD)), self._lost_read

    def close(self) -> None:
        """Send what is left, if the executor accepts it in time, and close."""
        self._socket.disable_monitor()
        self._watcher.join()
        self._monitor.close()
        self._socket.close(linger=0 if self._lost.is_set() else milliseconds(_LINGER_SECONDS))
        self._context.term()
        os.close(self._lost_read)
        os.close(self._lost_write)


class _Attempt:
    """Tries to connect to one address, again and again.

    Args:
        context: The worker's context.
        keys: The worker's keys.
        peer: The identity of this connection.
        endpoint: The address.

    Attributes:
        outcome: What has come of it so far.
        failing: Since when no connection has been made, on the monotonic clock; None if the last attempt may make one.
        again: When to try again, on the monotonic clock; 0 during an attempt.
    """

    def __init__(self, context: zmq.Context[Any], keys: ClientKeys, peer: str, endpoint: str) -> None:
        self._context = context
        self._keys = keys
        self._peer = peer.encode()
        self.endpoint = endpoint
        self.outcome = _NO_ANSWER
        self.failing: float | None = None
        self.start()

    def start(self) -> None:
        self.again = 0.0
        sock = self.socket = self._context.socket(zmq.DEALER)
        self._keys.use(sock)
        sock.setsockopt(zmq.ROUTING_ID, self._peer)
        sock.setsockopt(zmq.LINGER, 0)
        sock.setsockopt(zmq.RECONNECT_IVL, -1)
        sock.setsockopt(zmq.HANDSHAKE_IVL, milliseconds(CONNECT_SECONDS))
        sock.copy_threshold = UNCOPIED_BYTES
        if self.endpoint.startswith("tcp:"):
            sock.setsockopt(zmq.IPV6, 1)
            sock.setsockopt(zmq.CONNECT_TIMEOUT, milliseconds(_ATTEMPT_SECONDS))
            beat(sock)
        self.monitor = monitor_of(sock, _ATTEMPT_EVENTS)
        sock.connect(self.endpoint)

    def stop(self) -> None:
        self.socket.disable_monitor()
        self.monitor.close()
        self.socket.close()

    def succeeded(self) -> bool:
        """Process an event, and return True if the executor has let us in."""
        event, _ = read_event(self.monitor)
        if event == zmq.EVENT_CONNECTED:
            self.failing = None
            if self.outcome in (_NO_ANSWER, _NOBODY):  # the outcome of an earlier connection says more
                self.outcome = "connected, but it does not answer"
        elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            self.outcome = _REFUSED
        elif event == zmq.EVENT_CLOSED:
            self.outcome = _NOBODY
            if self.failing is None:
                self.failing = time.monotonic()
            self._pause()
        elif event == zmq.EVENT_DISCONNECTED:
            if self.outcome != _REFUSED:
                self.outcome = "the listener there is not this worker's executor"
            self._pause()
        return bool(event == zmq.EVENT_HANDSHAKE_SUCCEEDED)

    def is_refused(self) -> bool:
        """Return True if the machine at this address answers that nobody listens there. Others may be out of reach."""
        try:
            # An address that is not TCP involves no network, so a failure always means that nobody is there.
            if not self.endpoint.startswith("tcp:"):
                return True
            socket.create_connection(address.split(self.endpoint), _ATTEMPT_SECONDS).close()
        except ConnectionRefusedError:
            return True
        except OSError:
            pass
        self.failing = None  # look again after the same time
        return False

    def _pause(self) -> None:
        self.stop()
        self.again = time.monotonic() + _PAUSE_SECONDS


class _Search:
    """Tries the first endpoint, and after a moment all others at once.

    Args:
        context: The worker's context.
        credentials: Where the executor may be, and the keys.
        name: The worker's identity.
        seconds: How long to try.
    """

    def __init__(self, context: zmq.Context[Any], credentials: Credentials, name: str, seconds: float) -> None:
        self._context = context
        self._keys = credentials.keys
        # The executor identifies connections by these, so each must be new, even if a worker is started again.
        self._peers = f"{name}.{os.urandom(6).hex()}"
        self._seconds = seconds
        self._give_up = time.monotonic() + seconds
        self._attempts: dict[str, _Attempt] = {}
        self._unresolved: dict[str, str] = {}  # endpoints, each with the reason why it is not tried
        self._resolved: queue.SimpleQueue[tuple[str, list[str] | OSError]] = queue.SimpleQueue()
        self._resolving = 0
        self._further = list(credentials.endpoints[1:])
        self._further_at = time.monotonic() + _HEAD_START_SECONDS
        self._try(credentials.endpoints[:1])

    def _try(self, endpoints: Sequence[str]) -> None:
        for endpoint in endpoints:
            if endpoint.startswith("tcp:") and not address.is_numeric(address.split(endpoint)[0]):
                self._resolve(endpoint)
            else:
                self._attempt(endpoint)

    def _try_further(self) -> float:
        """Try the other endpoints once their time has come. Return the seconds until then."""
        left = self._further_at - time.monotonic()
        if not self._further or left > 0:
            return left if self._further else float("inf")
        further, self._further = self._further, []
        self._try(further)
        return float("inf")

    def _attempt(self, endpoint: str) -> None:
        if endpoint not in self._attempts:
            peer = f"{self._peers}.{len(self._attempts)}"
            self._attempts[endpoint] = _Attempt(self._context, self._keys, peer, endpoint)

    def _resolve(self, endpoint: str) -> None:
        """Resolve a name in a thread, because it may take long and libzmq would do nothing else meanwhile."""

        def resolve() -> None:
            try:
                self._resolved.put((endpoint, address.resolve(address.split(endpoint)[0])))
            except OSError as error:
                self._resolved.put((endpoint, error))

        self._resolving += 1
        self._unresolved[endpoint] = "its name was not resolved in time"
        threading.Thread(target=resolve, daemon=True).start()

    def _take_resolved(self) -> None:
        while self._resolving and not self._resolved.empty():
            endpoint, found = self._resolved.get()
            self._resolving -= 1
            if isinstance(found, OSError):
                self._unresolved[endpoint] = f"its name cannot be resolved: {found.strerror}"
                continue
            del self._unresolved[endpoint]
            for each in address.endpoints(address.split(endpoint)[1], found):
                self._attempt(each)

    def run(self) -> _Attempt:
        """Return the attempt that succeeded, or raise what `Dealer` says."""
        while (left := self._give_up - time.monotonic()) > 0:
            self._take_resolved()
            winner = self._wait(min(left, self._try_further()))
            if winner is not None:
                self._stop(winner)
                return winner
            if self._is_refused():
                break
        self._stop(None)
        outcomes = {**{each.endpoint: each.outcome for each in self._attempts.values()}, **self._unresolved}
        tried_for = self._seconds - max(0.0, self._give_up - time.monotonic())
        tried = "; ".join(f"{endpoint} ({outcome})" for endpoint, outcome in outcomes.items())
        raise ConnectionError(
            f"the executor could not be reached from {socket.gethostname()}. Tried for {tried_for:.0f} s: {tried}. "
            "Either it has ended, or its machine cannot be reached from here: check that no firewall keeps this "
            "machine from the ports of that one."
        )

    def _is_refused(self) -> bool:
        """Return True if all addresses answer and nobody listens at any of them any more."""
        if self._resolving or self._further:
            return False
        now = time.monotonic()
        attempts = list(self._attempts.values())
        since = [now if each.failing is None else each.failing for each in attempts]
        return max(since, default=now) <= now - _REFUSED_SECONDS and all(each.is_refused() for each in attempts)

    def _wait(self, left: float) -> _Attempt | None:
        """Wait for an event or the end of a pause. Return the attempt that succeeded, if there is one."""
        if self._resolving:
            left = min(left, _RESOLVE_SECONDS)
        now = time.monotonic()
        for each in self._attempts.values():
            if each.again:
                left = min(left, max(0.0, each.again - now))
                if each.again <= now:
                    each.start()
        running = {each.monitor: each for each in self._attempts.values() if not each.again}
        if not running:
            time.sleep(left)
        for monitor, _ in zmq.zmq_poll([(monitor, zmq.POLLIN) for monitor in running], milliseconds(left)):
            if running[monitor].succeeded():
                return running[monitor]
        return None

    def _stop(self, winner: _Attempt | None) -> None:
        for each in self._attempts.values():
            if each is not winner and not each.again:
                each.stop()
