"""Arrays out of zips of anybody: what numpy and torch would map, inflate or make room for unasked is refused before."""

import io
import struct
import zipfile

import numpy as np
import pytest
import torch

from prefetch.errors import FormatError
from prefetch.zipped import Header, check_stored, names_in, npy_of, whole


def npy(descr: str, shape: str, body: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text + body


def saved(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize("order", ["C", "F"])
def test_an_array_comes_out_as_it_was_saved(order):
    array = np.asarray(np.arange(24).reshape(2, 3, 4), order=order)
    np.testing.assert_array_equal(npy_of(saved(array)), array)


@pytest.mark.parametrize(
    "data",
    [
        npy("'|S0'", "(-1,)", b"x"),  # ended the process where it was mapped
        npy("'<U0'", "(3,)"),
        npy("'|u1'", "(-1, 2)", b"xx"),
        npy("'<i8'", "(4611686018427387904, 2)"),
        npy("'|O'", "(1,)", b"x" * 8),
        npy("[('a', '|O')]", "(1,)", b"x" * 8),
        npy("'|u1'", "(1,)", b"x", version=b"\x03\x00"),
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff{}",  # room for 4 GiB of header
        b"\x93NUMPY\x01\x00\xff\xff{}",
    ],
)
def test_a_header_that_lies_is_refused(data):
    with pytest.raises((FormatError, ValueError)):
        Header.of(io.BytesIO(data), len(data))


def test_an_npz_gives_its_arrays_and_refuses_a_bomb(tmp_path):
    np.savez(tmp_path / "a.npz", ids=np.arange(6).reshape(2, 3), word=np.float32(1.5))
    assert names_in(tmp_path / "a.npz") == ("ids", "word")
    assert whole(tmp_path / "a.npz", "ids").tolist() == [[0, 1, 2], [3, 4, 5]]
    assert whole(tmp_path / "a.npz", "word") == 1.5
    with zipfile.ZipFile(tmp_path / "b.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("ids.npy", npy("'|u1'", f"({1 << 27},)", bytes(1 << 27)))
    with pytest.raises(FormatError, match="zip bomb"):
        names_in(tmp_path / "b.npz")


def test_torch_deflates_nothing(tmp_path):
    torch.save({"a": torch.zeros(3)}, tmp_path / "a.pt")
    with (tmp_path / "a.pt").open("rb") as file:
        check_stored(file)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(1 << 20))
    with pytest.raises(FormatError, match="would inflate"):
        check_stored(packed)
