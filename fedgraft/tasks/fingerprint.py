"""The fingerprint of a client's data, by which a privacy ledger knows them again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from fedgraft.tasks.task import Examples


def fingerprint(examples: Examples) -> str:
    """Return a SHA-256 over examples as they are encoded, whatever their order.

    It covers every tensor that the model is given of each example, so the same examples have the
    same fingerprint on every machine and in every run. One example more or less makes other data.
    """
    digests = []
    for index in range(len(examples)):
        total = hashlib.sha256()
        for name, tensor in sorted(examples.batch(np.array([index])).items()):
            total.update(f"\x1f{name}\x1f{tensor.dtype}\x1f{tuple(tensor.shape)}\x1f".encode())
            total.update(tensor.contiguous().numpy().tobytes())
        digests.append(total.digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def fingerprint_of_digests(digests: Iterable[str]) -> str:
    """Return a SHA-256 over the digests of rows, whatever their order, each counted once.

    A long text makes several examples of one row, and how many depends on `task.max-length`; so a
    row that is there twice counts as one, too, and shares the account of data that have it once.
    """
    return hashlib.sha256("\n".join(sorted(set(digests))).encode()).hexdigest()
