"""Messages over ZeroMQ with real sockets: both ends, strangers, several addresses, and lost connections."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import zmq

from conftest import Scripts, end_group
from contract.functions import alive, put, wait_for, wait_until_gone
from executorlib import serialize
from executorlib.launchers.contract import Events
from executorlib.transports import address, curve, dealer, router, zeromq
from executorlib.transports.curve import ClientKeys, Credentials
from executorlib.transports.dealer import Dealer
from executorlib.transports.router import Router, RouterTransport, worker_of
from executorlib.worker import remote

WAIT = 20.0
linux = pytest.mark.linux  # where all of 127.0.0.0/8 is this machine


@pytest.fixture(autouse=True, scope="module")
def _collector() -> None:
    """pyzmq's thread, which stays once large memory was sent, is there before threads are counted."""
    context = zmq.Context()
    ours, theirs = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    ours.bind("inproc://collector")
    theirs.connect("inproc://collector")
    ours.send(bytes(zeromq.UNCOPIED_BYTES), copy=False)
    theirs.recv()
    context.destroy(linger=0)


class Bench(Events):
    """A loop that turns while a test waits, and keeps what comes."""

    def __init__(self) -> None:
        self.messages: list[tuple[bytes, Any, list[Any]]] = []
        self.lost: list[bytes] = []
        self.routers: list[Router] = []
        self._threads = ThreadPoolExecutor(8)
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()

    def watch(self, fileobj: Any, callback: Callable[[], None]) -> None:
        self._callbacks[fileobj.fileno()] = callback

    def unwatch(self, fileobj: Any) -> None:
        del self._callbacks[fileobj.fileno()]

    def call_later(self, seconds: float, callback: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._count), callback))

    def turn(self) -> None:
        poll = select.poll()
        for fd in self._callbacks:
            poll.register(fd, select.POLLIN)
        for fd, _ in poll.poll(5):
            self._callbacks[fd]()
        while self._timers and self._timers[0][0] <= time.monotonic():
            heapq.heappop(self._timers)[2]()

    def until(self, condition: Callable[[], Any], seconds: float = WAIT) -> None:
        give_up = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < give_up, f"not so after {seconds:g} s: {self.messages}, {self.lost}"
            self.turn()

    def run(self, function: Callable[[], Any]) -> Any:
        """Call a function in a thread while the loop turns."""
        future = self._threads.submit(function)
        self.until(future.done)
        return future.result()

    def router(self, **kwargs: Any) -> Router:
        def on_message(*message: Any) -> None:
            self.messages.append(message)

        self.routers.append(Router(self, on_message, self.lost.append, **kwargs))
        return self.routers[-1]

    def connect(self, credentials: Credentials, name: str = "1.0", **kwargs: Any) -> Dealer:
        made: Dealer = self.run(lambda: Dealer(credentials, name, **kwargs))
        return made

    def next(self) -> tuple[bytes, Any, list[Any]]:
        self.until(lambda: self.messages)
        return self.messages.pop(0)

    def close(self) -> None:
        for each in self.routers:
            each.close()
        self._threads.shutdown()


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(router, "_CHECK_SECONDS", 0.05)
    monkeypatch.setattr(dealer, "_PAUSE_SECONDS", 0.05)
    made = Bench()
    yield made
    made.close()


@pytest.fixture
def quick_hearts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zeromq, "_HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(zeromq, "_ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(zeromq, "SILENCE_SECONDS", 0.3)


def with_endpoints(credentials: Credentials, *endpoints: str) -> Credentials:
    return Credentials(endpoints, credentials.identity, credentials.keys)


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


# Exchange.


@pytest.mark.parametrize("tcp", [False, True], ids=["ipc", "tcp"])
def test_messages_go_both_ways_in_order(bench: Bench, tcp: bool) -> None:
    made = bench.router(tcp=tcp)
    worker = bench.connect(made.credentials("12"))
    worker.send(["hello", {"é": None}])
    worker.send(["more"], [b"1", b"", bytearray(b"23"), memoryview(b"4")])
    peer, header, frames = bench.next()
    assert (worker_of(peer), header, frames) == ("1", ["hello", {"é": None}], [])
    assert bench.next() == (peer, ["more"], [b"1", b"", b"23", b"4"])
    transport = RouterTransport(made, peer)
    assert transport.put(["first"], [b"ab", b""]) == 2
    transport.put(["second"])
    first, second = worker.receive(), worker.receive()
    assert (first.header, first.frames, second.header) == (["first"], [b"ab", b""], ["second"])
    worker.close()


def test_large_frames_travel_in_pieces_and_are_writable(bench: Bench) -> None:
    """Longer than a piece, just as long, and one longer than what is copied."""
    sizes = [zeromq._PIECE_BYTES * 2 + 1, zeromq._PIECE_BYTES, 0, zeromq.UNCOPIED_BYTES + 1, 7]
    frames = [os.urandom(size) for size in sizes]
    made = bench.router(tcp=True)
    worker = bench.connect(made.credentials("1"))
    worker.send(["result"], frames)
    peer, _, received = bench.next()
    assert received == frames
    received[0][0] = 1
    made.send(peer, ["call"], frames)
    message = bench.run(worker.receive)
    assert message.frames == frames
    worker.close()


def test_sent_frames_are_not_copied() -> None:
    frame = bytearray(zeromq._PIECE_BYTES + 10)
    _, *pieces = zeromq.pack(["call"], [frame])
    assert [memoryview(piece).obj for piece in pieces] == [frame, frame]
    assert all(memoryview(piece).obj is frame for piece in pieces)


def test_workers_with_the_same_credentials_are_told_apart(bench: Bench) -> None:
    """This happens if a job is requeued while the executor may still know the first one."""
    made = bench.router()
    workers = [bench.connect(made.credentials("5"), "5") for _ in range(2)]
    for number, worker in enumerate(workers):
        worker.send(["hello", number])
    peers = {header[1]: peer for peer, header, _ in (bench.next(), bench.next())}
    assert [worker_of(peer) for peer in peers.values()] == ["5", "5"]
    made.send(peers[1], ["for the second"], [])
    assert workers[1].receive().header == ["for the second"]
    workers[0].close()
    bench.until(lambda: bench.lost)
    assert bench.lost == [peers[0]]
    workers[1].close()


def test_a_message_to_a_peer_that_is_gone_is_dropped(bench: Bench) -> None:
    made = bench.router()
    worker = bench.connect(made.credentials("1"))
    worker.send(["hello"])
    peer, _, _ = bench.next()
    worker.close()
    bench.until(lambda: bench.lost == [peer])
    made.send(peer, ["call"], [b"x"])
    made.send(b"nobody", ["call"], [])


# Where the executor is.


@linux
def test_several_interfaces(bench: Bench) -> None:
    made = bench.router(tcp=True, interfaces=["127.0.0.2", "127.0.0.3"])
    assert [address.split(each)[0] for each in made.endpoints] == ["127.0.0.2", "127.0.0.3"]
    for endpoint in made.endpoints:
        worker = bench.connect(with_endpoints(made.credentials("1"), endpoint))
        worker.send(["hello"])
        assert bench.next()[1] == ["hello"]
        worker.close()


def test_all_interfaces(bench: Bench) -> None:
    made = bench.router(tcp=True)
    port = address.split(made.endpoints[0])[1]
    assert made.endpoints == address.endpoints(port)
    # The name may be resolved to anything, but one of the addresses is this machine's.
    for credentials in (made.credentials("1"), with_endpoints(made.credentials("1"), f"tcp://127.0.0.1:{port}")):
        bench.connect(credentials).close()


def test_localhost_only(bench: Bench) -> None:
    made = bench.router(tcp=True, hostname_localhost=True)
    (endpoint,) = made.endpoints
    assert address.split(endpoint)[0] == "127.0.0.1"
    bench.connect(made.credentials("1")).close()
    for other in address.addresses():
        with pytest.raises(OSError, match=r"."):
            socket.create_connection((other, address.split(endpoint)[1]), 1)


def test_an_address_of_another_machine_is_an_error(bench: Bench) -> None:
    with pytest.raises(OSError, match=r"cannot listen at 192\.0\.2\.77, which must be"):
        bench.router(tcp=True, interfaces=["192.0.2.77"])


@linux
def test_a_worker_finds_the_address_that_answers(bench: Bench) -> None:
    made = bench.router(tcp=True, interfaces=["127.0.0.4"])
    other = bench.router(tcp=True, hostname_localhost=True)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoints = [
            f"tcp://127.0.0.2:{closed_port()}",
            "tcp://no.such.host.invalid:1234",
            "tcp://[::ffff:127.0.0.9]:9",
            f"tcp://127.0.0.1:{silent.getsockname()[1]}",
            other.endpoints[0],
            made.endpoints[0],
        ]
        worker = bench.connect(with_endpoints(made.credentials("1"), *endpoints))
    assert worker.endpoint == made.endpoints[0]
    worker.send(["hello"])
    assert bench.next()[1] == ["hello"]
    worker.close()


def test_a_name_is_resolved(bench: Bench) -> None:
    made = bench.router(tcp=True, hostname_localhost=True)
    port = address.split(made.endpoints[0])[1]
    worker = bench.connect(with_endpoints(made.credentials("1"), f"tcp://localhost:{port}"))
    assert worker.endpoint == f"tcp://127.0.0.1:{port}"
    worker.close()


def test_a_worker_that_reaches_nobody_names_all_that_it_tried(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    made = bench.router(tcp=True, hostname_localhost=True)
    other = bench.router(tcp=True, hostname_localhost=True)
    stranger = ClientKeys(made.credentials("1").keys.server, *zmq.curve_keypair())
    slow = threading.Event()
    resolve = address.resolve

    def resolve_slowly(host: str) -> list[str]:
        if host == "slow":
            slow.wait(WAIT)
        return resolve(host)

    monkeypatch.setattr(address, "resolve", resolve_slowly)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        expected = {
            f"tcp://127.0.0.1:{closed_port()}": "nothing listens there, or it cannot be reached",
            f"tcp://127.0.0.1:{silent.getsockname()[1]}": "connected, but it does not answer",
            made.endpoints[0]: "it refuses this worker's key",
            other.endpoints[0]: "the listener there is not this worker's executor",
            "tcp://no.such.host.invalid:1234": "its name cannot be resolved: ",
            "tcp://slow:1234": "its name was not resolved in time",
        }
        credentials = Credentials(tuple(expected), "1", stranger)
        with pytest.raises(ConnectionError) as caught:
            bench.connect(credentials, seconds=1.0)
    slow.set()
    for endpoint, outcome in expected.items():
        assert f"{endpoint} ({outcome}" in str(caught.value)
    assert "firewall" in str(caught.value)
    assert bench.messages == []


def test_a_worker_may_come_before_the_executor_listens_again(bench: Bench) -> None:
    """A refused connection is tried again, because a network may be slow to come up."""
    made = bench.router(tcp=True, hostname_localhost=True)
    port = closed_port()
    credentials = with_endpoints(made.credentials("1"), f"tcp://127.0.0.1:{port}")
    waiting = bench._threads.submit(lambda: Dealer(credentials, "1"))
    give_up = time.monotonic() + 0.2
    bench.until(lambda: time.monotonic() > give_up)
    made._socket.bind(f"tcp://127.0.0.1:{port}")
    bench.until(waiting.done)
    waiting.result().close()


def test_a_worker_does_not_wait_for_an_executor_that_has_ended(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """If every address refuses, nobody will listen there again."""
    monkeypatch.setattr(dealer, "_REFUSED_SECONDS", 0.1)
    made = bench.router(tcp=True, hostname_localhost=True)
    gone = [f"tcp://127.0.0.1:{closed_port()}" for _ in range(2)]
    with pytest.raises(ConnectionError, match="nothing listens there"):
        bench.connect(with_endpoints(made.credentials("1"), *gone), seconds=1000.0)


def test_a_worker_waits_for_an_address_that_does_not_answer(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be the right one."""
    monkeypatch.setattr(dealer, "_REFUSED_SECONDS", 0.1)
    made = bench.router(tcp=True, hostname_localhost=True)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        both = (f"tcp://127.0.0.1:{closed_port()}", f"tcp://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(ConnectionError, match="Tried for 1 s"):
            bench.connect(with_endpoints(made.credentials("1"), *both), seconds=1.0)


def test_addresses_of_this_machine() -> None:
    found = address.addresses()
    assert len(found) == len(set(found))
    for each in found:
        family = socket.AF_INET6 if ":" in each else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.bind((each, 0))
        assert not each.startswith(("127.", "fe80:")), each
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
        assert found[0] == probe.getsockname()[0]


def test_endpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address, "addresses", lambda: ["10.0.0.1", "fd00::1"])
    monkeypatch.setattr(address, "names", lambda: ("node", "node.example"))
    endpoints = address.endpoints(80)
    assert endpoints == ["tcp://10.0.0.1:80", "tcp://[fd00::1]:80", "tcp://node:80", "tcp://node.example:80"]
    assert address.split(endpoints[1]) == ("fd00::1", 80)
    monkeypatch.setattr(address, "addresses", list)
    monkeypatch.setattr(address, "names", tuple)
    assert address.endpoints(80) == ["tcp://127.0.0.1:80"]


def test_a_name_server_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()

    def getfqdn() -> str:
        answered.wait(WAIT)
        return "late.example"

    monkeypatch.setattr(address, "_NAME_SECONDS", 0.01)
    monkeypatch.setattr(address.socket, "getfqdn", getfqdn)
    monkeypatch.setattr(address.socket, "gethostname", lambda: "node")
    assert address.names.__wrapped__() == ("node",)
    answered.set()


# Credentials.


def credentials_of(identity: str = "7") -> Credentials:
    keys = ClientKeys(zmq.curve_keypair()[0], *zmq.curve_keypair())
    return Credentials(("tcp://10.0.0.1:1", "tcp://node:1"), identity, keys)


def test_credentials_travel_as_text_and_as_a_file(tmp_path: Path) -> None:
    credentials = credentials_of()
    assert Credentials.parse(credentials.dumps()) == credentials
    path = tmp_path / "credentials"
    before = os.umask(0)
    try:
        credentials.write(str(path))
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    assert Credentials.read(str(path)) == credentials
    with pytest.raises(FileExistsError):
        credentials.write(str(path))
    assert credentials.keys.secret.decode() not in repr(credentials)


def test_a_link_that_was_laid_for_us_is_not_followed(tmp_path: Path) -> None:
    path = tmp_path / "credentials"
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        credentials_of().write(str(path))
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602])
def test_a_file_that_others_can_open_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "credentials"
    credentials_of().write(str(path))
    path.chmod(mode)
    with pytest.raises(PermissionError, match=f"mode {mode:04o}; it must .* mode 0600"):
        Credentials.read(str(path))


@pytest.mark.parametrize("text", ["", "{}", "[1]", "null", '{"endpoints": [], "identity": "1", "keys": "a b c"}'])
def test_text_without_credentials_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Credentials.parse(text)


# Strangers.

# The start of every ZeroMQ (ZMTP 3.0) connection: signature, version, mechanism, as-server, filler.
GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
# ... and a READY command that says that this is a DEALER.
READY = b"\x04\x1a\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"


class Bomb:
    """Whoever unpickles it makes a directory."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self._path,)


def closed_by_the_other_end(sock: socket.socket) -> bool:
    sock.settimeout(0)
    try:
        while sock.recv(4096):
            pass
    except BlockingIOError:
        return False
    except ConnectionError:
        return True
    return True


@pytest.mark.parametrize(
    "greeting",
    [b"GET / HTTP/1.1\r\nHost: node\r\n\r\n", bytes(range(256)) * 64, GREETING + READY, GREETING + b"\x04"],
    ids=["http", "noise", "null", "null, cut short"],
)
def test_garbage_and_the_null_mechanism_are_refused(bench: Bench, tmp_path: Path, greeting: bytes) -> None:
    made = bench.router(tcp=True, hostname_localhost=True)
    bomb = pickle.dumps(Bomb(tmp_path / "bomb"))
    with socket.create_connection(address.split(made.endpoints[0])) as stranger:
        stranger.sendall(greeting)
        with contextlib.suppress(ConnectionError):
            stranger.sendall(b"\x01\x02{}\x00" + bytes([len(bomb)]) + bomb)
        bench.until(lambda: closed_by_the_other_end(stranger))
    worker = bench.connect(made.credentials("1"))
    worker.send(["hello"])
    assert bench.next()[1] == ["hello"]
    worker.close()
    assert bench.messages == []
    assert not (tmp_path / "bomb").exists()


@pytest.mark.parametrize("keys", ["none", "unknown", "unknown, and another server's"])
def test_a_client_without_the_key_is_refused(bench: Bench, tmp_path: Path, keys: str) -> None:
    made = bench.router(tcp=True, hostname_localhost=True)
    context = zmq.Context()
    stranger = context.socket(zmq.DEALER)
    if keys != "none":
        server = made.credentials("1").keys.server if keys == "unknown" else zmq.curve_keypair()[0]
        ClientKeys(server, *zmq.curve_keypair()).use(stranger)
    monitor = zeromq.monitor_of(stranger, zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
    stranger.setsockopt(zmq.RECONNECT_IVL, -1)
    stranger.connect(made.endpoints[0])
    with contextlib.suppress(zmq.Again):  # it has been refused before it could say anything
        stranger.send_multipart([b'[["hello"], [1]]', pickle.dumps(Bomb(tmp_path / "bomb"))], zmq.NOBLOCK)
    bench.until(lambda: monitor.poll(0))
    event = int.from_bytes(monitor.recv_multipart()[0][:2], sys.byteorder)
    assert event == zmq.EVENT_DISCONNECTED
    stranger.disable_monitor()
    context.destroy(linger=0)
    assert bench.messages == []
    assert not (tmp_path / "bomb").exists()


def test_nobody_is_let_in_while_nobody_answers(bench: Bench) -> None:
    """A connection is refused, not admitted, if there is nobody left to ask."""
    made = bench.router(tcp=True, hostname_localhost=True)
    made._door.socket.unbind(curve._ZAP_ENDPOINT)  # at once, where closing it takes its time
    with pytest.raises(ConnectionError, match="not this worker's executor"):
        Dealer(made.credentials("1"), "1", seconds=0.3)
    assert bench.messages == []


# Lost connections.


def test_a_peer_that_leaves_is_lost_after_its_last_message(bench: Bench) -> None:
    made = bench.router(tcp=True)
    worker = bench.connect(made.credentials("1"))
    for number in range(100):
        worker.send(["result", number], [bytes(10_000)])
    worker.close()
    bench.until(lambda: bench.lost)
    assert [header[1] for _, header, _ in bench.messages] == list(range(100))
    assert bench.lost == [bench.messages[0][0]]


def test_a_peer_that_is_gone_before_its_first_message_is_read_is_lost_too(bench: Bench) -> None:
    """The loop was busy. Another peer may have its descriptor by then, and must not be taken for lost."""
    made = bench.router(tcp=True, hostname_localhost=True)
    poll = zmq.Poller()
    poll.register(made._door.socket, zmq.POLLIN)

    def let_in(name: str) -> Dealer:
        connecting = bench._threads.submit(lambda: Dealer(made.credentials("1"), name))
        assert poll.poll(WAIT * 1000)
        made._door.answer()
        return connecting.result(WAIT)

    first = let_in("first")
    first.send(["hello", "first"])
    first.close()
    assert made._monitor.poll(WAIT * 1000)
    second = let_in("second")
    second.send(["hello", "second"])
    bench.until(lambda: len(bench.messages) == 2 and bench.lost)
    assert [worker_of(peer) for peer in bench.lost] == ["first"]
    give_up = time.monotonic() + 0.2
    bench.until(lambda: time.monotonic() > give_up)
    assert len(bench.lost) == 1
    second.close()
    bench.until(lambda: len(bench.lost) == 2)
    assert worker_of(bench.lost[1]) == "second"


def test_two_peers_of_one_descriptor_are_told_apart(bench: Bench) -> None:
    """The first one's last message is read when the second one has its descriptor, in either order."""
    made = bench.router()
    worker = bench.connect(made.credentials("1"), "second")
    worker.send(["hello"])
    second, _, _ = bench.next()
    made._meet(b"first", made._descriptors[second])
    bench.until(lambda: bench.lost)
    assert bench.lost == [b"first"]
    worker.close()
    bench.until(lambda: len(bench.lost) == 2)
    assert bench.lost[1] == second


def test_a_worker_learns_that_the_executor_is_gone(bench: Bench) -> None:
    made = bench.router(tcp=True, hostname_localhost=True)
    told = threading.Event()
    worker = bench.connect(made.credentials("1"), on_lost=told.set)
    worker.send(["hello"])
    peer, _, _ = bench.next()
    made.send(peer, ["call"], [])
    waiting = bench._threads.submit(lambda: [worker.receive().header, worker.receive()])
    bench.turn()
    made.close()
    with pytest.raises(EOFError, match=made.endpoints[0]):
        waiting.result(WAIT)
    assert told.wait(WAIT)
    with pytest.raises(EOFError, match="the executor has ended"):
        worker.send(["result"])
    worker.close()


def test_messages_sent_before_the_executor_ended_are_received(bench: Bench) -> None:
    made = bench.router(tcp=True, hostname_localhost=True)
    told = threading.Event()
    worker = bench.connect(made.credentials("1"), on_lost=told.set)
    worker.send(["hello"])
    peer, _, _ = bench.next()
    made.send(peer, ["call"], [])
    assert worker._socket.poll(WAIT * 1000)
    made.close()
    assert told.wait(WAIT)
    assert worker.receive().header == ["call"]
    with pytest.raises(EOFError, match="was lost"):
        worker.receive()
    worker.close()


PEER = """\
import sys
from executorlib.transports.curve import Credentials
from executorlib.transports.dealer import Dealer

worker = Dealer(Credentials.read(sys.argv[1]), "1")
worker.send(["hello"])
worker.receive()
"""


@pytest.mark.usefixtures("quick_hearts")
@pytest.mark.parametrize("end", ["SIGKILL", "SIGSTOP"])
def test_the_executor_learns_of_a_peer_that_died_or_went_silent(bench: Bench, tmp_path: Path, end: str) -> None:
    path = str(tmp_path / "credentials")
    bench.router(tcp=True, hostname_localhost=True).credentials("1").write(path)
    with subprocess.Popen([sys.executable, "-c", PEER, path]) as process:
        try:
            peer, _, _ = bench.next()
            process.send_signal(getattr(signal, end))
            bench.until(lambda: bench.lost)
            assert bench.lost == [peer]
        finally:
            process.kill()


@pytest.mark.usefixtures("quick_hearts")
def test_a_connection_that_is_idle_or_busy_is_kept(bench: Bench) -> None:
    """Heartbeats are exchanged whatever the processes do."""
    made = bench.router(tcp=True, hostname_localhost=True)
    worker = bench.connect(made.credentials("1"))
    worker.send(["hello"])
    peer, _, _ = bench.next()
    time.sleep(0.7)  # twice the time after which silence is noticed; nobody looks after either socket
    made.send(peer, ["call"], [])
    assert bench.run(worker.receive).header == ["call"]
    assert bench.lost == []
    worker.close()


@pytest.mark.long
def test_libzmq_does_not_abort_when_a_router_closes_while_peers_send(scripts: Scripts) -> None:
    """It used to abort if a context ended while connections were being admitted, or in use."""
    scripts.run(
        """
        import threading
        import zmq
        from executorlib.transports.curve import ClientKeys
        from executorlib.transports.dealer import Dealer
        from executorlib.transports.router import Router
        sys.path.insert(0, os.environ["TESTS"])
        from unit.test_router import Bench

        def chatter(credentials):
            try:
                worker = Dealer(credentials, "1", seconds=5)
            except ConnectionError:
                return
            try:
                while True:
                    worker.send(["message"], [bytes(5000)])
            except EOFError:
                worker.close()

        for number in range(50):
            bench = Bench()
            made = bench.router(tcp=bool(number % 2), **({"hostname_localhost": True} if number % 2 else {}))
            credentials = made.credentials("1")
            peers = [threading.Thread(target=chatter, args=(credentials,)) for _ in range(2)]
            for peer in peers:
                peer.start()
            context = zmq.Context()
            stranger = context.socket(zmq.DEALER)
            ClientKeys(credentials.keys.server, *zmq.curve_keypair()).use(stranger)
            stranger.connect(made.endpoints[0])
            bench.until(lambda: len(bench.messages) > number)
            made.close()
            context.destroy(linger=0)
            if number % 10 == 9:
                for peer in peers:
                    peer.join()
            bench.close()
        """,
        env={"TESTS": str(Path(__file__).parents[1])},
    )


# A worker on another node.


class Remote:
    """A worker's program, and the executor's side of its connection."""

    def __init__(self, bench: Bench, folder: Path) -> None:
        self.bench = bench
        self.router = bench.router(tcp=True, hostname_localhost=True)
        path = str(folder / "credentials")
        self.router.credentials("3").write(path)
        command = [sys.executable, "-m", "executorlib.worker.remote", path]
        # A group of its own: what a call has started holds the pipe, too, and is killed with it if a test fails.
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        self.peer, (verb, self.about), frames = bench.next()
        assert (verb, frames) == ("hello", [])

    def send(self, header: list[Any], frames: Any = ()) -> None:
        self.router.send(self.peer, header, frames)

    def ask(self, header: list[Any], frames: Any = ()) -> tuple[Any, list[Any]]:
        self.send(header, frames)
        peer, answer, answered = self.bench.next()
        assert peer == self.peer
        return answer, answered

    def set_up(self) -> None:
        assert self.ask(["setup", {"path": sys.path, "slot": 4}]) == (["ready"], [])

    def call(self, fn: Callable[..., Any], *args: Any) -> tuple[Any, list[Any]]:
        return self.ask(["call", 9, 1, {"new": [1], "now": True}], call_frames(fn, *args))

    def end(self) -> tuple[int, str]:
        _, err = self.bench.run(lambda: self.process.communicate(timeout=WAIT))
        return self.process.returncode, err


def call_frames(fn: Callable[..., Any], *args: Any) -> list[Any]:
    return [serialize.dumps_in_band(fn), *serialize.dumps_arguments(args, {})]


@pytest.fixture
def worker(bench: Bench, tmp_path: Path) -> Iterator[Remote]:
    made = Remote(bench, tmp_path)
    yield made
    if made.process.returncode is None:
        end_group(made.process, gently=False)
        made.process.communicate()


def test_a_remote_worker_runs_calls_until_it_is_told_to_stop(worker: Remote) -> None:
    assert worker_of(worker.peer) == "3"
    assert worker.about["host"] == socket.gethostname()
    assert (worker.about["pid"], worker.about["size"]) == (worker.process.pid, 1)
    assert list(worker.about) == list(remote.hello()[1])
    worker.set_up()
    answer, frames = worker.call(lambda x, executorlib_worker_id: (x, executorlib_worker_id), "a")
    assert answer[:2] == ["result", 9]
    assert serialize.loads(frames) == ("a", 4)
    # Now by number, with what the worker kept.
    answer, frames = worker.ask(["call", 10, 1, {"now": True}], serialize.dumps_arguments(("b",), {}))
    assert serialize.loads(frames) == ("b", 4)
    worker.send(["forget"])
    answer, frames = worker.call(lambda: 1 / 0)
    assert answer[:2] == ["error", 9]
    assert isinstance(serialize.loads(frames), ZeroDivisionError)
    assert "ZeroDivisionError" in answer[3]
    worker.send(["stop"])
    assert worker.end() == (0, "")
    worker.bench.until(lambda: worker.bench.lost == [worker.peer])


def test_an_init_function_that_fails_is_told(worker: Remote) -> None:
    def fail() -> None:
        raise ValueError("no init")

    answer, frames = worker.ask(["setup", {"path": sys.path}], serialize.dumps(fail))
    assert answer[:2] == ["error", 0]
    assert str(serialize.loads(frames)) == "no init"
    assert worker.end() == (0, "")


def test_an_idle_remote_worker_ends_with_its_executor(worker: Remote) -> None:
    worker.set_up()
    worker.router.close()
    code, err = worker.end()
    assert code == 1
    assert f"this worker ends: the connection to the executor at {worker.router.endpoints[0]} was lost" in err


def test_a_busy_remote_worker_ends_with_its_executor(worker: Remote, tmp_path: Path) -> None:
    """It ends with everything that its call has started."""

    def hold(path: str) -> None:
        with subprocess.Popen(["sleep", "1000"]) as child:
            put(path, str(child.pid))

    worker.set_up()
    worker.send(["call", 9, 1, {"new": [1], "now": True}], call_frames(hold, str(tmp_path / "pid")))
    child = int(worker.bench.run(lambda: wait_for(tmp_path / "pid")) or 0)
    assert alive(child)
    worker.router.close()
    code, err = worker.end()
    assert code == -signal.SIGKILL
    assert "while a call was running" in err
    wait_until_gone(child)


EXECUTOR = """
import time
sys.path.insert(0, os.environ["TESTS"])
from executorlib.transports import zeromq
from unit.test_router import Bench

zeromq._HEARTBEAT_SECONDS, zeromq._ANSWER_SECONDS, zeromq.SILENCE_SECONDS = 0.1, 0.2, 0.3
bench = Bench()
made = bench.router(tcp=True, hostname_localhost=True)
made.credentials("1").write("credentials")
print("ready", flush=True)
peer, header, _ = bench.next()
made.send(peer, ["setup", {}], [])
bench.next()
give_up = time.monotonic() + 0.5  # several heartbeats
bench.until(lambda: time.monotonic() > give_up)
print("connected", flush=True)
while True:
    bench.turn()
"""


def test_a_remote_worker_ends_when_its_executor_goes_silent(scripts: Scripts, tmp_path: Path) -> None:
    """As when the machine stops without a word. The executor says how long its silence may last."""
    executor = scripts.start(EXECUTOR, env={"TESTS": str(Path(__file__).parents[1])})
    assert executor.stdout is not None
    assert executor.stdout.readline() == "ready\n"
    command = [sys.executable, "-m", "executorlib.worker.remote", str(tmp_path / "credentials"), "other"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert executor.stdout.readline() == "connected\n"
        executor.send_signal(signal.SIGSTOP)
        _, err = process.communicate(timeout=2 * WAIT)
        executor.kill()
    assert process.returncode == 1
    assert "was lost" in err


def test_a_remote_worker_without_good_credentials_says_so(tmp_path: Path) -> None:
    for content, said in ((None, "No such file"), ("{}", "no credentials")):
        path = tmp_path / "credentials"
        if content is not None:
            path.touch(0o600)
            path.write_text(content)
        command = [sys.executable, "-m", "executorlib.worker.remote", str(path)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=WAIT, check=False)
        assert ended.returncode == 1
        assert "this worker cannot connect: " in ended.stderr
        assert said in ended.stderr
        assert "Traceback" not in ended.stderr
