"""The executor accepts messages only from its own processes."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import marked_processes
from contract.functions import Gate, add, put

WAIT = 40
pytestmark = [pytest.mark.linux, pytest.mark.rows(single_node=True)]

# The start of every ZeroMQ (ZMTP 3.0) connection: signature, version, mechanism, as-server, filler.
GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
# ... and a READY command that says that this is a DEALER.
READY = b"\x04\x1a\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"


class Exploit:
    """A pickle that leaves a trace where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return put, (str(self.path),)


def own_sockets(own_only: bool) -> set[str]:
    """The inodes of all sockets of this process and, if wanted, of what it started."""
    found = set()
    for pid in [os.getpid(), *([] if own_only else marked_processes())]:
        with contextlib.suppress(OSError):
            for name in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    target = os.readlink(f"/proc/{pid}/fd/{name}")
                    if target.startswith("socket:"):
                        found.add(target[8:-1])
    return found


def listening(own_only: bool = False) -> list[tuple[int, Any]]:
    """Family and address of every socket of ours that takes connections."""
    own, found = own_sockets(own_only), []
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split(maxsplit=7)
        if int(fields[3], 16) & 0x10000 and fields[6] in own:
            path = fields[7]
            found.append((socket.AF_UNIX, "\0" + path[1:] if path.startswith("@") else path))
    for family, table in ((socket.AF_INET, "tcp"), (socket.AF_INET6, "tcp6")):
        path = Path(f"/proc/net/{table}")
        for line in path.read_text().splitlines()[1:] if path.exists() else ():
            fields = line.split()
            if fields[3] == "0A" and fields[9] in own:
                port = int(fields[1].rpartition(":")[2], 16)
                host = "127.0.0.1" if family == socket.AF_INET else "::1"
                found.append((family, (host, port)))
    return found


def attempts(path: Path) -> list[bytes]:
    """Messages that strangers send."""
    exploit = pickle.dumps(Exploit(path))
    header = json.dumps({"type": "result", "task": 1, "worker": 1}).encode()
    frames = b"".join(
        (b"\x01" if more else b"\x00") + bytes([len(body)]) + body
        for body, more in ((b"", True), (header, True), (exploit, False))
    )
    return [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        bytes(range(256)) * 64,
        b"\xff" * 100_000,
        exploit,
        GREETING[:20],
        GREETING + READY + frames,
        GREETING.replace(b"NULL", b"CURVE"[:4]) + READY + frames,
        GREETING.replace(b"NULL\0", b"CURVE") + bytes(200),
    ]


def bother(family: int, address: Any, path: Path) -> None:
    """Connect with everything a stranger may think of, and with real clients without a key."""
    for data in attempts(path):
        with socket.socket(family, socket.SOCK_STREAM) as stranger:
            stranger.settimeout(0.2)
            with contextlib.suppress(OSError):
                stranger.connect(address)
                stranger.sendall(data)
                stranger.recv(1000)


def bother_with_zmq(family: int, address: Any, path: Path) -> None:
    import zmq

    if family == socket.AF_INET6:
        return
    url = f"tcp://{address[0]}:{address[1]}" if family == socket.AF_INET else f"ipc://{address}"
    context = zmq.Context()
    try:
        for own_key in (False, True):
            with context.socket(zmq.DEALER) as client:
                client.linger = 0
                client.rcvtimeo = 300
                if own_key:
                    client.curve_publickey, client.curve_secretkey = zmq.curve_keypair()
                    client.curve_serverkey = zmq.curve_keypair()[0]
                client.connect(url)
                client.send_multipart([b"", b"{}", pickle.dumps(Exploit(path))], zmq.NOBLOCK)
                with pytest.raises(zmq.Again):
                    client.recv_multipart()
    finally:
        context.term()


def test_no_socket_is_open_on_one_node(make_executor: Callable[..., Any], gate: Callable[..., Gate]) -> None:
    """The processes here use channels to which nobody can connect."""
    held = gate()
    before = listening()
    with make_executor() as executor:
        future = executor.submit(held, 1)
        held.pid()
        assert [each for each in listening() if each not in before] == []
        held.open()
        assert future.result(WAIT) == 1


@pytest.mark.mpi
@pytest.mark.rows("fork")
def test_strangers_at_the_ranks_door(
    make_executor: Callable[..., Any], gate: Callable[..., Gate], tmp_path: Path
) -> None:
    """This is about the executor's socket for ranks, not about MPI's own sockets."""
    held = gate()
    trace = tmp_path / "the exploit ran"
    before = listening(own_only=True)
    with make_executor(max_cores=3) as executor:
        future = executor.submit(held, 1, resource_dict={"cores": 2})
        held.pids(2)
        doors = [each for each in listening(own_only=True) if each not in before]
        assert doors, "ranks connect back, so something must listen"
        for family, address in doors:
            bother(family, address, trace)
            bother_with_zmq(family, address, trace)
        assert executor.submit(add, 1, 2).result(WAIT) == 3
        held.open()
        assert future.result(WAIT) == [1, 1]
        assert executor.submit(add, 1, 2, resource_dict={"cores": 2}).result(WAIT) == [3, 3]
    assert not trace.exists()


@pytest.mark.mpi
@pytest.mark.rows("fork")
def test_directories_of_sockets_are_private(make_executor: Callable[..., Any], gate: Callable[..., Gate]) -> None:
    held = gate()
    before = listening(own_only=True)
    with make_executor(max_cores=2) as executor:
        future = executor.submit(held, 1, resource_dict={"cores": 2})
        held.pids(2)
        for family, address in listening(own_only=True):
            if (family, address) not in before and family == socket.AF_UNIX:
                assert not str(address).startswith("\0"), "anyone may connect to abstract names"
                assert os.stat(os.path.dirname(address)).st_mode & 0o077 == 0
        held.open()
        assert future.result(WAIT) == [1, 1]


@pytest.mark.mpi
@pytest.mark.rows("fork")
def test_keys_are_not_on_command_lines(make_executor: Callable[..., Any], gate: Callable[..., Gate]) -> None:
    """Every user of the machine can read command lines. A CURVE key is 40 characters of Z85."""
    key = re.compile(rb"(?<![!-~])[0-9A-Za-z.\-:+=^!*?&<>()\[\]{}@%$#]{40}(?![!-~])")
    held = gate()
    with make_executor(max_cores=2) as executor:
        future = executor.submit(held, 1, resource_dict={"cores": 2})
        held.pids(2)
        for pid in marked_processes():
            with contextlib.suppress(FileNotFoundError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
                assert not key.search(command), command
        held.open()
        assert future.result(WAIT) == [1, 1]
