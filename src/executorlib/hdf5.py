"""HDF5 files of byte strings, written and read without the HDF5 library.

A job that runs a call reads one such file and writes another; loading h5py and numpy for that takes ten times as long
as starting the interpreter. So the little that entries need of the format is here: a root group, and in it
one-dimensional datasets of unsigned bytes, each one chunk, compressed by gzip. Any HDF5 library from version 1.10 on
(2016), and so h5py, reads these files. Of files from elsewhere `unpack` says that they are not of this form.

Source: The HDF Group, *HDF5 File Format Specification Version 3.0*. Numbers in comments are its sections.
"""

from __future__ import annotations

import struct
import zlib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

SIGNATURE = b"\x89HDF\r\n\x1a\n"
_UNDEFINED = 0xFFFFFFFFFFFFFFFF
# II.A, version 3: sizes of offsets and lengths, flags; base, extension, end of file, root group; checksum.
_SUPERBLOCK = struct.Struct("<8sBBBBQQQQ")
_SUPERBLOCK_BYTES = _SUPERBLOCK.size + 4

# Types of messages in an object header (IV.A.2).
_DATASPACE, _LINK_INFO, _DATATYPE, _FILL_VALUE, _LINK, _LAYOUT, _GROUP_INFO, _FILTERS = 1, 2, 3, 5, 6, 8, 10, 11

# IV.A.1.b, version 2, flags: the size of the messages takes four bytes.
_HEADER = struct.Struct("<4sBBI")
_HEADER_START = (b"OHDR", 2, 2)
_MESSAGE = struct.Struct("<BHB")
# IV.A.2.d: class 0 (integer), little-endian, unsigned, of one byte with eight bits.
_UNSIGNED_BYTE = struct.pack("<B3sIHH", 0x10, b"\0\0\0", 1, 0, 8)
# IV.A.2.f, version 3: allocated when written, no value.
_NO_FILL_VALUE = bytes((3, 0x0B))
# IV.A.2.l, version 2: one filter, deflate, with one parameter, its level.
_DEFLATE = struct.Struct("<BBHHHI")
# IV.A.2.i, version 4: chunked (2), with filter (2), rank and element (2); then how many bytes each size has, and the
# sizes of the chunk and of an element; then the index, a single chunk (1), with its size in the file, the mask of
# filters that were left out, and the address.
_LAYOUT_START = bytes((4, 2, 2, 2))
_SINGLE_CHUNK = struct.Struct("<BQIQ")
# IV.A.2.g, version 1, flags 0: a hard link with a name of less than 256 bytes.
_LINK_START = struct.Struct("<BBB")

# Large arrays of floats hardly shrink at any level, so the fastest; and what does not shrink by a tenth, as its middle
# tells, is only wrapped: that is more than ten times as fast, and the file is as good for all who read it.
_LEVEL = 1
_SAMPLE_BYTES, _WORTH_IT = 1 << 16, 0.9
# Chunks have sizes of 32 bits.
MOST_BYTES = 0xFFFFFFFF


def pack(values: Mapping[str, bytes | memoryview]) -> bytearray:
    """Return the bytes of a file.

    Args:
        values: Datasets by name; each holds at least one byte and at most `MOST_BYTES`.
    """
    file = bytearray(_SUPERBLOCK_BYTES)
    links = [
        _message(_LINK_INFO, struct.pack("<BBQQ", 0, 0, _UNDEFINED, _UNDEFINED)),
        _message(_GROUP_INFO, bytes(2)),
    ]
    for name, value in values.items():
        size = len(value)
        data = _compressed(value)
        address = len(file)
        file += data
        encoded = name.encode()
        links.append(_message(_LINK, _LINK_START.pack(1, 0, len(encoded)) + encoded + struct.pack("<Q", len(file))))
        file += _object_header(
            _message(_DATASPACE, struct.pack("<BBBBQ", 2, 1, 0, 1, size)),
            _message(_DATATYPE, _UNSIGNED_BYTE),
            _message(_FILL_VALUE, _NO_FILL_VALUE),
            _message(_FILTERS, _DEFLATE.pack(2, 1, 1, 0, 1, _LEVEL)),
            _message(_LAYOUT, _layout(size) + _SINGLE_CHUNK.pack(1, len(data), 0, address)),
        )
    root = len(file)
    file += _object_header(*links)
    head = _SUPERBLOCK.pack(SIGNATURE, 3, 8, 8, 0, 0, _UNDEFINED, len(file), root)
    file[:_SUPERBLOCK_BYTES] = head + struct.pack("<I", checksum(head))
    return file


def _compressed(value: bytes | memoryview) -> bytes:
    if len(value) > 4 * _SAMPLE_BYTES:
        middle = len(value) // 2
        sample = value[middle : middle + _SAMPLE_BYTES]
        if len(zlib.compress(sample, _LEVEL)) > _WORTH_IT * _SAMPLE_BYTES:
            return zlib.compress(value, 0)
    return zlib.compress(value, _LEVEL)


def _layout(size: int) -> bytes:
    each = (size.bit_length() + 7) // 8
    return _LAYOUT_START + bytes((each,)) + size.to_bytes(each, "little") + (1).to_bytes(each, "little")


def _message(kind: int, data: bytes) -> bytes:
    return _MESSAGE.pack(kind, len(data), 0) + data


def _object_header(*messages: bytes) -> bytes:
    content = b"".join(messages)
    header = _HEADER.pack(*_HEADER_START, len(content)) + content
    return header + struct.pack("<I", checksum(header))


def unpack(file: bytes, names: Collection[str] | None = None) -> dict[str, bytes] | None:
    """Return what a file holds.

    Args:
        file: Its bytes.
        names: Datasets to return, where they are there; None for all.

    Returns:
        Datasets by name; None where the file is not of the form that `pack` writes, or damaged.
    """
    try:
        return _unpack(file, names)
    except (struct.error, UnicodeDecodeError, zlib.error, _OtherForm):
        return None


class _OtherForm(Exception):
    """The file is not one of ours."""


def _unpack(file: bytes, names: Collection[str] | None) -> dict[str, bytes]:
    signature, version, offsets, lengths, _, base, _, end, root = _SUPERBLOCK.unpack_from(file)
    if (signature, version, offsets, lengths, base) != (SIGNATURE, 3, 8, 8, 0) or end != len(file):
        raise _OtherForm
    values = {}
    for kind, data in _messages(file, root):
        if kind != _LINK:
            continue
        version, flags, length = _LINK_START.unpack_from(data)
        if (version, flags) != (1, 0):
            raise _OtherForm
        name = data[_LINK_START.size : _LINK_START.size + length].decode()
        if names is None or name in names:
            (address,) = struct.unpack_from("<Q", data, _LINK_START.size + length)
            values[name] = _dataset(file, address)
    return values


def _dataset(file: bytes, address: int) -> bytes:
    messages = dict(_messages(file, address))
    if messages.get(_DATATYPE) != _UNSIGNED_BYTE or messages.get(_FILTERS) != _DEFLATE.pack(2, 1, 1, 0, 1, _LEVEL):
        raise _OtherForm
    layout = messages.get(_LAYOUT, b"")
    index, stored, mask, chunk = _SINGLE_CHUNK.unpack(layout[-_SINGLE_CHUNK.size :])
    data = zlib.decompress(memoryview(file)[chunk : chunk + stored])
    if (index, mask) != (1, 0) or layout[: -_SINGLE_CHUNK.size] != _layout(len(data)):
        raise _OtherForm
    return data


def _messages(file: bytes, address: int) -> list[tuple[int, bytes]]:
    *start, size = _HEADER.unpack_from(file, address)
    if tuple(start) != _HEADER_START:
        raise _OtherForm
    found = []
    position = address + _HEADER.size
    end = position + size
    while position < end:
        kind, length, _ = _MESSAGE.unpack_from(file, position)
        position += _MESSAGE.size
        found.append((kind, bytes(file[position : position + length])))
        position += length
    return found


def checksum(data: bytes) -> int:
    """Bob Jenkins' lookup3 (``hashlittle`` with 0), by which HDF5 guards its metadata."""
    a = b = c = (0xDEADBEEF + len(data)) & 0xFFFFFFFF
    rest = len(data) % 12 or (12 if data else 0)
    body = len(data) - rest
    for position in range(0, body, 12):
        x, y, z = struct.unpack_from("<III", data, position)
        a, b, c = _mix((a + x) & 0xFFFFFFFF, (b + y) & 0xFFFFFFFF, (c + z) & 0xFFFFFFFF)
    if not rest:
        return c
    x, y, z = struct.unpack("<III", data[body:] + bytes(12 - rest))
    return _final((a + x) & 0xFFFFFFFF, (b + y) & 0xFFFFFFFF, (c + z) & 0xFFFFFFFF)


def _mix(a: int, b: int, c: int) -> tuple[int, int, int]:
    # In turns of a, c, b, as the original has it; each step takes one, adds another, and rotates in a third.
    for first, second, third in ((4, 6, 8), (16, 19, 4)):
        a = (a - c & 0xFFFFFFFF) ^ _rotated(c, first)
        c = c + b & 0xFFFFFFFF
        b = (b - a & 0xFFFFFFFF) ^ _rotated(a, second)
        a = a + c & 0xFFFFFFFF
        c = (c - b & 0xFFFFFFFF) ^ _rotated(b, third)
        b = b + a & 0xFFFFFFFF
    return a, b, c


def _final(a: int, b: int, c: int) -> int:
    c = (c ^ b) - _rotated(b, 14) & 0xFFFFFFFF
    a = (a ^ c) - _rotated(c, 11) & 0xFFFFFFFF
    b = (b ^ a) - _rotated(a, 25) & 0xFFFFFFFF
    c = (c ^ b) - _rotated(b, 16) & 0xFFFFFFFF
    a = (a ^ c) - _rotated(c, 4) & 0xFFFFFFFF
    b = (b ^ a) - _rotated(a, 14) & 0xFFFFFFFF
    return (c ^ b) - _rotated(b, 24) & 0xFFFFFFFF


def _rotated(value: int, bits: int) -> int:
    return (value << bits | value >> 32 - bits) & 0xFFFFFFFF
