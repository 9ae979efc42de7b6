"""Arrays packed into one: back as they were, and no parcel of a hostile client is believed."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from fedgraft.errors import UpdateError
from fedgraft.messages import ARRAYS, TrainRequest, array_bytes
from fedgraft.parcel import is_packed, pack, unpack

NAMES = st.text(min_size=1, max_size=20)
VALUES = arrays_of.arrays(
    st.sampled_from([np.float32, np.float16, np.int64]),
    arrays_of.array_shapes(min_dims=0, min_side=0),
)


def record(named: dict[str, Any]) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(value)) for name, value in named.items()})


@given(st.dictionaries(NAMES, VALUES, min_size=1))
def test_what_was_packed_comes_back(named: dict[str, Any]) -> None:
    sent = record(named)
    parcel = pack(sent)
    assert is_packed(parcel) and len(parcel) == 1
    back = unpack(parcel)
    assert list(back) == list(sent)
    for name, array in sent.items():
        got = back[name]
        told = (got.dtype, tuple(got.shape), got.stype, got.data)
        assert told == (array.dtype, tuple(array.shape), array.stype, array.data)


def test_a_parcel_by_hand() -> None:
    """Two arrays of 3 and 2 bytes: 8 bytes of length, the table, 5 bytes."""
    sent = ArrayRecord({"a": Array("x", (3,), "f", b"abc"), "b": Array("y", (1, 2), "f", b"de")})
    table = b'[["a","x",[3],"f",3],["b","y",[1,2],"f",2]]'
    (array,) = pack(sent).values()
    assert array.data == len(table).to_bytes(8, "little") + table + b"abcde"
    assert array_bytes(RecordDict({ARRAYS: pack(sent)})) == 8 + len(table) + 5


def test_other_arrays_and_none_stay_as_they_are() -> None:
    plain = record({"a": np.ones(3)})
    assert unpack(plain) is plain and not is_packed(plain)
    nothing = ArrayRecord()
    assert pack(nothing) is nothing and unpack(nothing) is nothing


def made(table: object, data: bytes = b"abc", length: int | None = None) -> ArrayRecord:
    head = table if isinstance(table, bytes) else json.dumps(table).encode()
    whole = (len(head) if length is None else length).to_bytes(8, "little") + head + data
    return ArrayRecord({"parcel": Array("uint8", (len(whole),), "fedgraft.parcel", whole)})


GOOD = ["a", "x", [3], "f", 3]


@pytest.mark.parametrize(
    "parcel",
    [
        made([GOOD], b"ab"),
        made([GOOD], b"abcd"),
        made([GOOD, ["a", "x", [0], "f", 0]]),
        made([["a", "x", [3], "f", -1]]),
        made([["a", "x", [3], "f", True]], b"a"),
        made([["a", "x", [-3], "f", 3]]),
        made([["a", "x", 3, "f", 3]]),
        made([["a", "x", [1] * 33, "f", 3]]),
        made([[1, "x", [3], "f", 3]]),
        made([["a", "x", [3], "fedgraft.parcel", 3]]),
        made([["a", "x", [3], "f"]]),
        made(7),
        made({"a": 1}),
        made(b"{"),
        made(b"\xff"),
        made(b"[" * 100_000),
        made([GOOD], length=2**62),
    ],
    ids=range(17),
)
def test_a_parcel_that_is_not_whole_is_refused(parcel: ArrayRecord) -> None:
    unpack(made([GOOD]))
    with pytest.raises(UpdateError, match="parcel"):
        unpack(parcel)


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    parcel = ArrayRecord({"parcel": Array("uint8", (len(data),), "fedgraft.parcel", data)})
    with suppress(UpdateError):
        unpack(parcel)


def test_a_request_says_whether_it_was_packed() -> None:
    plain = record({"a": np.ones(3)})
    for arrays, packed in ((plain, False), (pack(plain), True)):
        request = TrainRequest.decode(TrainRequest(1, arrays, companions=arrays).encode())
        assert request.packed == packed
        assert request.companions is not None
        assert list(request.arrays) == list(request.companions) == ["a"]
