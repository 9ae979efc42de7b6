"""Arrays with many zeros: lossless, small, and safe to read from anybody."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedgraft import sparse
from fedgraft.adapter import from_arrays, payload_bytes, to_arrays
from fedgraft.errors import UpdateError


@settings(deadline=None)
@given(arrays.arrays(np.float32, arrays.array_shapes(min_dims=0, max_dims=3, min_side=0)))
def test_what_goes_in_comes_out(values: np.ndarray) -> None:
    read = sparse.load(sparse.dump(values), values.shape)
    np.testing.assert_array_equal(read, values)  # -0.0 becomes 0.0, NaN stays NaN


def test_by_hand() -> None:
    """Nine entries, two of them not zero: two bytes of bits and eight of values."""
    values = np.zeros((3, 3), np.float32)
    values[0, 1], values[2, 2] = 1.0, -2.0
    data = sparse.dump(values)
    assert data[:2] == bytes([0b01000000, 0b10000000])
    assert data[2:] == np.array([1.0, -2.0], "<f4").tobytes()


@settings(deadline=None)
@given(st.binary(max_size=40), st.tuples(st.integers(-2, 9), st.integers(0, 9)))
def test_hostile_bytes_are_an_array_or_an_error(data: bytes, shape: tuple[int, int]) -> None:
    try:
        assert sparse.load(data, shape).shape == shape
    except ValueError:
        return
    assert len(sparse.dump(sparse.load(data, shape))) <= len(data)


def test_records_hold_whichever_form_is_smaller() -> None:
    few, many = torch.zeros(64, 64), torch.ones(64, 64)
    few[3, 5] = 7.0
    record = to_arrays({"few": few, "many": many, "count": torch.tensor([3])}, compact=True)
    read = from_arrays(record)
    assert torch.equal(read["few"], few) and torch.equal(read["many"], many)
    assert len(record["few"].data) == 64 * 64 // 8 + 4
    assert payload_bytes(record) < 64 * 64 * 4 + 1000
    record["few"].data = record["few"].data[:-1]
    with pytest.raises(UpdateError, match="tensor 'few' cannot be read"):
        from_arrays(record)
