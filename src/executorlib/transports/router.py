"""Messages over ZeroMQ, for workers that connect on their own: the ranks of an MPI world.

A ROUTER in the executor, a DEALER in every worker, CURVE between them: all traffic is encrypted, and only who holds the
one client key that was made for this executor is let in (ZAP, RFC 27). The key travels by environment. Frames on the
wire: header as JSON, then the payload's frames.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import zmq
import zmq.utils.z85

from executorlib.serialize import Frame
from executorlib.transports.messages import Message

if TYPE_CHECKING:
    from executorlib.launchers.base import Events

# Name of the environment variable through which a worker learns how to connect.
CONNECTION_VARIABLE = "EXECUTORLIB_CONNECTION"

# https://rfc.zeromq.org/spec/27/
_ZAP_ENDPOINT = "inproc://zeromq.zap.01"
_ZAP_DOMAIN = "executorlib"


class Router:
    """The executor's socket for workers of this node that connect on their own.

    Args:
        events: The loop.
        on_message: Called with a peer's identity, header and frames.
    """

    def __init__(self, events: Events, on_message: Callable[[bytes, Any, list[Frame]], None]) -> None:
        self._events = events
        self._on_message = on_message
        # mkdtemp makes it accessible to this user alone (mode 0700).
        self._directory = tempfile.mkdtemp(prefix="executorlib-")
        self._context = zmq.Context()
        self._public, secret = zmq.curve_keypair()
        self._client_public, self._client_secret = zmq.curve_keypair()
        self._zap = self._context.socket(zmq.REP)
        self._zap.bind(_ZAP_ENDPOINT)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.curve_server = True
        self._socket.curve_secretkey = secret
        self._socket.zap_domain = _ZAP_DOMAIN.encode()
        # A send never blocks: the queue has no bound but memory, and a peer that is gone is an error, not a wait.
        self._socket.sndhwm = 0
        self._socket.rcvhwm = 0
        self._socket.router_mandatory = True
        self._endpoint = f"ipc://{self._directory}/router"
        self._socket.bind(self._endpoint)
        events.watch(self._zap, self._on_readable)
        events.watch(self._socket, self._on_readable)

    def credentials(self, identity: str) -> str:
        """The value of `CONNECTION_VARIABLE` for one worker."""
        return json.dumps(
            {
                "endpoint": self._endpoint,
                "identity": identity,
                "server_key": self._public.decode(),
                "public_key": self._client_public.decode(),
                "secret_key": self._client_secret.decode(),
            }
        )

    def send(self, identity: bytes, header: Any, frames: Sequence[Frame]) -> None:
        """Send a message; one to a peer that is gone is dropped, its exit is an event of its own."""
        with contextlib.suppress(zmq.ZMQError):
            self._socket.send_multipart([identity, json.dumps(header).encode(), *frames], zmq.NOBLOCK)
        # Sending may swallow the edge that would have told of a message to read.
        self._events.call_later(0.0, self._on_readable)

    def _on_readable(self) -> None:
        # The descriptor of a ZeroMQ socket only says that something may have changed, once: read until nothing is left.
        while not self._context.closed:
            if int(self._zap.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                self._authenticate(self._zap.recv_multipart())
            elif int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                identity, header, *frames = self._socket.recv_multipart(copy=False)
                self._deliver(identity.bytes, header.bytes, [frame.buffer for frame in frames])
            else:
                return

    def _deliver(self, identity: bytes, header: bytes, frames: list[Frame]) -> None:
        self._on_message(identity, json.loads(header), [bytearray(frame) for frame in frames])

    def _authenticate(self, request: list[bytes]) -> None:
        version, request_id, domain, _, _, mechanism, *credentials = request
        known = (
            mechanism == b"CURVE"
            and domain == _ZAP_DOMAIN.encode()
            and len(credentials) == 1
            and zmq.utils.z85.encode(credentials[0]) == self._client_public
        )
        status, text = (b"200", b"OK") if known else (b"400", b"unknown key")
        self._zap.send_multipart([version, request_id, status, text, b"", b""])

    def close(self) -> None:
        """Close the sockets, drop what was not sent, remove the directory."""
        for sock in (self._socket, self._zap):
            self._events.unwatch(sock)
            sock.close(linger=0)
        self._context.term()
        shutil.rmtree(self._directory, ignore_errors=True)


class RouterTransport:
    """The way to one peer of a router."""

    def __init__(self, router: Router, identity: bytes) -> None:
        self._router = router
        self._identity = identity

    def put(self, header: Any, frames: Sequence[Frame] = ()) -> int:
        """See `Transport.put`; it is on its way at once."""
        self._router.send(self._identity, header, frames)
        return sum(frame.nbytes if isinstance(frame, memoryview) else len(frame) for frame in frames)

    def flush(self) -> None:
        """See `Transport.flush`."""

    def close(self) -> None:
        """See `Transport.close`."""


class Dealer:
    """A worker's end; it blocks.

    Args:
        credentials: The value of `CONNECTION_VARIABLE`.
        rank: Distinguishes the ranks of one world.
    """

    def __init__(self, credentials: str, rank: int) -> None:
        options = json.loads(credentials)
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.curve_serverkey = options["server_key"].encode()
        self._socket.curve_publickey = options["public_key"].encode()
        self._socket.curve_secretkey = options["secret_key"].encode()
        self._socket.identity = f"{options['identity']}.{rank}".encode()
        self._socket.connect(options["endpoint"])

    def send(self, header: Any, frames: Sequence[Frame] = ()) -> None:
        """Send a message."""
        self._socket.send_multipart([json.dumps(header).encode(), *frames])

    def receive(self) -> Message:
        """Wait for a message."""
        header, *frames = self._socket.recv_multipart()
        return Message(json.loads(header), [bytearray(frame) for frame in frames], [])

    def close(self) -> None:
        """Send what is left, then close."""
        self._socket.close(linger=-1)
        self._context.term()
