"""HDF5 files of byte strings, written and read without the HDF5 library.

A job that runs a call reads one such file and writes another; loading h5py and numpy for that takes ten times as long
as starting the interpreter. So this module has the small part of the format that entries need: a root group with
one-dimensional datasets of unsigned bytes, each in one chunk that is compressed by gzip. Any HDF5 library from version
1.10 (2016) on, and thus h5py, reads these files. For HDF5 files of any other form, `unpack` returns None.

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
_CHECKSUM = struct.Struct("<I")
_LENGTH = struct.Struct("<Q")
_SUPERBLOCK_BYTES = _SUPERBLOCK.size + _CHECKSUM.size

# Types of messages in an object header (IV.A.2).
_NIL, _DATASPACE, _LINK_INFO, _DATATYPE, _FILL_VALUE, _LINK, _LAYOUT, _GROUP_INFO, _FILTERS = (
    0,
    1,
    2,
    3,
    5,
    6,
    8,
    10,
    11,
)

# IV.A.1.b, version 2; the flags say that the size of the messages takes four bytes.
_HEADER = struct.Struct("<4sBBI")
_HEADER_START = (b"OHDR", 2, 2)
_MESSAGE = struct.Struct("<BHB")
# IV.A.2.a: readers ignore messages of type 0. Ours is the last in the root group. It holds the place of the first
# header and the CRC-32 of all headers up to it: HDF5's own checksums take Python ten times as long as everything else.
_HEADERS = struct.Struct("<QI")
# IV.A.2.b, version 2: one dimension, no maximum size, simple; then the size.
_DATASPACE_START = bytes((2, 1, 0, 1))
# IV.A.2.d: class 0 (integer), little-endian, unsigned, one byte of eight bits.
_UNSIGNED_BYTE = struct.pack("<B3sIHH", 0x10, b"\0\0\0", 1, 0, 8)
# IV.A.2.f, version 3: space is allocated when written, and there is no fill value.
_NO_FILL_VALUE = bytes((3, 0x0B))
# IV.A.2.l, version 2: one filter, deflate, with one parameter, its level.
_DEFLATE = struct.Struct("<BBHHHI")
# IV.A.2.i, version 4: chunked (2), with a filter (2), rank and element (2); then the number of bytes of each size, and
# the sizes of the chunk and of an element; then the index, which is a single chunk (1), with its size in the file, the
# mask of skipped filters, and its address.
_LAYOUT_START = bytes((4, 2, 2, 2))
_SINGLE_CHUNK = struct.Struct("<BQIQ")
# IV.A.2.g, version 1, flags 0: a hard link whose name is shorter than 256 bytes.
_LINK_START = struct.Struct("<BBB")

# The fastest level, because large arrays of floats hardly shrink at any. Data whose middle does not shrink by a tenth
# is only wrapped: that is more than ten times as fast, and the file is just as good for its readers.
_LEVEL = 1
_SAMPLE_BYTES, _WORTH_IT = 1 << 16, 0.9
# Shorter values fit in one disk block anyway, and the compressor's tables would cost many pages of memory.
_SMALL_BYTES = 1024
# RFC 1950: deflate with a window of 32 KiB, fast. RFC 1951: one last block, stored; its length, then the same inverted.
_AS_IT_IS = struct.Struct("<2sBHH")
_ADLER = struct.Struct(">I")
# HDF5 stores chunk sizes in 32 bits.
MOST_BYTES = 0xFFFFFFFF


def pack(values: Mapping[str, bytes | memoryview]) -> bytearray:
    """Return the bytes of a file.

    Args:
        values: Datasets by name. Each has between one byte and `MOST_BYTES`.
    """
    file = bytearray(_SUPERBLOCK_BYTES)
    links = [
        _message(_LINK_INFO, struct.pack("<BBQQ", 0, 0, _UNDEFINED, _UNDEFINED)),
        _message(_GROUP_INFO, bytes(2)),
    ]
    chunks = []
    for name, value in values.items():
        data = _compressed(value)
        chunks.append((name, len(value), len(file), len(data)))
        file += data
    headers = len(file)
    for name, size, address, stored in chunks:
        encoded = name.encode()
        links.append(_message(_LINK, _LINK_START.pack(1, 0, len(encoded)) + encoded + _LENGTH.pack(len(file))))
        file += _with_checksum(_dataset_header(size, stored, address))
    root = len(file)
    content = b"".join(links)
    head = _HEADER.pack(*_HEADER_START, len(content) + _MESSAGE.size + _HEADERS.size)
    crc = zlib.crc32(head + content, zlib.crc32(memoryview(file)[headers:]))
    file += _with_checksum(head + content + _message(_NIL, _HEADERS.pack(headers, crc)))
    head = _SUPERBLOCK.pack(SIGNATURE, 3, 8, 8, 0, 0, _UNDEFINED, len(file), root)
    file[:_SUPERBLOCK_BYTES] = head + _CHECKSUM.pack(checksum(head))
    return file


def _compressed(value: bytes | memoryview) -> bytes:
    if len(value) <= _SMALL_BYTES:
        head = _AS_IT_IS.pack(b"\x78\x01", 1, len(value), len(value) ^ 0xFFFF)
        return b"".join((head, value, _ADLER.pack(zlib.adler32(value))))
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


# The parts that are the same in all datasets.
_SPACE_START = _MESSAGE.pack(_DATASPACE, len(_DATASPACE_START) + _LENGTH.size, 0) + _DATASPACE_START
_ELEMENTS = (
    _message(_DATATYPE, _UNSIGNED_BYTE)
    + _message(_FILL_VALUE, _NO_FILL_VALUE)
    + _message(_FILTERS, _DEFLATE.pack(2, 1, 1, 0, 1, _LEVEL))
)
_SIZE_AT = _HEADER.size + len(_SPACE_START)


def _dataset_header(size: int, stored: int, address: int) -> bytes:
    """Return the object header of a dataset, without its checksum.

    Args:
        size: Bytes of the value.
        stored: Bytes that it takes in the file.
        address: Where these begin.
    """
    layout = _message(_LAYOUT, _layout(size) + _SINGLE_CHUNK.pack(1, stored, 0, address))
    content = _SPACE_START + _LENGTH.pack(size) + _ELEMENTS + layout
    return _HEADER.pack(*_HEADER_START, len(content)) + content


def _with_checksum(header: bytes) -> bytes:
    return header + _CHECKSUM.pack(checksum(header))


class Damaged(ValueError):
    """The file is not as it was written."""


def unpack(file: bytes, names: Collection[str] | None = None) -> dict[str, bytes] | None:
    """Return the contents of a file.

    Everything that is read is compared with a checksum in the file, so changed bytes raise `Damaged` and never yield
    another value.

    Args:
        file: The bytes of the file.
        names: Datasets to return, if they exist; None for all.

    Returns:
        Datasets by name; None if the file is HDF5 but not in the form that `pack` writes.

    Raises:
        Damaged: The file is not HDF5, or not as it was written.
    """
    if not file.startswith(SIGNATURE):
        raise Damaged("it is not an HDF5 file")
    try:
        return _unpack(file, names)
    except _OtherForm:
        return None
    except (struct.error, UnicodeDecodeError, zlib.error) as error:
        raise Damaged(str(error)) from error


def most_inflated(size: int) -> int:
    """Return the most bytes that this many compressed ones can inflate to. The ratio of gzip is at most 1,032."""
    return 1032 * size + 1024


class _OtherForm(Exception):
    """The file is not in the form that `pack` writes."""


def _unpack(file: bytes, names: Collection[str] | None) -> dict[str, bytes]:
    if len(file) < _SUPERBLOCK_BYTES:
        raise Damaged("it ends too early")
    _, version, offsets, lengths, _, base, _, end, root = _SUPERBLOCK.unpack_from(file)
    if (version, offsets, lengths, base) != (3, 8, 8, 0):
        raise _OtherForm
    if end != len(file):
        raise Damaged(f"it has {len(file)} of {end} bytes")
    links = _messages(file, root)
    checked = _are_headers_right(file, root, links)
    if not checked:
        _check(file, 0, _SUPERBLOCK.size)
        _check_header(file, root)
    values = {}
    for kind, data in links:
        if kind != _LINK:
            continue
        version, flags, length = _LINK_START.unpack_from(data)
        if (version, flags) != (1, 0):
            raise _OtherForm
        name = data[_LINK_START.size : _LINK_START.size + length].decode()
        if names is None or name in names:
            (address,) = _LENGTH.unpack_from(data, _LINK_START.size + length)
            values[name] = _dataset(file, address, checked)
    return values


def _are_headers_right(file: bytes, root: int, links: list[tuple[int, bytes]]) -> bool:
    """Return True if our own checksum confirms the headers, and False if there is none.

    Raises:
        Damaged: The checksum is wrong.
    """
    kind, data = links[-1] if links else (_LINK, b"")
    if kind != _NIL:
        return False
    start, expected = _HEADERS.unpack(data)
    end = len(file) - _CHECKSUM.size - _HEADERS.size - _MESSAGE.size
    if start > root or zlib.crc32(memoryview(file)[start:end]) != expected:
        raise Damaged("the checksum of its headers is wrong")
    return True


def _dataset(file: bytes, address: int, checked: bool) -> bytes:
    if address > len(file) - _HEADER.size:
        raise Damaged(f"it has nothing at {address}")
    # In a file of ours the numbers are at these places. In any other file, the header compared below is different.
    end = address + _HEADER.size + _HEADER.unpack_from(file, address)[-1]
    (size,) = _LENGTH.unpack_from(file, address + _SIZE_AT)
    _, stored, _, chunk = _SINGLE_CHUNK.unpack_from(file, end - _SINGLE_CHUNK.size)
    if file[address:end] != _dataset_header(size, stored, chunk):
        raise _OtherForm
    if not checked:
        _check(file, address, end)
    if chunk > len(file) or stored > len(file) - chunk or size > most_inflated(stored):
        raise Damaged(f"a dataset of {size} bytes cannot be in {stored} bytes at {chunk}")
    stream = zlib.decompressobj()
    # Asking for one byte more reaches the end of the stream, where zlib verifies the stream's own checksum.
    data = stream.decompress(memoryview(file)[chunk : chunk + stored], size + 1)
    if len(data) != size or not stream.eof or stream.unused_data:
        raise Damaged(f"a dataset has {len(data)} of {size} bytes")
    return data


def _messages(file: bytes, address: int) -> list[tuple[int, bytes]]:
    if address > len(file) - _HEADER.size:
        raise Damaged(f"it has nothing at {address}")
    *start, size = _HEADER.unpack_from(file, address)
    if tuple(start) != _HEADER_START:
        raise _OtherForm
    position = address + _HEADER.size
    end = position + size
    if end > len(file) - _CHECKSUM.size:
        raise Damaged(f"it ends inside the header at {address}")
    found = []
    while position < end:
        kind, length, _ = _MESSAGE.unpack_from(file, position)
        position += _MESSAGE.size
        found.append((kind, file[position : position + length]))
        position += length
    if position != end:
        raise Damaged(f"the header at {address} does not end where it says")
    return found


def _check_header(file: bytes, address: int) -> None:
    _check(file, address, address + _HEADER.size + _HEADER.unpack_from(file, address)[-1])


def _check(file: bytes, start: int, end: int) -> None:
    """Make sure that a part of the file is as it was written, using the checksum that follows it."""
    if end > len(file) - _CHECKSUM.size or checksum(file[start:end]) != _CHECKSUM.unpack_from(file, end)[0]:
        raise Damaged(f"its checksum at {end} is wrong")


def checksum(data: bytes | memoryview) -> int:
    """Compute Bob Jenkins' lookup3 (``hashlittle`` with 0), which HDF5 uses to guard its metadata."""
    # The rotations are written out instead of called, because reading an entry needs several checksums.
    m = 0xFFFFFFFF
    a: int
    b: int
    c: int
    a = b = c = (0xDEADBEEF + len(data)) & m
    rest = len(data) % 12 or (12 if data else 0)
    body = len(data) - rest
    for x, y, z in struct.iter_unpack("<III", data[:body]):
        a, b, c = a + x & m, b + y & m, c + z & m
        a = a - c & m ^ (c << 4 & m | c >> 28)
        c = c + b & m
        b = b - a & m ^ (a << 6 & m | a >> 26)
        a = a + c & m
        c = c - b & m ^ (b << 8 & m | b >> 24)
        b = b + a & m
        a = a - c & m ^ (c << 16 & m | c >> 16)
        c = c + b & m
        b = b - a & m ^ (a << 19 & m | a >> 13)
        a = a + c & m
        c = c - b & m ^ (b << 4 & m | b >> 28)
        b = b + a & m
    if not rest:
        return c
    x, y, z = struct.unpack("<III", bytes(data[body:]) + bytes(12 - rest))
    a, b, c = a + x & m, b + y & m, c + z & m
    c = (c ^ b) - (b << 14 & m | b >> 18) & m
    a = (a ^ c) - (c << 11 & m | c >> 21) & m
    b = (b ^ a) - (a << 25 & m | a >> 7) & m
    c = (c ^ b) - (b << 16 & m | b >> 16) & m
    a = (a ^ c) - (c << 4 & m | c >> 28) & m
    b = (b ^ a) - (a << 14 & m | a >> 18) & m
    return (c ^ b) - (b << 24 & m | b >> 8) & m
