"""Messages over a byte stream between two processes of one machine.

A message is a control header of plain data (JSON) and opaque frames (pickled user objects). On the wire:

    u32 header length, u32 number of frames, u16 number of descriptors,
    u64 length of each frame, header, frames

Descriptors travel beside the bytes (SCM_RIGHTS) and are matched to messages by order. If the frames are large and the
system has memory files (Linux), they are put into one memory file, and its descriptor is sent instead. That takes one
copy in; the receiver maps the pages, privately and writable, without another. In such a message, the high bit of the
descriptor count marks the last descriptor as that of the file.

Both ends are here: `Channel` never blocks and is for the executor's loop; `Connection` blocks and is for workers. A
node's relay passes streams on without looking into them (`Channel.pass_on`), except that memory files end there.
"""

from __future__ import annotations

import array
import contextlib
import errno
import json
import mmap
import os
import socket
import struct
import sys
import weakref
from collections import deque

from executorlib.serialize import nbytes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

    from executorlib.serialize import Frame

_PREFIX = struct.Struct("<IIH")
_LENGTH = struct.Struct("<Q")
_PREFIX_OF_ONE = struct.Struct("<IIHQ")
_MAPPED = 0x8000

# Below this, copying through the socket is cheaper than a memory file with its system calls and page faults (measured
# with numpy arrays between two processes: equal near 200 kB).
MAPPED_BYTES = 192 * 1024
# Arrays need aligned data. 64 bytes is a cache line and the widest vector register.
_ALIGNMENT = 64
# Just below malloc's default threshold for mmap, so that receiving does not map and fault in new pages.
_RECEIVE_BYTES = 120 * 1024
# The most that a worker receives at a time if its calls have left no memory for more. Most messages are shorter.
_LITTLE_BYTES = 4 * 1024
# The largest thing in a header is an environment. A longer header is not a message.
_MOST_HEADER_BYTES = 16 * 1024 * 1024
# The kernel accepts at most SCM_MAX_FD = 253 descriptors with one message.
_MOST_DESCRIPTORS = 253
_ANCILLARY_BYTES = socket.CMSG_SPACE(_MOST_DESCRIPTORS * 4)
# Takes the place of descriptors that the kernel could not give us.
_LOST = -1
_TOO_MANY_FILES = "too many open files in this process; raise its limit (`ulimit -n`), or close some"

# Below this, copying everything into one piece is cheaper than giving the kernel a longer list of pieces.
_JOINED_BYTES = 8192

# Made once, because the functions of the json module make a new encoder for each call with other separators.
_to_json = json.JSONEncoder(separators=(",", ":")).encode
_from_json = json.JSONDecoder().decode

HAS_MEMORY_FILES = hasattr(os, "memfd_create")


class Message:
    """A received message.

    Attributes:
        header: Control data.
        frames: Opaque payload.
        fds: Open descriptors that came with it. The receiver owns them.
        error: The reason if frames and descriptors were sent but are missing here; otherwise None.
    """

    __slots__ = ("error", "fds", "frames", "header")

    def __init__(self, header: Any, frames: list[Frame], fds: list[int], error: OSError | None = None) -> None:
        self.header = header
        self.frames = frames
        self.fds = fds
        self.error = error


def encode(header: Any, frames: Sequence[Frame], fds: Sequence[int] = ()) -> tuple[list[Frame], list[int], list[int]]:
    """Encode a message for the wire.

    Returns:
        The pieces of bytes in order, the descriptors to send, and those of them to close once they are sent.
    """
    text = _to_json(header).encode()
    count = len(fds)
    if len(frames) == 1 and type(frames[0]) is bytes and len(frames[0]) < min(_JOINED_BYTES, MAPPED_BYTES):
        # A small call or result, like most of the traffic.
        (frame,) = frames
        return [_PREFIX_OF_ONE.pack(len(text), 1, count, len(frame)) + text + frame], list(fds), []
    lengths = [nbytes(frame) for frame in frames]
    total = sum(lengths)
    if HAS_MEMORY_FILES and total >= MAPPED_BYTES:
        # If that fails (a limit on the size of files applies here, too), the frames go through the socket.
        with contextlib.suppress(OSError):
            mapped = _store(frames, lengths)
            head = _PREFIX.pack(len(text), len(frames), (count + 1) | _MAPPED)
            return [head + b"".join(map(_LENGTH.pack, lengths)) + text], [*fds, mapped], [mapped]
    head = _PREFIX.pack(len(text), len(frames), count) + b"".join(map(_LENGTH.pack, lengths)) + text
    if total < _JOINED_BYTES:
        return [head + b"".join(frames)], list(fds), []
    return [head, *frames], list(fds), []


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


def _store(frames: Sequence[Frame], lengths: Sequence[int]) -> int:
    fd = os.memfd_create("executorlib", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, sum(map(_aligned, lengths)))
        offset = 0
        for frame, length in zip(frames, lengths, strict=True):
            view = memoryview(frame).cast("B") if length else memoryview(b"")
            written = 0
            while written < length:
                written += os.pwrite(fd, view[written:], offset + written)
            offset = _aligned(offset + length)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _load(memory: int | memoryview, lengths: Sequence[int]) -> list[Frame]:
    total = 0
    starts = []
    for length in lengths:
        starts.append(total)
        total = _aligned(total + length)
    # Private and writable, so the receiver may change its arrays unseen by others. Not populated, because on a private
    # writable mapping that copies every page (measured: 5 ms for 10 MB, where reading it takes 1.5 ms of page faults).
    view = _map(memory, total) if isinstance(memory, int) else memory
    if view.nbytes < total:
        raise ValueError("less memory was passed on than its message says")
    return [view[start : start + length] for start, length in zip(starts, lengths, strict=True)]


def _map(fd: int, length: int) -> memoryview:
    """Map a file, privately and writable, for as long as anything refers to the memory."""
    if os.fstat(fd).st_size < length:
        raise ValueError("a memory file is shorter than its message says")  # reading beyond its end is a bus error
    if sys.version_info >= (3, 13):
        return memoryview(
            mmap.mmap(fd, length, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE, trackfd=False)
        )
    # Before 3.13, an mmap object kept a descriptor open for all its life: a thousand results, a thousand open files.
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    address = libc.mmap(None, length, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE, fd, 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "cannot map a received message")
    memory = (ctypes.c_ubyte * length).from_address(address)
    weakref.finalize(memory, libc.munmap, address, length).atexit = False
    return memoryview(memory).cast("B")


def _descriptors(ancillary: list[tuple[int, int, bytes]], flags: int) -> list[int]:
    """Return the descriptors in what `socket.recvmsg` returned."""
    fds: list[int] = []
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            received = array.array("i")
            received.frombytes(content[: len(content) - len(content) % received.itemsize])
            fds += received
    if flags & socket.MSG_CTRUNC:
        fds.append(_LOST)
    return fds


class Undecoded:
    """Takes the place of a `Decoder` to pass a stream on, in pieces as they come, to where it is decoded.

    A piece is a message ``["stream", [error text or "", ...]]`` with the bytes and, for each descriptor, the content of
    its memory file, or nothing if there is an error.
    """

    def feed(self, data: bytes, ancillary: list[tuple[int, int, bytes]], flags: int = 0) -> list[Message]:
        """Take what `socket.recvmsg` returned, and return it as a message."""
        errors: list[str] = []
        frames: list[Frame] = [data]
        for fd in _descriptors(ancillary, flags) if ancillary or flags else ():
            error, contents = "", memoryview(b"")
            if fd == _LOST:
                error = _TOO_MANY_FILES
            else:
                try:
                    contents = _map(fd, os.fstat(fd).st_size)
                except (OSError, ValueError) as caught:
                    error = str(caught)
                finally:
                    os.close(fd)
            errors.append(error)
            frames.append(contents)
        return [Message(["stream", errors], frames, [])]

    def close(self) -> None:
        """Do nothing, because nothing is held."""


class Decoder:
    """Cuts a stream of bytes and descriptors into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        # Descriptors, or for a stream that was passed on, the contents of their files or the error text instead.
        self._beside: deque[int | memoryview | str] = deque()

    def feed(self, data: bytes, ancillary: list[tuple[int, int, bytes]], flags: int = 0) -> list[Message]:
        """Take what `socket.recvmsg` returned, and return the messages that are complete."""
        if ancillary or flags:
            self._beside += _descriptors(ancillary, flags)
        return self._cut(data)

    def feed_passed(self, errors: Sequence[str], frames: Sequence[Frame]) -> list[Message]:
        """Take a piece of a stream that was passed on by `Undecoded`, and return the messages that are complete."""
        for error, contents in zip(errors, frames[1:], strict=True):
            self._beside.append(error or memoryview(contents))
        return self._cut(frames[0])

    def _cut(self, data: Frame) -> list[Message]:
        buffer = self._buffer
        buffer += data
        messages = []
        position = 0
        available = len(buffer)
        while available - position >= _PREFIX.size:
            header_length, frame_count, descriptors = _PREFIX.unpack_from(buffer, position)
            if header_length > _MOST_HEADER_BYTES:
                raise ValueError("not a message of executorlib")
            cursor = position + _PREFIX.size
            lengths_end = cursor + frame_count * _LENGTH.size
            if available < lengths_end + header_length:
                break
            lengths = struct.unpack_from(f"<{frame_count}Q", buffer, cursor)
            cursor = lengths_end + header_length
            mapped = bool(descriptors & _MAPPED)
            end = cursor if mapped else cursor + sum(lengths)
            if available < end:
                break
            header = _from_json(buffer[lengths_end:cursor].decode())
            taken, error = self._take(descriptors & ~_MAPPED) if descriptors else ([], None)
            frames: list[Frame] = []
            if mapped and error is None:
                memory = taken.pop()
                try:
                    frames = _load(memory, lengths)
                except OSError as caught:
                    error = caught
                finally:
                    if isinstance(memory, int):
                        os.close(memory)
            elif not mapped:
                for length in lengths:
                    # A bytearray, so that arrays rebuilt on it are writable, as the originals were.
                    frames.append(buffer[cursor : cursor + length])
                    cursor += length
            messages.append(Message(header, frames, [each for each in taken if isinstance(each, int)], error))
            position = end
        if position:
            del buffer[:position]
        return messages

    def _take(self, count: int) -> tuple[list[int | memoryview], OSError | None]:
        """Return what came beside the bytes of the next message, or the reason why it is missing."""
        taken: list[int | memoryview] = []
        for _ in range(count):
            each = self._beside.popleft()
            if isinstance(each, str) or each == _LOST:
                _close(taken)
                return [], OSError(errno.EMFILE, each if isinstance(each, str) else _TOO_MANY_FILES)
            taken.append(each)
        return taken, None

    def close(self) -> None:
        """Close the descriptors of messages that never became complete."""
        _close(self._beside)
        self._beside.clear()


def _close(beside: Iterable[int | memoryview | str]) -> None:
    for each in beside:
        if isinstance(each, int) and each != _LOST:
            os.close(each)


class Channel:
    """The executor's end of a stream to a process on this machine. It never blocks.

    Args:
        sock: A connected stream socket. The channel owns it from now on.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._decoder: Decoder | Undecoded = Decoder()
        self._out: deque[memoryview] = deque()
        self._out_fds: list[int] = []
        self._close_after: list[int] = []

    def fileno(self) -> int:
        """Return the descriptor for a selector."""
        return self._sock.fileno()

    def put(self, header: Any, frames: Sequence[Frame] = ()) -> int:
        """Append a message to what `flush` sends.

        Returns:
            The bytes of its payload.
        """
        pieces, fds, close = encode(header, frames)
        self._out.extend(memoryview(piece).cast("B") for piece in pieces if nbytes(piece))
        self._out_fds += fds
        self._close_after += close
        return sum(map(nbytes, frames))

    def put_encoded(self, data: Frame) -> None:
        """Append messages that were encoded elsewhere and have no descriptors."""
        self._out.append(memoryview(data).cast("B"))

    def pass_on(self) -> None:
        """Stop decoding what is received and pass it on, from the beginning of the stream; see `Undecoded`."""
        self._decoder = Undecoded()

    def flush(self) -> bool:
        """Send as much as the system accepts now.

        Returns:
            True if everything has been sent.

        Raises:
            OSError: The other end is gone.
        """
        out = self._out
        while out:
            # One descriptor at a time: if the other end cannot open any more files, it does not learn how many of those
            # that came together were lost. A message with a descriptor is a single piece, so none is left over.
            fds = self._out_fds[:1]
            batch = [out[index] for index in range(1 if len(self._out_fds) > 1 else min(len(out), 64))]
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            try:
                sent = self._sock.sendmsg(batch, ancillary)
            except (BlockingIOError, InterruptedError):
                return False
            if fds:
                del self._out_fds[: len(fds)]
                if not self._out_fds:
                    self._close_sent()
            while out and sent >= out[0].nbytes:
                sent -= out.popleft().nbytes
            if sent:
                out[0] = out[0][sent:]
        return True

    def receive(self, everything: bool = False) -> tuple[list[Message], bool]:
        """Read what has arrived.

        Args:
            everything: If true, read to the end, for the price of one more system call. If not, something may be left,
                and then the descriptor stays readable.

        Returns:
            The complete messages, and True if the stream has ended: closed by the other end, or unreadable.
        """
        messages: list[Message] = []
        while True:
            try:
                data, ancillary, flags, _ = self._sock.recvmsg(
                    _RECEIVE_BYTES, _ANCILLARY_BYTES, getattr(socket, "MSG_CMSG_CLOEXEC", 0)
                )
            except (BlockingIOError, InterruptedError):
                return messages, False
            except OSError:
                return messages, True
            if not data:
                return messages, True
            try:
                messages += self._decoder.feed(data, ancillary, flags)
            except (ValueError, IndexError, OSError):
                # Somebody else wrote to the worker's descriptor, so the rest cannot be cut into messages.
                return messages, True
            if len(data) < _RECEIVE_BYTES and not everything:
                return messages, False

    def _close_sent(self) -> None:
        for fd in self._close_after:
            os.close(fd)
        self._close_after.clear()

    def close(self) -> None:
        """Close the stream, and drop what was not sent."""
        self._sock.close()
        self._decoder.close()
        self._close_sent()
        self._out.clear()


class Connection:
    """A worker's end of a stream. It blocks.

    Args:
        sock: A connected stream socket. The connection owns it from now on.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(True)
        self._sock = sock
        self._decoder = Decoder()
        self._messages: deque[Message] = deque()

    def fileno(self) -> int:
        """Return the descriptor for a selector."""
        return self._sock.fileno()

    def send(self, header: Any, frames: Sequence[Frame] = (), fds: Sequence[int] = ()) -> None:
        """Send a message.

        Raises:
            OSError: The other end is gone.
        """
        pieces, all_fds, close = encode(header, frames, fds)
        try:
            views = [memoryview(piece).cast("B") for piece in pieces if nbytes(piece)]
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", all_fds))] if all_fds else []
            while views:
                sent = self._sock.sendmsg(views[:64], ancillary)
                ancillary = []
                while views and sent >= views[0].nbytes:
                    sent -= views.pop(0).nbytes
                if sent:
                    views[0] = views[0][sent:]
        finally:
            for fd in close:
                os.close(fd)

    def pending(self) -> bool:
        """Return True if a message has been read already, so that `receive` returns it at once."""
        return bool(self._messages)

    def receive(self) -> Message:
        """Wait for a message.

        Raises:
            EOFError: The other end is closed.
            OSError: Too many files were open, or there was too little memory, to receive it.
        """
        while not self._messages:
            try:
                data, ancillary, flags = self._read(_RECEIVE_BYTES)
            except MemoryError:  # raised for the receive buffer, so nothing has been read
                data, ancillary, flags = self._read(_LITTLE_BYTES)
            if not data:
                raise EOFError("the executor closed the connection")
            self._messages.extend(self._decoder.feed(data, ancillary, flags))
        message = self._messages.popleft()
        if message.error is not None:
            raise message.error
        return message

    def _read(self, size: int) -> tuple[bytes, list[Any], int]:
        return self._sock.recvmsg(size, _ANCILLARY_BYTES, getattr(socket, "MSG_CMSG_CLOEXEC", 0))[:3]

    def close(self) -> None:
        """Close the stream."""
        self._sock.close()
        self._decoder.close()
