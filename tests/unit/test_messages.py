"""Messages over streams: what comes out is what went in, however the stream is cut; descriptors; dead peers."""

from __future__ import annotations

import array
import contextlib
import os
import resource
import socket
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from executorlib import SingleNodeExecutor, serialize
from executorlib.errors import ExecutorlibSocketError
from executorlib.serialize import Frame
from executorlib.transports import messages
from executorlib.transports.messages import Channel, Connection, Decoder, Message, Undecoded, encode
from executorlib.worker import call
from unit.properties import examples, repeatable

LARGE = messages.MAPPED_BYTES
memory_files = pytest.mark.skipif(not messages.HAS_MEMORY_FILES, reason="needs memfd_create")
needs_proc = pytest.mark.linux

plain = st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False)
headers = st.recursive(plain, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
large_frames = st.integers(0, 255).map(lambda byte: 9000 * bytes([byte]))
frames_of_any_size = st.lists(st.binary(max_size=100) | large_frames, max_size=6)


def mapped_from(size: int) -> Any:
    """Use memory files for messages of this size and above, so that small examples do it too."""
    return mock.patch.object(messages, "MAPPED_BYTES", size)


NEVER = 1 << 60


def wire(pieces: Sequence[Frame]) -> bytes:
    return b"".join(map(bytes, pieces))


def passed(fds: Sequence[int]) -> list[tuple[int, int, bytes]]:
    """Descriptors in the form in which `socket.recvmsg` returns them."""
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())] if fds else []


def contents(message: Message) -> tuple[Any, list[bytes]]:
    return message.header, [bytes(frame) for frame in message.frames]


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    with one, other:
        yield one, other


def receive_all(channel: Channel, count: int) -> list[Message]:
    """Read until ``count`` messages have come; the sender has sent them."""
    received: list[Message] = []
    while len(received) < count:
        got, closed = channel.receive()
        received += got
        assert got or not closed, f"the stream ended after {len(received)} of {count} messages"
    return received


# Coding, without a socket.


@settings(repeatable, max_examples=examples(80))
@given(
    sent=st.lists(st.tuples(headers, frames_of_any_size), max_size=5),
    cuts=st.lists(st.integers(1, 400), min_size=1, max_size=20),
)
def test_round_trip_however_the_stream_is_cut(sent: list[tuple[Any, list[bytes]]], cuts: list[int]) -> None:
    stream = b"".join(wire(encode(header, frames)[0]) for header, frames in sent)
    decoder = Decoder()
    received: list[Message] = []
    position = turn = 0
    while position < len(stream):
        step = cuts[turn % len(cuts)]
        received += decoder.feed(stream[position : position + step], [])
        position += step
        turn += 1
    assert [contents(message) for message in received] == sent
    assert decoder.feed(b"", []) == []


@memory_files
@settings(repeatable, max_examples=examples(80))
@given(
    sent=st.lists(st.tuples(headers, st.lists(st.binary(max_size=200), max_size=4)), max_size=4),
    limit=st.integers(1, 300),
    step=st.integers(1, 300),
    relayed=st.booleans(),
)
def test_round_trip_through_memory_files(
    sent: list[tuple[Any, list[bytes]]], limit: int, step: int, relayed: bool
) -> None:
    """Messages above a size use them. The descriptors travel ahead of the bytes that they belong to."""
    stream, fds = b"", []
    with mapped_from(limit):
        for header, frames in sent:
            pieces, with_it, close = encode(header, frames)
            assert with_it == close
            assert len(close) == (sum(map(len, frames)) >= limit)
            stream += wire(pieces)
            fds += with_it
    decoder, relay = Decoder(), Undecoded()

    def feed(data: bytes, ancillary: list[tuple[int, int, bytes]]) -> list[Message]:
        if not relayed:
            return decoder.feed(data, ancillary)
        [piece] = relay.feed(data, ancillary)
        return decoder.feed_passed(piece.header[1], piece.frames)

    received = feed(b"", passed(fds))
    for position in range(0, len(stream), step):
        received += feed(stream[position : position + step], [])
    assert [contents(message) for message in received] == sent
    assert [message.fds for message in received] == [[]] * len(sent)


@memory_files
@pytest.mark.parametrize("sizes", [[64, 0], [0, 64], [65, 0, 0], [0, 0, 1, 0]])
def test_empty_frames_in_memory_files(sizes: list[int]) -> None:
    frames = [b"x" * size for size in sizes]
    with mapped_from(1):
        pieces, fds, _ = encode(None, frames)
    [message] = Decoder().feed(wire(pieces), passed(fds))
    assert [bytes(frame) for frame in message.frames] == frames


def test_message_that_is_not_complete_yet() -> None:
    whole = wire(encode(["call", 1], [b"abc", b"", b"d" * 5000])[0])
    decoder = Decoder()
    for position in range(len(whole) - 1):
        assert decoder.feed(whole[position : position + 1], []) == []
    [message] = decoder.feed(whole[-1:] + whole[:10], [])
    assert contents(message) == (["call", 1], [b"abc", b"", b"d" * 5000])
    [message] = decoder.feed(whole[10:], [])


def test_frames_can_be_written_to() -> None:
    """Arrays that are rebuilt on them are writable, as the originals were, and share nothing with each other."""
    original = bytearray(b"abc")
    [one, other] = Decoder().feed(wire(encode(0, [original, b"def"])[0] * 2), [])
    one.frames[0][0] = 120  # type: ignore[index]
    assert [bytes(frame) for frame in one.frames + other.frames] == [b"xbc", b"def", b"abc", b"def"]
    assert original == b"abc"


def test_frames_of_wider_items() -> None:
    numbers = memoryview(array.array("d", range(2000)))
    [message] = Decoder().feed(wire(encode(None, [numbers])[0]), [])
    assert bytes(message.frames[0]) == numbers.tobytes()


def test_small_messages_are_one_piece() -> None:
    assert len(encode(["call"], [b"a", b"b" * 8000])[0]) == 1


def test_large_frames_are_not_copied() -> None:
    frame = bytearray(LARGE - 1)
    pieces, fds, _ = encode(["call"], [b"a", frame][1:])
    assert pieces[1] is frame
    assert fds == []


@needs_proc
def test_descriptors_go_to_their_messages_in_order() -> None:
    """Each message gets as many as it was sent with, also when they arrive early and all together."""
    counts = [0, 2, 1, 0, 3]
    files = [os.memfd_create(str(number)) for number in range(sum(counts))]
    stream, sent = b"", iter(files)
    for number, count in enumerate(counts):
        pieces, fds, close = encode(number, [b"x"], [next(sent) for _ in range(count)])
        assert len(fds) == count
        assert close == []
        stream += wire(pieces)
    decoder = Decoder()
    received = decoder.feed(stream[:3], passed(files[:4]))
    received += decoder.feed(stream[3:-1], passed(files[4:]))
    received += decoder.feed(stream[-1:], [])
    assert [message.header for message in received] == [0, 1, 2, 3, 4]
    assert [message.fds for message in received] == [[], files[:2], files[2:3], [], files[3:]]
    for fd in files:
        os.close(fd)


@needs_proc
def test_descriptors_of_incomplete_messages_are_closed() -> None:
    before = open_fds()
    decoder = Decoder()
    whole = wire(encode(["x"], [b"y"], [0])[0])
    decoder.feed(whole[:-1], passed([os.memfd_create("left")]))
    decoder.feed(b"", [(socket.SOL_SOCKET, -1, b"of a kind that nobody asked for")])
    decoder.close()
    assert open_fds() == before


@needs_proc
def test_memory_file_that_cannot_be_filled_gives_way_to_the_socket() -> None:
    before = open_fds()
    with mapped_from(1), mock.patch.object(os, "pwrite", side_effect=OSError("full")):
        pieces, fds, close = encode(None, [b"abc"])
    assert open_fds() == before
    assert not fds
    assert not close
    [message] = Decoder().feed(b"".join(pieces), [])
    assert [bytes(frame) for frame in message.frames] == [b"abc"]


def test_header_that_is_not_plain_data() -> None:
    with pytest.raises(TypeError, match="JSON"):
        encode(["call", object()], [])


@pytest.mark.parametrize("character", ["x", "\n", "\N{GRINNING FACE}"])
def test_longest_text_fits_into_a_header(character: str) -> None:
    text = call.bounded(character * 20_000_000)
    stream = wire(encode(["error", 1, 0.5, text, {}], [b"frame"])[0])
    [message] = Decoder().feed(stream, [])
    assert message.header[3] == text
    assert "19000000 characters were left out here" in text
    assert call.bounded(character * 1_000_000) == character * 1_000_000


# Over sockets.


def test_conversation(pair: tuple[socket.socket, socket.socket]) -> None:
    channel, connection = Channel(pair[0]), Connection(pair[1])
    assert channel.put(["call", 1], [b"ab", b"c"]) == 3
    assert channel.put(["forget"]) == 0
    assert channel.flush()
    assert contents(connection.receive()) == (["call", 1], [b"ab", b"c"])
    assert connection.pending()
    assert contents(connection.receive()) == (["forget"], [])
    assert not connection.pending()
    connection.send(["result", 1], [b"xyz"])
    connection.send(["ready"])
    received, closed = channel.receive()
    assert [contents(message) for message in received] == [(["result", 1], [b"xyz"]), (["ready"], [])]
    assert not closed
    assert channel.receive() == ([], False)


@pytest.mark.parametrize("limit", [NEVER, pytest.param(LARGE, marks=memory_files)], ids=["stream", "memory-file"])
@pytest.mark.parametrize("size", [LARGE - 1, LARGE, 5 * LARGE + 3])
def test_partial_sends(pair: tuple[socket.socket, socket.socket], limit: int, size: int) -> None:
    """The channel never blocks: the rest of a message waits, in order, until there is room."""
    pair[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    channel, reader = Channel(pair[0]), Channel(pair[1])
    sent = [(["call", number], [bytes([number]) * (size if number % 3 == 0 else 100)]) for number in range(9)]
    received: list[Message] = []
    with mapped_from(limit):
        for header, frames in sent:
            channel.put(header, frames)
        turns = 0
        while not channel.flush():
            turns += 1
            received += reader.receive()[0]
    assert turns > 0 or limit == LARGE
    received += receive_all(reader, len(sent) - len(received))
    assert [contents(message) for message in received] == sent


@memory_files
def test_more_descriptors_than_the_kernel_takes_at_once(pair: tuple[socket.socket, socket.socket]) -> None:
    channel, reader = Channel(pair[0]), Channel(pair[1])
    count = 300
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 4 * count:
        pytest.skip("too few open files allowed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4 * count), hard))
    try:
        with mapped_from(1):
            for number in range(count):
                channel.put(number, [b"%d" % number])
        seen = 0
        while seen < count:
            channel.flush()
            for message in reader.receive()[0]:
                assert contents(message) == (seen, [b"%d" % seen])
                seen += 1
        assert channel.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@memory_files
def test_large_arrays_are_private_and_writable(pair: tuple[socket.socket, socket.socket]) -> None:
    numpy = pytest.importorskip("numpy")
    original = numpy.arange(100_000.0)
    channel, connection = Channel(pair[0]), Connection(pair[1])
    channel.put(["result"], serialize.dumps({"array": original, "again": original[::-1].copy()}))
    channel.flush()
    rebuilt = serialize.loads(connection.receive().frames)
    assert (rebuilt["array"] == original).all()
    assert (rebuilt["again"] == original[::-1]).all()
    assert rebuilt["array"].flags.aligned
    rebuilt["array"] += 1
    assert rebuilt["array"][10] == 11
    assert original[10] == 10
    assert rebuilt["again"][-1] == 0


@needs_proc
def test_sending_leaves_no_descriptor_open(pair: tuple[socket.socket, socket.socket]) -> None:
    channel, connection = Channel(pair[0]), Connection(pair[1])
    before = open_fds()
    for _ in range(3):
        channel.put(["call"], [b"x" * LARGE])
    assert open_fds() == before + 3
    assert channel.flush()
    assert open_fds() == before
    connection.send(["result"], [b"x" * LARGE])
    assert open_fds() == before


@needs_proc
@pytest.mark.parametrize("size", [LARGE - 1, LARGE], ids=["stream", "memory-file"])
def test_received_messages_hold_no_descriptor(pair: tuple[socket.socket, socket.socket], size: int) -> None:
    """A program may keep more large results than it may have open files."""
    channel, connection = Channel(pair[0]), Connection(pair[1])
    before = open_fds()
    kept = []
    for _ in range(5):
        connection.send(["result"], [b"x" * size])
        kept += receive_all(channel, 1)
    held = open_fds() - before
    assert [bytes(message.frames[0]) for message in kept] == [b"x" * size] * 5
    assert held == 0


@needs_proc
def test_dropped_messages_leave_nothing_open(pair: tuple[socket.socket, socket.socket]) -> None:
    channel, connection = Channel(pair[0]), Connection(pair[1])
    before = open_fds()
    connection.send(["result"], [b"x" * LARGE])
    received = receive_all(channel, 1)
    assert len(received[0].frames[0]) == LARGE
    del received
    assert open_fds() == before


@memory_files
def test_bytes_behind_a_descriptor_are_received(pair: tuple[socket.socket, socket.socket]) -> None:
    """The kernel ends a read behind bytes that came with a descriptor. One more read must get the bytes behind them."""
    channel, connection = Channel(pair[0]), Connection(pair[1])
    for number in range(3):
        connection.send(["result", number], [b"x" * LARGE])
        connection.send(["result", number], [b"small"])
    connection.close()
    received, _ = channel.receive(everything=True)
    assert [message.header[1] for message in received] == [0, 0, 1, 1, 2, 2]


def test_receives_more_than_one_buffer_at_once(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[1].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    channel, connection = Channel(pair[0]), Connection(pair[1])
    frame = b"x" * 60_000
    for _ in range(3):
        connection.send(["result"], [frame])
    received, closed = channel.receive()
    assert [contents(message) for message in received] == [(["result"], [frame])] * 3
    assert not closed


@needs_proc
def test_received_descriptors_are_not_inherited(pair: tuple[socket.socket, socket.socket]) -> None:
    channel, connection = Channel(pair[0]), Connection(pair[1])
    read_end, write_end = os.pipe()
    connection.send(["started"], (), [read_end, write_end])
    [message] = receive_all(channel, 1)
    assert [os.get_inheritable(fd) for fd in message.fds] == [False, False]
    os.write(message.fds[1], b"through")
    assert os.read(message.fds[0], 7) == b"through"
    for fd in (read_end, write_end, *message.fds):
        os.close(fd)


@contextlib.contextmanager
def files_left(count: int) -> Iterator[None]:
    """Let this process open only this many more files."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = [os.dup(0) for _ in range(count + 1)]
    for fd in free:
        os.close(fd)
    # The limit is one on their numbers, and the lowest free ones are given out.
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[-1], limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@needs_proc
@pytest.mark.parametrize("left", [0, 1, 2])
def test_too_many_open_files_cost_only_the_message_concerned(
    pair: tuple[socket.socket, socket.socket], left: int
) -> None:
    channel, connection = Channel(pair[0]), Connection(pair[1])
    connection.send(["before"])
    connection.send(["started"], (), [0, 1, 2])
    connection.send(["result"], [b"x"])
    before = open_fds()
    with files_left(left):
        received = receive_all(channel, 3)
        assert channel.receive() == ([], False)
    assert [message.header for message in received] == [["before"], ["started"], ["result"]]
    first, second, third = received
    assert first.error is third.error is None
    assert isinstance(second.error, OSError)
    assert "open files" in str(second.error)
    assert second.fds == []
    assert open_fds() == before
    connection.send(["started"], (), [0])
    [last] = receive_all(channel, 1)
    assert last.error is None
    os.close(*last.fds)


@memory_files
@needs_proc
def test_large_message_and_too_many_open_files(pair: tuple[socket.socket, socket.socket]) -> None:
    channel, connection = Channel(pair[0]), Connection(pair[1])
    connection.send(["result", 1], [b"x" * LARGE])
    with files_left(0):
        [message] = receive_all(channel, 1)
    assert message.header == ["result", 1]
    assert message.frames == []
    assert isinstance(message.error, OSError)
    channel.put(["call"], [b"x" * LARGE])
    channel.flush()
    with files_left(0), pytest.raises(OSError, match="open files"):
        connection.receive()


@memory_files
def test_large_message_that_cannot_be_mapped(pair: tuple[socket.socket, socket.socket]) -> None:
    channel, connection = Channel(pair[0]), Connection(pair[1])
    connection.send(["result", 1], [b"x" * LARGE])
    with mock.patch.object(messages, "_map", side_effect=OSError("no memory")):
        [message] = receive_all(channel, 1)
    assert str(message.error) == "no memory"
    connection.send(["ready"])
    assert receive_all(channel, 1)[0].header == ["ready"]


# Peers that are gone.


def test_receive_from_a_closed_peer(pair: tuple[socket.socket, socket.socket]) -> None:
    channel, connection = Channel(pair[0]), Connection(pair[1])
    connection.send(["last"], [b"words"])
    connection.close()
    [message] = receive_all(channel, 1)
    assert contents(message) == (["last"], [b"words"])
    assert channel.receive() == ([], True)
    assert channel.receive() == ([], True)


def test_worker_receives_from_a_closed_peer(pair: tuple[socket.socket, socket.socket]) -> None:
    channel, connection = Channel(pair[0]), Connection(pair[1])
    channel.put(["call", 1])
    channel.put(["call", 2])
    channel.flush()
    channel.close()
    assert connection.receive().header == ["call", 1]
    assert connection.receive().header == ["call", 2]
    with pytest.raises(EOFError):
        connection.receive()


class Tight(socket.socket):
    """A socket of a process that has little memory left."""

    def recvmsg(self, size: int, *rest: int) -> Any:
        if size > 8192:
            raise MemoryError
        return super().recvmsg(size, *rest)


def test_worker_receives_with_little_memory(pair: tuple[socket.socket, socket.socket]) -> None:
    channel = Channel(pair[0])
    with Tight(fileno=os.dup(pair[1].fileno())) as tight:
        channel.put(["call", 1], [b"x" * 20_000])
        channel.put(["call", 2])
        channel.flush()
        connection = Connection(tight)
        assert contents(connection.receive()) == (["call", 1], [b"x" * 20_000])
        assert connection.receive().header == ["call", 2]
        channel.close()
        with pytest.raises(EOFError):
            connection.receive()


def test_peer_that_dies_within_a_message(pair: tuple[socket.socket, socket.socket]) -> None:
    channel = Channel(pair[0])
    pair[1].sendall(wire(encode(["result"], [b"x" * 1000])[0])[:-1])
    pair[1].close()
    assert channel.receive()[0] == []
    assert channel.receive() == ([], True)


def test_peer_that_dies_unread(pair: tuple[socket.socket, socket.socket]) -> None:
    """Its last words are read, although it leaves our message unread, which resets the stream."""
    channel, connection = Channel(pair[0]), Connection(pair[1])
    channel.put(["call"], [b"unread"])
    channel.flush()
    connection.send(["result"])
    connection.close()
    assert [message.header for message in receive_all(channel, 1)] == [["result"]]
    assert channel.receive() == ([], True)


@needs_proc
@pytest.mark.parametrize("size", [10, LARGE], ids=["stream", "memory-file"])
def test_send_to_a_closed_peer(pair: tuple[socket.socket, socket.socket], size: int) -> None:
    before = open_fds() - 1
    channel = Channel(pair[0])
    pair[1].close()
    channel.put(["call"], [b"x" * size])
    with pytest.raises(OSError, match=r"Broken pipe|Connection reset"):
        channel.flush()
    channel.close()
    assert open_fds() == before - 1


@needs_proc
@pytest.mark.parametrize("size", [10, LARGE], ids=["stream", "memory-file"])
def test_worker_sends_to_a_closed_peer(pair: tuple[socket.socket, socket.socket], size: int) -> None:
    before = open_fds() - 1
    connection = Connection(pair[1])
    pair[0].close()
    with pytest.raises(OSError, match=r"Broken pipe|Connection reset"):
        connection.send(["result"], [b"x" * size])
    assert open_fds() == before


# Garbage. Who writes it is one of our own workers, whose user's function wrote to a descriptor that is not its own.


GARBAGE: dict[str, bytes] = {
    "text": b"Iteration 1: residual 0.1\n",
    "header is no JSON": messages._PREFIX.pack(5, 0, 0) + b"{,}[]",
    "header is no UTF-8": messages._PREFIX.pack(2, 0, 0) + b"\xff\xfe",
    "descriptors that never came": messages._PREFIX.pack(2, 0, 3) + b"[]",
    "memory file that never came": messages._PREFIX.pack(2, 1, 0x8001) + messages._LENGTH.pack(8) + b"[]",
    "memory file without frames": messages._PREFIX.pack(2, 0, 0x8001) + b"[]",
}


@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_ends_the_stream(pair: tuple[socket.socket, socket.socket], garbage: str) -> None:
    """It ends at once although the peer lives, and without an exception, which would fail all calls of the loop."""
    channel = Channel(pair[0])
    pair[1].sendall(GARBAGE[garbage])
    assert channel.receive() == ([], True)
    channel.close()


@needs_proc
def test_memory_file_that_is_too_short(pair: tuple[socket.socket, socket.socket]) -> None:
    before = open_fds()
    fd = os.memfd_create("short")
    head = messages._PREFIX.pack(2, 1, 0x8001) + messages._LENGTH.pack(1 << 20) + b"[]"
    socket.send_fds(pair[1], [head], [fd])
    os.close(fd)
    channel = Channel(pair[0])
    assert channel.receive() == ([], True)
    channel.close()
    assert open_fds() == before - 1


@pytest.mark.parametrize("block", [False, True], ids=["default", "block"])
@pytest.mark.parametrize("garbage", ["text", "header is no JSON"])
def test_worker_that_writes_garbage_fails_its_own_call_alone(garbage: str, block: bool) -> None:
    data = GARBAGE[garbage]

    def write_to_sockets() -> None:
        import os
        import stat

        for fd in range(3, 64):
            with contextlib.suppress(OSError):
                if stat.S_ISSOCK(os.fstat(fd).st_mode):
                    os.write(fd, data)

    executor = SingleNodeExecutor(max_workers=2, block_allocation=block)
    try:
        bad, good = executor.submit(write_to_sockets), executor.submit(abs, -1)
        assert good.result(10) == 1
        assert isinstance(bad.exception(10), ExecutorlibSocketError)
        assert executor.submit(abs, -2).result(10) == 2
    finally:
        executor.kill_workers()
        executor.shutdown()


@memory_files
@needs_proc
@pytest.mark.parametrize("left", [0, 1])
def test_several_large_messages_and_too_many_open_files(pair: tuple[socket.socket, socket.socket], left: int) -> None:
    """If they are sent at once, each is lost by itself, and messages behind them are not."""
    channel, connection = Channel(pair[0]), Connection(pair[1])
    for number in range(3):
        channel.put(["call", number], [b"x" * LARGE])
    channel.put(["call", 3], [b"small"])
    channel.flush()
    with files_left(left):
        for _ in range(3):
            if left:
                assert len(connection.receive().frames[0]) == LARGE  # mapped, and closed again
            else:
                with pytest.raises(OSError, match="open files"):
                    connection.receive()
    assert contents(connection.receive()) == (["call", 3], [b"small"])
    channel.put(["call", 4], [b"y" * LARGE])
    channel.flush()
    assert bytes(connection.receive().frames[0]) == b"y" * LARGE
