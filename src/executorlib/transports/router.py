"""The executor's end of messages over ZeroMQ: one socket for all workers that connect on their own.

These workers are ranks of MPI worlds and workers on other nodes; their end is `transports.dealer`. On one node they
meet at a Unix socket in a directory of mode 0700, between nodes at a TCP port chosen by the system.

libzmq reports the end of a connection only by its descriptor. Messages carry the descriptor as well, so a peer's first
message shows which one is its own. But the connection may have ended before that message was read, and the descriptor
may belong to another connection by then. So a little later the peer is sent nothing, which fails if it is gone.
"""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import zmq

from executorlib.serialize import Frame, nbytes
from executorlib.transports import address
from executorlib.transports.curve import Credentials, Door
from executorlib.transports.zeromq import (
    CONNECT_SECONDS,
    NOTHING,
    UNCOPIED_BYTES,
    beat,
    milliseconds,
    monitor_of,
    pack,
    read_event,
    unpack,
)

if TYPE_CHECKING:
    from executorlib.poller import Waiting

# The name of the Unix socket in its directory.
_SOCKET = "router"
# The queue for connections of workers that come at the same moment. The system's own limit applies as well.
_BACKLOG = 4096
# The most messages to read in one turn of the loop, and the pause after them, in seconds, for the loop's other work.
_MESSAGES_A_TURN = 100
_REST_SECONDS = 0.001
# When to check if a new peer is still there, in seconds. By then libzmq's thread has long told the socket.
_CHECK_SECONDS = 1.0


def worker_of(peer: bytes) -> str:
    """Return the identity in a peer's credentials."""
    return peer.partition(b".")[0].decode()


class Router:
    """The executor's socket for workers that connect on their own.

    Args:
        events: The loop.
        on_message: Called with a peer, header and frames. A peer is a connection: a worker that is started again with
            the same credentials is another peer, and `worker_of` tells whose it is.
        on_lost: Called with a peer that has sent messages and whose connection has ended because the peer left, died or
            went silent. Everything that it sent has been delivered before.
        tcp: Whether workers on other nodes can connect. If not, only those on this node can.
        interfaces: Addresses of this machine to listen at; by default all.
        hostname_localhost: Whether to listen on the loopback interface only.

    Attributes:
        endpoints: Where it may be reached.
        directory: The directory of its Unix socket, which is private to this user and removed at the end; empty if
            there is none.

    Raises:
        OSError: It cannot listen there.
    """

    def __init__(
        self,
        events: Waiting,
        on_message: Callable[[bytes, Any, list[Frame]], None],
        on_lost: Callable[[bytes], None] | None = None,
        *,
        tcp: bool = False,
        interfaces: Sequence[str] = (),
        hostname_localhost: bool = False,
    ) -> None:
        self._events = events
        self._on_message = on_message
        self._on_lost = on_lost
        self._descriptors: dict[bytes, int] = {}
        # The reverse. If a descriptor has several peers, all but one are gone, and checks will reveal it.
        self._peers: dict[int, set[bytes]] = {}
        self._lost: deque[bytes] = deque()
        self._resting = False
        self.directory = ""
        self._context = zmq.Context()
        self._door = Door(self._context)
        self._socket = self._context.socket(zmq.ROUTER)
        self._door.guard(self._socket)
        # A message for a peer that is gone raises an error instead of being dropped silently.
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.BACKLOG, _BACKLOG)
        self._socket.copy_threshold = UNCOPIED_BYTES
        self._monitor = monitor_of(self._socket, zmq.EVENT_DISCONNECTED)
        try:
            if tcp:
                hosts = [address.LOOPBACK] if hostname_localhost else list(interfaces)
                self.endpoints = self._listen(hosts)
            else:
                self.directory = address.socket_directory(_SOCKET)
                self.endpoints = [f"ipc://{self.directory}/{_SOCKET}"]
                self._socket.bind(self.endpoints[0])
        except BaseException:
            self._close()
            raise
        for sock in (self._door.socket, self._socket, self._monitor):
            events.watch(sock, self._on_readable)

    def _listen(self, hosts: Sequence[str]) -> list[str]:
        self._socket.setsockopt(zmq.IPV6, 1)  # both; without IPv6, libzmq uses IPv4
        # A stranger that says nothing is dropped after this time, and a worker waits that long for a busy loop.
        self._socket.setsockopt(zmq.HANDSHAKE_IVL, milliseconds(CONNECT_SECONDS))
        beat(self._socket)
        if not hosts:
            return address.endpoints(self._bind("*"))
        return [endpoint for host in hosts for endpoint in address.endpoints(self._bind(host), [host])]

    def _bind(self, host: str) -> int:
        try:
            self._socket.bind(f"tcp://[{host}]:*" if ":" in host else f"tcp://{host}:*")
        except zmq.ZMQError as error:
            raise OSError(
                error.errno, f"cannot listen at {host}, which must be an address of this machine: {error.strerror}"
            ) from None
        return address.split(self._socket.getsockopt_string(zmq.LAST_ENDPOINT))[1]

    def credentials(self, identity: str) -> Credentials:
        """Return what a worker needs in order to connect.

        Args:
            identity: The worker's name, without a dot.
        """
        return Credentials(tuple(self.endpoints), identity, self._door.keys)

    def send(self, peer: bytes, header: Any, frames: Sequence[Frame]) -> None:
        """Send a message. One to a peer that is gone is dropped, because the peer's end is reported anyway.

        Frames may be read until they have arrived, so nobody may write to them.
        """
        self._send([peer, *pack(header, frames)])

    def _send(self, parts: list[Frame]) -> None:
        try:
            self._socket.send_multipart(parts, zmq.NOBLOCK, copy=False)
        except zmq.ZMQError as error:
            # EHOSTUNREACH: the peer is gone. EAGAIN: a thousand messages wait for it (SNDHWM), so it will never answer.
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            self._lose(bytes(parts[0]))
        # Sending may swallow the edge that would have announced a message to read.
        self._events.call_later(0.0, self._on_readable)

    def _on_readable(self) -> None:
        # The descriptor of a ZeroMQ socket only says, once, that something may have changed. So read until nothing is
        # left, or come back later, because the loop has other work.
        if self._resting:
            return
        for _ in range(_MESSAGES_A_TURN):
            if self._context.closed:
                return
            self._note_losses()
            if int(self._door.socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                self._door.answer()
            elif int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                peer, *parts = self._socket.recv_multipart(copy=False)
                # Connections that ended before this message came also ended before its own took over their descriptor.
                self._note_losses()
                self._meet(peer.bytes, int(parts[0].get(zmq.SRCFD)))
                header, frames = unpack(parts)
                self._on_message(peer.bytes, header, frames)
            elif self._lost:
                lost = self._lost.popleft()
                if self._on_lost is not None:
                    self._on_lost(lost)
            else:
                return
        self._resting = True
        self._events.call_later(_REST_SECONDS, self._go_on)

    def _go_on(self) -> None:
        self._resting = False
        self._on_readable()

    def _meet(self, peer: bytes, descriptor: int) -> None:
        if peer not in self._descriptors and peer not in self._lost:
            self._descriptors[peer] = descriptor
            self._peers.setdefault(descriptor, set()).add(peer)
            self._check_later(peer)

    def _note_losses(self) -> None:
        while int(self._monitor.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            _, descriptor = read_event(self._monitor)
            peers = list(self._peers.get(descriptor, ()))
            for peer in peers:
                if len(peers) == 1:
                    self._lose(peer)
                else:
                    self._check_later(peer)

    def _check_later(self, peer: bytes) -> None:
        self._events.call_later(_CHECK_SECONDS, lambda: self._check(peer))

    def _check(self, peer: bytes) -> None:
        if peer in self._descriptors and not self._context.closed:
            self._send([peer, NOTHING])

    def _lose(self, peer: bytes) -> None:
        descriptor = self._descriptors.pop(peer, None)
        if descriptor is not None:
            self._peers[descriptor].discard(peer)
            if not self._peers[descriptor]:
                del self._peers[descriptor]
            self._lost.append(peer)

    def read(self) -> None:
        """Process what has arrived, as the loop does by itself until it ends."""
        self._resting = False
        self._on_readable()

    def close(self) -> None:
        """Close the sockets, drop what was not sent, and remove the directory."""
        if self._context.closed:
            return
        for sock in (self._socket, self._monitor, self._door.socket):
            self._events.unwatch(sock)
        self._close()

    def _close(self) -> None:
        self._socket.disable_monitor()
        self._socket.close(linger=0)
        self._monitor.close(linger=0)
        self._door.close()
        self._context.term()
        if self.directory:
            shutil.rmtree(self.directory, ignore_errors=True)


class RouterTransport:
    """The way to one peer of a router."""

    def __init__(self, router: Router, peer: bytes) -> None:
        self._router = router
        self._peer = peer

    def put(self, header: Any, frames: Sequence[Frame] = ()) -> int:
        """Send a message at once, and return the bytes of its payload."""
        self._router.send(self._peer, header, frames)
        return sum(map(nbytes, frames))

    def flush(self) -> None:
        """Do nothing, because `put` sends at once."""
