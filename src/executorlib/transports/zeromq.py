"""What both ends of a ZeroMQ connection have in common: the form of messages, and how a lost connection is noticed.

On the wire a message is its header and the lengths of its frames as JSON, then the frames: small ones that follow each
other as one, for every part of a message has its price, and large ones in pieces: a piece that arrives is a sign of
life, and while one is encrypted or copied, only that much memory is taken. CURVE (`transports.curve`) encrypts it all.

A connection that was lost is not made again, as nobody knows what was lost with it. Both ends notice: by the end of the
stream at once, and where the other machine went silent, over TCP, within `SILENCE_SECONDS` by heartbeats. libzmq's own
threads exchange these, however busy the process is.
"""

from __future__ import annotations

import json
import struct
from collections import deque
from collections.abc import Sequence
from typing import Any

import zmq

from executorlib.serialize import Frame

# Sent this often, in seconds, over TCP ...
_HEARTBEAT_SECONDS = 5.0
# ... and answered by anything within this time, or the other end counts as dead.
_ANSWER_SECONDS = 20.0
# So a machine that went silent is noticed within this time, in seconds.
SILENCE_SECONDS = _HEARTBEAT_SECONDS + _ANSWER_SECONDS

# How long a worker tries to connect, in seconds. The executor's loop lets it in, and callbacks may keep that busy.
CONNECT_SECONDS = 60.0

# Over a slow network (1 MB/s) a piece must not take longer than an answer to a heartbeat may.
_PIECE_BYTES = 8 * 1024 * 1024
# Below this, copying a frame is cheaper than a part of its own.
_JOINED_BYTES = 8192
# From here on pyzmq sends memory where it is, for which it keeps a thread of its own; below, a copy takes under 1 ms.
UNCOPIED_BYTES = 4 * 1024 * 1024

_to_json = json.JSONEncoder(separators=(",", ":")).encode

_EVENT = struct.Struct("=Hi")

# What the executor sends to learn whether a peer is there; no message.
NOTHING = b""


def pack(header: Any, frames: Sequence[Frame]) -> list[Frame]:
    """Put a message into the form of the wire; of its frames only small ones are copied."""
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
    """Header and frames of a message; what was received is taken out of ``parts``, so that no memory is held twice."""
    header, lengths = json.loads(parts[0].bytes)
    pieces = deque(parts[1:])
    parts.clear()
    frames: list[Frame] = []
    piece = memoryview(b"")
    for length in lengths:
        # A bytearray: arrays rebuilt on it are writable, as the originals were.
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
    """Seconds in the unit of ZeroMQ's options."""
    return round(seconds * 1000)


def beat(sock: zmq.Socket[Any]) -> None:
    """Notice when the other end of a connection over the network goes silent, and have it notice when we do."""
    sock.setsockopt(zmq.HEARTBEAT_IVL, milliseconds(_HEARTBEAT_SECONDS))
    sock.setsockopt(zmq.HEARTBEAT_TIMEOUT, milliseconds(_ANSWER_SECONDS))
    sock.setsockopt(zmq.HEARTBEAT_TTL, milliseconds(SILENCE_SECONDS))


def monitor_of(sock: zmq.Socket[Any], events: int) -> zmq.Socket[Any]:
    """A socket from which events of another one are read; to be closed after `disable_monitor` of that one."""
    where = f"inproc://executorlib.monitor.{sock.underlying}"
    sock.monitor(where, events)
    monitor: zmq.Socket[Any] = sock.context.socket(zmq.PAIR)
    # libzmq's thread would wait for room for an event, and we, to close the socket, for libzmq's thread.
    monitor.setsockopt(zmq.RCVHWM, 0)
    monitor.setsockopt(zmq.LINGER, 0)
    monitor.connect(where)
    return monitor


def read_event(monitor: zmq.Socket[Any]) -> tuple[int, int]:
    """Number and value of the next event from a socket that `monitor_of` made.

    `zmq.utils.monitor` does it, too, and loads asyncio, which takes longer than all else that a worker loads.
    """
    event: tuple[int, int] = _EVENT.unpack(monitor.recv_multipart()[0])
    return event
