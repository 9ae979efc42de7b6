"""Many arrays in one: what a message holds travels as one object in place of hundreds.

Flower sends every array as two objects, and every object as a request of its own, with headers of
about 900 bytes and some 50 ms of work on its way; an adapter of a small model has a hundred arrays.
A parcel is one array whose bytes are the length of a table (8 bytes, little-endian), the table
(JSON: name, dtype, shape, serialisation and size of each array) and the arrays' bytes, one after
another. Only FedGraft's own clients read them.
"""

from __future__ import annotations

import json
from typing import Any

from flwr.app import Array, ArrayRecord

from fedgraft.errors import UpdateError

_NAME, _FORM = "parcel", "fedgraft.parcel"
_LENGTH = 8  # bytes that say how long the table is
_LONGEST_TABLE = 1 << 22  # bytes, which are some 40,000 arrays: reading it takes 20 times as many
_MOST_DIMENSIONS = 32


def pack(arrays: ArrayRecord) -> ArrayRecord:
    """Return one array that holds these; no array at all stays none."""
    if not arrays:
        return arrays
    table = [
        [name, array.dtype, list(array.shape), array.stype, len(array.data)]
        for name, array in arrays.items()
    ]
    head = json.dumps(table, separators=(",", ":")).encode()
    parts = [len(head).to_bytes(_LENGTH, "little"), head, *(a.data for a in arrays.values())]
    data = b"".join(parts)
    return ArrayRecord({_NAME: Array("uint8", (len(data),), _FORM, data)})


def is_packed(arrays: ArrayRecord) -> bool:
    """Whether these arrays are a parcel."""
    return len(arrays) == 1 and next(iter(arrays.values())).stype == _FORM


def unpack(arrays: ArrayRecord) -> ArrayRecord:
    """Return the arrays of a parcel; other arrays as they are.

    A parcel is untrusted: its table must say of every byte whose it is.

    Raises:
        UpdateError: it is not whole.
    """
    if not is_packed(arrays):
        return arrays
    data = memoryview(next(iter(arrays.values())).data)
    at = _LENGTH + int.from_bytes(data[:_LENGTH], "little")
    found = ArrayRecord()
    try:
        if at > len(data):
            raise ValueError("its table is cut off")
        if at - _LENGTH > _LONGEST_TABLE:
            raise ValueError("its table is too long")
        for row in json.loads(bytes(data[_LENGTH:at])):
            name, dtype, shape, form, size = _checked(row)
            if name in found or size > len(data) - at:
                raise ValueError(f"{name[:100]!r} is there twice, or cut off")
            found[name] = Array(dtype, shape, form, bytes(data[at : at + size]))
            at += size
        if at != len(data):
            raise ValueError(f"{len(data) - at} bytes are nobody's")
    except (ValueError, TypeError, RecursionError) as error:
        raise UpdateError(f"the parcel of arrays cannot be read: {error}") from error
    return found


def _checked(row: Any) -> tuple[str, str, tuple[int, ...], str, int]:
    name, dtype, shape, form, size = row
    if not (isinstance(name, str) and isinstance(dtype, str) and isinstance(form, str)):
        raise ValueError("a name is no text")
    if not isinstance(shape, list) or len(shape) > _MOST_DIMENSIONS:
        raise ValueError(f"the shape of {name[:100]!r} is no list")
    if any(type(n) is not int or n < 0 for n in [*shape, size]):
        raise ValueError(f"a size of {name[:100]!r} is no number")
    if form == _FORM:
        raise ValueError("a parcel holds no parcel")
    return name, dtype, tuple(shape), form, size
