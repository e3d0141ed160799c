"""The parts that both ends of a ZeroMQ connection share: the form of messages, and how a lost connection is noticed.

On the wire, a message is its header and the lengths of its frames as JSON, followed by the frames. Small frames in a
row are sent as one part, because every part of a message has its price. Large ones are sent in pieces: each piece that
arrives is a sign of life, and only that much memory is needed while one is encrypted or copied. CURVE
(`transports.curve`) encrypts everything.

A lost connection is not made again, because nobody knows what was lost with it. Both ends notice the end of the stream
at once. Over TCP, if the other machine goes silent, heartbeats reveal it within `SILENCE_SECONDS`. libzmq's own threads
exchange these, however busy the process is.
"""

from __future__ import annotations

import json
import struct
from collections import deque
from collections.abc import Sequence
from typing import Any

import zmq

from executorlib.serialize import Frame

# Heartbeats are sent this often, in seconds, over TCP ...
_HEARTBEAT_SECONDS = 5.0
# ... and if nothing at all arrives within this time, the other end counts as dead.
_ANSWER_SECONDS = 20.0
# So a silent machine is noticed within this time, in seconds.
SILENCE_SECONDS = _HEARTBEAT_SECONDS + _ANSWER_SECONDS

# How long a worker tries to connect, in seconds. The executor's loop lets it in, and callbacks may keep the loop busy.
CONNECT_SECONDS = 60.0

# Even over a slow network (1 MB/s), a piece must not take longer than a heartbeat's answer may.
_PIECE_BYTES = 8 * 1024 * 1024
# Below this, copying a frame is cheaper than giving it a part of its own.
_JOINED_BYTES = 8192
# From this size on, pyzmq sends memory in place, for which it keeps a thread; below, a copy takes less than 1 ms.
UNCOPIED_BYTES = 4 * 1024 * 1024

_to_json = json.JSONEncoder(separators=(",", ":")).encode

_EVENT = struct.Struct("=Hi")

# Sent by the executor to learn if a peer is still there. It is not a message.
NOTHING = b""


def pack(header: Any, frames: Sequence[Frame]) -> list[Frame]:
    """Encode a message for the wire. Only its small frames are copied."""
    views = [memoryview(frame).cast("B") if len(frame) else memoryview(b"") for frame in frames]
    parts: list[Frame] = [_to_json([header, [view.nbytes for view in views]]).encode()]
    small: list[memoryview] = []
    for view in views:
        if view.nbytes < _JOINED_BYTES:
            small.append(view)
            continue
        if small:
            parts.append(b"".join(small))
            small.clear()
        parts += [view[start : start + _PIECE_BYTES] for start in range(0, view.nbytes, _PIECE_BYTES)]
    if small:
        parts.append(b"".join(small))
    return parts


def unpack(parts: list[zmq.Frame]) -> tuple[Any, list[Frame]]:
    """Return the header and the frames of a message. Parts are removed from ``parts``, so no memory is held twice."""
    header, lengths = json.loads(parts[0].bytes)
    pieces = deque(parts[1:])
    parts.clear()
    frames: list[Frame] = []
    piece = memoryview(b"")
    for length in lengths:
        # A bytearray, so that arrays rebuilt on it are writable, as the originals were.
        frame = bytearray(length)
        start = 0
        while start < length:
            if not piece:
                piece = pieces.popleft().buffer
            count = min(length - start, piece.nbytes)
            frame[start : start + count] = piece[:count]
            piece = piece[count:]
            start += count
        frames.append(frame)
    return header, frames


def milliseconds(seconds: float) -> int:
    """Convert seconds to the unit of ZeroMQ's options."""
    return round(seconds * 1000)


def beat(sock: zmq.Socket[Any]) -> None:
    """Notice when the other end of a network connection goes silent, and let it notice when we do."""
    sock.setsockopt(zmq.HEARTBEAT_IVL, milliseconds(_HEARTBEAT_SECONDS))
    sock.setsockopt(zmq.HEARTBEAT_TIMEOUT, milliseconds(_ANSWER_SECONDS))
    sock.setsockopt(zmq.HEARTBEAT_TTL, milliseconds(SILENCE_SECONDS))


def monitor_of(sock: zmq.Socket[Any], events: int) -> zmq.Socket[Any]:
    """Return a socket that delivers events of another one. Close it after `disable_monitor` of that one."""
    where = f"inproc://executorlib.monitor.{sock.underlying}"
    sock.monitor(where, events)
    monitor: zmq.Socket[Any] = sock.context.socket(zmq.PAIR)
    # With a limit, libzmq's thread would wait for room for an event, while we close the socket and wait for the thread.
    monitor.setsockopt(zmq.RCVHWM, 0)
    monitor.setsockopt(zmq.LINGER, 0)
    monitor.connect(where)
    return monitor


def read_event(monitor: zmq.Socket[Any]) -> tuple[int, int]:
    """Return the number and the value of the next event from a socket that `monitor_of` made.

    `zmq.utils.monitor` does the same, but loads asyncio, which takes longer than everything else that a worker loads.
    """
    event: tuple[int, int] = _EVENT.unpack(monitor.recv_multipart()[0])
    return event
