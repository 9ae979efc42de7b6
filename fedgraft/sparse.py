"""Arrays with many zeros as bytes: a bit for every entry, then the entries that are not zero.

Lossless, and smaller than the dense form as soon as one entry in 32 is zero. Rules that send few of
an update's entries need it to send fewer bytes.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

_VALUE = np.dtype("<f4")


def dump(values: NDArray[np.float32]) -> bytes:
    """Return a float32 array as bytes: ceil(n / 8) bytes of bits, then 4 for every non-zero."""
    flat = np.ascontiguousarray(values).reshape(-1)
    kept = flat != 0
    return b"".join([np.packbits(kept).data, flat[kept].astype(_VALUE).data])


def load(data: bytes, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return the array of this shape that `dump` wrote. The bytes and the shape are untrusted.

    Raises:
        ValueError: the bytes do not hold an array of this shape.
    """
    count = math.prod(shape)
    bits = -(-count // 8)
    if min(shape, default=0) < 0 or len(data) < bits:
        raise ValueError(f"{len(data)} bytes do not hold a sparse array of shape {shape}")
    packed = np.frombuffer(data, np.uint8, count=bits)
    kept = np.unpackbits(packed, count=count).astype(bool)
    values = np.frombuffer(data, np.uint8, offset=bits)
    if values.size != _VALUE.itemsize * int(kept.sum()):
        raise ValueError(f"it marks {int(kept.sum())} entries and holds {values.size} bytes")
    dense = np.zeros(count, np.float32)
    dense[kept] = values.view(_VALUE)
    return dense.reshape(shape)
