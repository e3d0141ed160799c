"""The little of HDF5 that entries need, against the HDF5 library."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import tracemalloc
import zlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from executorlib.cache import hdf5
from unit.properties import repeatable

h5py = pytest.importorskip("h5py")

NAMES = st.text(st.characters(min_codepoint=48, max_codepoint=122, categories=["L", "N"]), min_size=1, max_size=20)


@pytest.mark.parametrize(
    ("data", "expected"),
    # The first two are the examples in the original's own comments.
    [(b"", 0xDEADBEEF), (b"Four score and seven years ago", 0x17770551)],
)
def test_checksum(data: bytes, expected: int) -> None:
    assert hdf5.checksum(data) == expected


@repeatable
@given(st.dictionaries(NAMES, st.binary(min_size=1, max_size=300), max_size=9))
def test_the_library_reads_what_we_write(values: dict[str, bytes]) -> None:
    packed = bytes(hdf5.pack(values))
    assert hdf5.unpack(packed) == values
    with h5py.File(io.BytesIO(packed), "r") as file:
        assert {name: file[name][()].tobytes() for name in file} == values


@pytest.mark.parametrize("size", [255, 256, 1024, 1025, 65535, 65536, 20_000_000])
def test_sizes_at_which_the_format_changes(size: int) -> None:
    value = bytes(range(256)) * (size // 256) + bytes(size % 256)
    packed = bytes(hdf5.pack({"value": value}))
    assert hdf5.unpack(packed) == {"value": value}
    with h5py.File(io.BytesIO(packed), "r") as file:
        dataset = file["value"]
        assert dataset[()].tobytes() == value
        assert (dataset.shape, dataset.dtype, dataset.compression) == ((size,), "u1", "gzip")


@pytest.mark.parametrize("size", [1_000_000, 3_000_000])
def test_incompressible_data_is_stored_as_it_is(size: int) -> None:
    """Compressing it takes seconds for a hundred megabytes, and gains nothing."""
    value = os.urandom(size)
    packed = bytes(hdf5.pack({"value": value, "zeros": bytes(size)}))
    assert size < len(packed) < 1.02 * size
    assert value[1000:20_000] in packed
    assert hdf5.unpack(packed) == {"value": value, "zeros": bytes(size)}
    with h5py.File(io.BytesIO(packed), "r") as file:
        assert file["value"][()].tobytes() == value


def test_only_requested_datasets_are_read() -> None:
    packed = bytes(hdf5.pack({"a": b"1", "b": b"2"}))
    assert hdf5.unpack(packed, {"b", "c"}) == {"b": b"2"}


@pytest.mark.parametrize("version", ["earliest", "latest"])
def test_files_of_the_library_are_left_to_it(version: str) -> None:
    image = io.BytesIO()
    with h5py.File(image, "w", libver=version) as file:
        file["value"] = 3
    assert hdf5.unpack(image.getvalue()) is None


VALUES = {"output": b"some bytes " * 20, "input_args": b"1", "function": os.urandom(300)}


def as_written_or_damaged(file: bytes) -> None:
    """All of a file that can be read is as it was written."""
    with contextlib.suppress(hdf5.Damaged):
        found = hdf5.unpack(file)
        assert found is None or found == VALUES


def without_our_checksum(file: bytes) -> bytes:
    """A file as other writers of this form would make it, with HDF5's own checksums alone."""
    image = bytearray(file)
    message = len(image) - 4 - 12 - 4
    image[message] = 0x18  # another type that readers ignore
    image[-4:] = struct.pack("<I", hdf5.checksum(image[image.rindex(b"OHDR") : -4]))
    return bytes(image)


@pytest.mark.parametrize("change", [bytes, without_our_checksum])
def test_every_changed_byte_is_noticed(change: Callable[[bytes], bytes]) -> None:
    packed = change(bytes(hdf5.pack(VALUES)))
    assert hdf5.unpack(packed) == VALUES
    for position in range(len(packed)):
        damaged = bytearray(packed)
        damaged[position] ^= 0x41
        as_written_or_damaged(bytes(damaged))
    for length in range(len(packed)):
        with pytest.raises(hdf5.Damaged):
            hdf5.unpack(packed[:length])


@repeatable
@given(st.data())
def test_no_damage_gives_another_value(data: st.DataObject) -> None:
    """Blocks of a file are swapped, as on a disk. Each block may be intact in itself."""
    change = data.draw(st.sampled_from([bytes, without_our_checksum]))
    damaged = bytearray(change(bytes(hdf5.pack(VALUES))))
    for _ in range(data.draw(st.integers(1, 4))):
        size = data.draw(st.integers(1, 64))
        target = data.draw(st.integers(0, len(damaged) - size))
        source = data.draw(st.integers(0, len(damaged) - size))
        replacement = data.draw(st.one_of(st.just(bytes(damaged[source : source + size])), st.binary(max_size=size)))
        damaged[target : target + len(replacement)] = replacement
    as_written_or_damaged(bytes(damaged))


def test_swapped_addresses_are_noticed() -> None:
    """One dataset's address is in the place of another's."""
    for change in (bytes, without_our_checksum):
        damaged = bytearray(change(bytes(hdf5.pack(VALUES))))
        at = {name: damaged.index(bytes([len(name)]) + name.encode()) + 1 + len(name) for name in VALUES}
        damaged[at["output"] : at["output"] + 8] = damaged[at["input_args"] : at["input_args"] + 8]
        with pytest.raises(hdf5.Damaged):
            hdf5.unpack(bytes(damaged))


def test_data_that_inflates_beyond_its_stated_size() -> None:
    """A megabyte that claims to be one byte, and would become a gigabyte, takes no memory."""
    bomb = zlib.compress(bytes(50_000_000), 9)
    packed = bytearray(hdf5.pack({"output": b"1"}))
    # The one chunk, and all that tells its size, place and checksums.
    small = zlib.compress(b"1", 0)
    assert packed.count(small) == 1
    start = packed.index(small)
    forged = packed[:start] + bomb + packed[start + len(small) :]
    added = len(bomb) - len(small)
    header, root = forged.index(b"OHDR"), forged.rindex(b"OHDR")
    single = struct.pack("<BQIQ", 1, len(small), 0, start)
    forged = forged.replace(single, struct.pack("<BQIQ", 1, len(bomb), 0, start))
    forged = forged.replace(struct.pack("<Q", header - added), struct.pack("<Q", header))
    forged[28:44] = struct.pack("<QQ", len(forged), root)
    forged[44:48] = struct.pack("<I", hdf5.checksum(forged[:44]))
    crc = zlib.crc32(forged[header:-20])
    forged[-16:-4] = struct.pack("<QI", header, crc)
    tracemalloc.start()
    try:
        with pytest.raises(hdf5.Damaged, match=r"has 2 of 1"):
            hdf5.unpack(bytes(forged))
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()
