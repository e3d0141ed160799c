"""Decides who may connect: the keys of everything that uses ZeroMQ, how they travel, and who is let in.

Every listening socket has its own CURVE keys (https://rfc.zeromq.org/spec/26/) and makes the one pair of keys by which
it knows its clients. All traffic is encrypted, and both ends prove who they are: libzmq asks about each connection
(ZAP, https://rfc.zeromq.org/spec/27/), and `Door` admits only that key. Clients get what they need through the
environment or a file that nobody else can read, and never on a command line, which every user of a machine can see.
"""

from __future__ import annotations

import contextlib
import json
import os
from typing import Any, NamedTuple  # dataclasses would take a tenth of the start-up time of a worker

import zmq
from zmq.utils import z85

from executorlib.transports import CONNECTION_VARIABLE as CONNECTION_VARIABLE

_ZAP_ENDPOINT = "inproc://zeromq.zap.01"
_DOMAIN = b"executorlib"
# The length of a key in Z85, see RFC 26 and https://rfc.zeromq.org/spec/32/.
_KEY_CHARACTERS = 40


class ClientKeys(NamedTuple):
    """A client's keys, in Z85.

    Attributes:
        server: Public key of the listening socket.
        public: The client's own public key.
        secret: The client's own secret key.
    """

    server: bytes
    public: bytes
    secret: bytes

    def __repr__(self) -> str:
        return f"ClientKeys(server={self.server!r}, public={self.public!r})"

    @classmethod
    def parse(cls, text: str) -> ClientKeys:
        """Read what `dumps` wrote.

        Raises:
            ValueError: The text is something else.
        """
        keys = text.encode().split()
        if len(keys) != 3 or any(len(key) != _KEY_CHARACTERS for key in keys):
            raise ValueError("not three CURVE keys")
        return cls(*keys)

    def dumps(self) -> str:
        """Return the three keys as text, separated by spaces."""
        return b" ".join((self.server, self.public, self.secret)).decode()

    def use(self, sock: zmq.Socket[Any]) -> None:
        """Let a socket use these keys in the connections that it makes from now on."""
        sock.setsockopt(zmq.CURVE_SERVERKEY, self.server)
        sock.setsockopt(zmq.CURVE_PUBLICKEY, self.public)
        sock.setsockopt(zmq.CURVE_SECRETKEY, self.secret)


class Credentials(NamedTuple):
    """The address and keys that a worker needs in order to connect.

    Attributes:
        endpoints: Where the executor may be reached; any of them will do.
        identity: The worker's name, without a dot.
        keys: The keys with which it proves that it is ours.
    """

    endpoints: tuple[str, ...]
    identity: str
    keys: ClientKeys

    @classmethod
    def parse(cls, text: str) -> Credentials:
        """Read what `dumps` wrote.

        Raises:
            ValueError: The text is something else.
        """
        try:
            content = json.loads(text)
            return cls(tuple(content["endpoints"]), content["identity"], ClientKeys.parse(content["keys"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"no credentials of executorlib: {type(error).__name__}: {error}") from None

    def dumps(self) -> str:
        """Return the value for `CONNECTION_VARIABLE`, or the content of a file."""
        return json.dumps({"endpoints": self.endpoints, "identity": self.identity, "keys": self.keys.dumps()})

    @classmethod
    def read(cls, path: str) -> Credentials:
        """Read what `write` wrote.

        Raises:
            OSError: The file cannot be read.
            PermissionError: The file belongs to another user, or others can read or write it.
            ValueError: The file holds something else.
        """
        with open(path, encoding="utf-8") as file:
            _check_private(path, file.fileno())
            return cls.parse(file.read())

    def write(self, path: str) -> None:
        """Write a file that only this user can read (mode 0600).

        Raises:
            FileExistsError: There is a file with that name.
            PermissionError: The file system does not keep others from reading the file.
            OSError: The file cannot be written.
        """
        # Exclusive, so that nobody has it open or has put a link there. The mode is set before the keys are written.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                _check_private(path, descriptor)
                file.write(self.dumps())
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(path)
            raise


def _check_private(path: str, descriptor: int) -> None:
    status = os.fstat(descriptor)
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise PermissionError(
            f"{path} holds keys, but it belongs to user {status.st_uid} and has mode {status.st_mode & 0o777:04o}; it "
            f"must belong to user {os.geteuid()} and have mode 0600. Use a directory on a file system that keeps the "
            "modes of files."
        )


class Door:
    """Keeps strangers out of one listening socket.

    libzmq asks about every connection on `socket`, and `answer` answers. A client is not let in while it waits for
    that. Close the door after the socket that it guards: while that one listens, somebody must be there to ask.

    Args:
        context: The context of the listening socket. A context has room for one door.

    Attributes:
        keys: What a client needs to be let in.
        socket: Readable when there is a question.
    """

    def __init__(self, context: zmq.Context[Any]) -> None:
        public, self._secret = zmq.curve_keypair()
        self.keys = ClientKeys(public, *zmq.curve_keypair())
        self._admitted = z85.decode(self.keys.public)
        self.socket = context.socket(zmq.REP)
        self.socket.bind(_ZAP_ENDPOINT)

    def guard(self, sock: zmq.Socket[Any]) -> None:
        """Let only clients with `keys` connect to a socket. Call this before the socket is bound."""
        sock.setsockopt(zmq.CURVE_SERVER, 1)
        sock.setsockopt(zmq.CURVE_SECRETKEY, self._secret)
        sock.setsockopt(zmq.ZAP_DOMAIN, _DOMAIN)
        # Without this, everybody is let in when there is nobody to ask.
        sock.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)

    def answer(self) -> None:
        """Answer a question, or wait for one."""
        version, request, domain, _, _, mechanism, *credentials = self.socket.recv_multipart()
        known = mechanism == b"CURVE" and domain == _DOMAIN and credentials == [self._admitted]
        status, reason = (b"200", b"OK") if known else (b"400", b"unknown key")
        self.socket.send_multipart([version, request, status, reason, b"", b""])

    def close(self) -> None:
        """Stop answering. Whoever asks from now on is refused."""
        self.socket.close(linger=0)
