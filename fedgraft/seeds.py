"""Named random streams: every random choice is a function of (seed, purpose, round, client).

Streams come from numpy's Philox generator, which gives the same numbers on every machine, so what
must agree between machines (FFA-LoRA's A, initial adapters, client samples) does. No code draws
from a global generator; what torch draws from its own (dropout) is forked and seeded with
`torch_seed` for one client and one round.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def _digest(seed: int, purpose: str, round: int, client: str) -> bytes:
    text = f"{seed}\x1f{purpose}\x1f{round}\x1f{client}"
    return hashlib.sha256(text.encode()).digest()


def stream(seed: int, purpose: str, *, round: int = 0, client: str = "") -> np.random.Generator:
    """Return the random stream of one purpose, independent of every other one's."""
    key = np.frombuffer(_digest(seed, purpose, round, client)[:16], dtype="<u8")
    return np.random.Generator(np.random.Philox(key=key))


def torch_seed(seed: int, purpose: str, *, round: int = 0, client: str = "") -> int:
    """Return a 63-bit seed for a torch generator of one purpose."""
    return int.from_bytes(_digest(seed, purpose, round, client)[:8], "big") >> 1


@contextmanager
def forked_torch(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators inside the block and put their state back afterwards."""
    generators = [torch.default_generator]
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(seed)
        if device.type == "mps":
            torch.mps.manual_seed(seed)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
