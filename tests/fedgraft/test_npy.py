"""Arrays as .npy bytes: what numpy writes and reads, and nothing that it would refuse."""

from __future__ import annotations

import io
from tokenize import TokenError

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedgraft import npy

DTYPES = st.sampled_from(["<f4", ">f4", "<f2", "<f8", "<i8", "|u1", "|b1"])
any_array = arrays.arrays(DTYPES, arrays.array_shapes(min_dims=0, max_dims=3, min_side=0))


def saved(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def with_header(text: str, data: bytes = b"", version: int = 1) -> bytes:
    length = len(text).to_bytes({1: 2, 2: 4, 3: 4}[version], "little")
    return b"\x93NUMPY" + bytes([version, 0]) + length + text.encode() + data


@given(array=any_array)
def test_it_writes_and_reads_what_numpy_does(array: np.ndarray) -> None:
    assert npy.dump(array) == saved(array)
    read = npy.load(saved(array))
    assert read.dtype == array.dtype and read.shape == array.shape
    np.testing.assert_array_equal(read, array)


def test_arrays_that_do_not_lie_in_c_order() -> None:
    array = np.arange(12.0).reshape(3, 4)
    assert npy.dump(array.T) == saved(np.ascontiguousarray(array.T))
    np.testing.assert_array_equal(npy.load(saved(array.T)), array.T)  # numpy says: by columns
    assert npy.dump(array[:, ::2]) == saved(array[:, ::2])


def test_a_longer_header_of_version_2() -> None:
    text = "{'descr':'<f4','fortran_order':False,'shape':(2,)}"
    data = np.array([1.0, 2.0], "<f4").tobytes()
    assert npy.load(with_header(text, data, version=2)).tolist() == [1.0, 2.0]


GOOD = saved(np.zeros((3, 4), np.float32))
FLOATS = "{{'descr':'<f4','fortran_order':False,'shape':{shape}}}"


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"\x80\x04]\x94.", id="a pickle"),
        pytest.param(GOOD[:40], id="half a header"),
        pytest.param(GOOD[:-1], id="one byte short"),
        pytest.param(GOOD[:-4], id="one number short"),
        pytest.param(GOOD + bytes(4), id="one number more"),
        pytest.param(
            with_header("{'descr':'|O','fortran_order':False,'shape':(1,)}"), id="objects"
        ),
        pytest.param(with_header(FLOATS.format(shape="(-1,)"), bytes(8)), id="any length"),
        pytest.param(with_header(FLOATS.format(shape="(-1,-2)"), bytes(8)), id="negative"),
        pytest.param(with_header(FLOATS.format(shape="(9**9,)"), bytes(8)), id="an expression"),
        pytest.param(with_header(FLOATS.format(shape=f"({10**15},)"), bytes(8)), id="a petabyte"),
        pytest.param(with_header(FLOATS.format(shape="(2,)"), bytes(8), version=3), id="version 3"),
        pytest.param(with_header("__import__('os')", bytes(8)), id="code"),
        pytest.param(with_header("(" * 5000, bytes(8)), id="deep nesting"),
        pytest.param(with_header(" " * 20_000, bytes(8)), id="a long header"),
    ],
)
def test_what_is_not_one_array_is_refused(data: bytes) -> None:
    with pytest.raises((ValueError, TypeError, SyntaxError, TokenError, MemoryError)):
        npy.load(data)
