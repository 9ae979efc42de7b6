"""The fingerprint of a client's data, by which a privacy ledger knows them again."""

from __future__ import annotations

import hashlib

import numpy as np

from fedgraft.tasks.task import Examples


def fingerprint(examples: Examples) -> str:
    """Return a SHA-256 over examples as they are encoded, whatever their order.

    It covers every tensor that the model is given of each example, so the same rows have the same
    fingerprint on every machine and in every run. Rows that are encoded in another way (another
    template, tokenizer or `task.max-length`), and one row more or less, are other data.
    """
    digests = []
    for index in range(len(examples)):
        total = hashlib.sha256()
        for name, tensor in sorted(examples.batch(np.array([index])).items()):
            total.update(f"\x1f{name}\x1f{tensor.dtype}\x1f{tuple(tensor.shape)}\x1f".encode())
            total.update(tensor.contiguous().numpy().tobytes())
        digests.append(total.digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()
