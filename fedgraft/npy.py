"""Arrays as .npy bytes (numpy.lib.format), with headers written and parsed once a shape.

Flower carries arrays in this format. Its header is Python source, and parsing that takes numpy
longer than all the rest of a small tensor's way; a federation sees the same few headers again and
again. What is written equals `numpy.save`, byte for byte.
"""

from __future__ import annotations

import math
from functools import lru_cache
from io import BytesIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

_LENGTH_BYTES = {(1, 0): 2, (2, 0): 4}
"""Size of the field after magic and version that holds the header's length."""
_MAGIC_BYTES = 8
_KEPT = 256  # headers; numpy refuses one of more than 10 kB


def dump(array: NDArray[np.generic]) -> bytes:
    """Return an array as .npy bytes, in C order."""
    return b"".join([_header(array.dtype, array.shape), np.ascontiguousarray(array).data])


def load(data: bytes) -> NDArray[np.generic]:
    """Return the array that .npy bytes hold, as a view of them; nothing is unpickled.

    The bytes are untrusted; on hostile ones numpy raises more kinds of errors than these.

    Raises:
        ValueError: the bytes hold something else, or more or less than one array.
    """
    version = npy.read_magic(BytesIO(data[:_MAGIC_BYTES]))
    if version not in _LENGTH_BYTES:
        raise ValueError(f"its .npy version is {version}, not 1.0 or 2.0")
    head = _MAGIC_BYTES + _LENGTH_BYTES[version]
    head += int.from_bytes(data[_MAGIC_BYTES:head], "little")
    shape, by_columns, dtype = _parsed(data[:head], version)
    flat = np.frombuffer(data, dtype, offset=head)
    if flat.size != math.prod(shape):
        raise ValueError(f"it holds {flat.size} numbers, and its shape is {shape}")
    return flat.reshape(shape, order="F" if by_columns else "C")


@lru_cache(_KEPT)
def _header(dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> bytes:
    buffer = BytesIO()
    npy.write_array_header_1_0(
        buffer, {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    )
    return buffer.getvalue()


@lru_cache(_KEPT)
def _parsed(
    header: bytes, version: tuple[int, int]
) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    stream = BytesIO(header)
    npy.read_magic(stream)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, by_columns, dtype = read(stream)
    return shape, by_columns, dtype
