"""The little of HDF5 that entries need, against the HDF5 library."""

from __future__ import annotations

import io
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from executorlib import hdf5
from unit import repeatable

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


@pytest.mark.parametrize("size", [255, 256, 65535, 65536, 20_000_000])
def test_sizes_at_which_the_format_changes(size: int) -> None:
    value = bytes(range(256)) * (size // 256) + bytes(size % 256)
    packed = bytes(hdf5.pack({"value": value}))
    assert hdf5.unpack(packed) == {"value": value}
    with h5py.File(io.BytesIO(packed), "r") as file:
        dataset = file["value"]
        assert dataset[()].tobytes() == value
        assert (dataset.shape, dataset.dtype, dataset.compression) == ((size,), "u1", "gzip")


@pytest.mark.parametrize("size", [1_000_000, 3_000_000])
def test_what_does_not_shrink_is_only_wrapped(size: int) -> None:
    """Compressing it takes seconds for a hundred megabytes, and gains nothing."""
    value = os.urandom(size)
    packed = bytes(hdf5.pack({"value": value, "zeros": bytes(size)}))
    assert size < len(packed) < 1.02 * size
    assert value[1000:20_000] in packed
    assert hdf5.unpack(packed) == {"value": value, "zeros": bytes(size)}
    with h5py.File(io.BytesIO(packed), "r") as file:
        assert file["value"][()].tobytes() == value


def test_only_what_was_asked_for() -> None:
    packed = bytes(hdf5.pack({"a": b"1", "b": b"2"}))
    assert hdf5.unpack(packed, {"b", "c"}) == {"b": b"2"}


@pytest.mark.parametrize("version", ["earliest", "latest"])
def test_files_of_the_library_are_left_to_it(version: str) -> None:
    image = io.BytesIO()
    with h5py.File(image, "w", libver=version) as file:
        file["value"] = 3
    assert hdf5.unpack(image.getvalue()) is None


def test_every_change_is_noticed_or_harmless() -> None:
    values = {"value": b"some bytes " * 20, "other": b"1"}
    packed = bytes(hdf5.pack(values))
    for position in range(len(packed)):
        damaged = bytearray(packed)
        damaged[position] ^= 0x41
        found = hdf5.unpack(bytes(damaged))
        assert found is None or all(found[name] == values[name] for name in found.keys() & values.keys())
    for length in range(len(packed)):
        assert hdf5.unpack(packed[:length]) is None
