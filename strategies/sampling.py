"""Whom a round samples: said once, for the strategy and for rules that count on it."""

from __future__ import annotations

from collections.abc import Sequence
from random import SystemRandom
from typing import Literal

import numpy as np

Sampling = Literal["fixed", "poisson"]


def sample_size(fraction: float, clients: int) -> int:
    """Return how many of the clients a round samples: at least one, halves rounded up."""
    return max(1, int(fraction * clients + 0.5))


def secretly_sampled(names: Sequence[str], fraction: float, sampling: Sampling) -> list[str]:
    """Return the clients of a round as `sampled` does, by the operating system's entropy alone."""
    source = SystemRandom()
    if sampling == "poisson":
        return [name for name in names if source.random() < fraction]
    count = min(sample_size(fraction, len(names)), len(names))
    return [names[at] for at in sorted(source.sample(range(len(names)), count))]


def sampled(
    names: Sequence[str], fraction: float, sampling: Sampling, random: np.random.Generator
) -> list[str]:
    """Return the clients of a round, in the order of names.

    Args:
        names: those that are there.
        fraction: share of them.
        sampling: so many of them, or each by itself with this probability: then there may be none.
        random: the round's stream.
    """
    if sampling == "poisson":
        return [
            name
            for name, drawn in zip(names, random.random(len(names)), strict=True)
            if drawn < fraction
        ]
    count = min(sample_size(fraction, len(names)), len(names))
    picked = random.choice(len(names), count, replace=False)
    return [names[index] for index in sorted(picked)]
