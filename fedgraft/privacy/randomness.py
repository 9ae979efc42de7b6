"""Where noise and samples come from: the operating system's entropy, or a study's seed.

A guarantee counts on what an observer cannot guess. So a deployed run takes both from the operating
system and can never be repeated; a simulation may take them from the run's seed, and is a study.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedgraft.errors import PrivacyError
from fedgraft.seeds import stream

if TYPE_CHECKING:
    from fedgraft.config import Config

_SUMMED = 4  # Gaussians in one number of noise; their sum over 2 is again a standard one
_CHUNK = 1 << 17  # pairs of numbers computed at a time: 1 MiB an array, which stays in cache
_GRID_BITS = 20


class Randomness(Protocol):
    """Gaussian noise and Poisson samples."""

    def normal(self, shape: tuple[int, ...], scale: float) -> Tensor:
        """Return independent Gaussians of standard deviation `scale`, float64 on the CPU."""

    def poisson_sample(self, count: int, rate: float) -> NDArray[np.int64]:
        """Return which of `count` indices are drawn, ascending, each by itself at `rate`.

        Raises:
            PrivacyError: the rate is not within [0, 1].
        """


class SystemRandomness:
    """Randomness of the operating system's own entropy (`os.urandom`), in float64.

    A textbook Gaussian sampler leaves gaps between the floats that it can return, and they tell
    noised values apart (Mironov, CCS 2012; Jin, McMurtry, Rubinstein, Ohrimenko, IEEE S&P 2022).
    Each number here is half the sum of four Gaussians, as Holohan and Braghin propose (Secure
    Random Sampling in Differential Privacy, ESORICS 2021) and Opacus' secure mode does: which
    four they were is then beyond search. Each comes from the Box-Muller transform of two uniform
    numbers of 53 bits. `add_noise` adds a second defence, rounding after the addition.

    What it does not cover: the argument is about the cost of the known attacks, it is no proof, as
    an exact discrete sampler in integers would have; noise beyond 17 standard deviations never
    occurs (its probability is below 1e-60); a sum's own rounding is the caller's matter, which is
    why sums are made in float64; and somebody who can time the machine or read its memory is not
    held off.
    """

    def normal(self, shape: tuple[int, ...], scale: float) -> Tensor:
        """Return independent Gaussians of standard deviation `scale`, float64 on the CPU."""
        size = math.prod(shape)
        pairs = (size + 1) // 2
        noise = np.empty((pairs, 2))
        for start in range(0, pairs, _CHUNK):
            part = noise[start : start + _CHUNK]
            _gaussian_pairs(part)
        noise *= scale / 2
        return torch.from_numpy(noise.reshape(-1)[:size].reshape(shape))

    def poisson_sample(self, count: int, rate: float) -> NDArray[np.int64]:
        """Return which of `count` indices are drawn, ascending, each by itself at `rate`.

        The rate is met to 64 bits, rounded down.

        Raises:
            PrivacyError: the rate is not within [0, 1].
        """
        _check_rate(rate)
        if rate == 1:
            return np.arange(count, dtype=np.int64)
        drawn = _words(count) < np.uint64(math.floor(math.ldexp(rate, 64)))
        return np.flatnonzero(drawn).astype(np.int64)


class SeededRandomness:
    """Randomness of a generator: the same numbers in every run, so of a study, not a release."""

    def __init__(self, generator: np.random.Generator) -> None:
        self._generator = generator

    def normal(self, shape: tuple[int, ...], scale: float) -> Tensor:
        """Return independent Gaussians of standard deviation `scale`, float64 on the CPU."""
        return torch.from_numpy(np.asarray(self._generator.standard_normal(shape) * scale))

    def poisson_sample(self, count: int, rate: float) -> NDArray[np.int64]:
        """Return which of `count` indices are drawn, ascending, each by itself at `rate`.

        Raises:
            PrivacyError: the rate is not within [0, 1].
        """
        _check_rate(rate)
        return np.flatnonzero(self._generator.random(count) < rate).astype(np.int64)


def randomness(
    config: Config, deployed: bool, purpose: str, *, round: int, client: str = ""
) -> Randomness:
    """Return the operating system's randomness in a deployed run, the seed's in a simulation."""
    if deployed:
        return SystemRandomness()
    return SeededRandomness(stream(config.seed, purpose, round=round, client=client))


def add_noise(values: Tensor, scale: float, source: Randomness) -> Tensor:
    """Return values plus Gaussian noise, rounded to a grid of about a millionth of the noise.

    The grid's spacing is a power of two within (scale x 2^-21, scale x 2^-20]. Rounding what is
    noised already is post-processing, and costs no privacy; it hides the last bits, in which floats
    are uneven and by which attacks on precision work (Haney, Desfontaines, Hartman, Shrestha, Hay.
    Precision-based Attacks and Interval Refining, 2022), as Mironov's snapping does. To a
    float32 it fits whole within 8 standard deviations of zero.

    Args:
        values: a clipped sum, of any shape and dtype.
        scale: the noise's standard deviation; 0 adds none.
        source: where the noise comes from.

    Returns:
        The noised values, float64 on the CPU.
    """
    exact = values.detach().to("cpu", torch.float64)
    if scale == 0:
        return exact
    noised = exact + source.normal(tuple(values.shape), scale)
    grid = math.ldexp(1.0, math.frexp(scale)[1] - 1 - _GRID_BITS)
    return torch.round(noised / grid) * grid


def _gaussian_pairs(out: NDArray[np.float64]) -> None:
    """Fill (pairs, 2) with sums of four standard Gaussians.

    A Box-Muller draw gives two, r cos(t) and r sin(t), which are independent of one another; the
    first of each of four draws makes one sum, and the second the other.
    """
    out[:] = 0.0
    for _ in range(_SUMMED):
        radius = np.sqrt(-2 * np.log(_uniform(len(out))))
        angle = 2 * np.pi * _uniform(len(out))
        out[:, 0] += radius * np.cos(angle)
        out[:, 1] += radius * np.sin(angle)


def _uniform(count: int) -> NDArray[np.float64]:
    """Return multiples of 2^-53 within (0, 1]: never 0, whose logarithm is no number."""
    return ((_words(count) >> np.uint64(11)) + np.uint64(1)).astype(np.float64) * 2.0**-53


def _words(count: int) -> NDArray[np.uint64]:
    return np.frombuffer(os.urandom(8 * count), dtype=np.uint64)


def _check_rate(rate: float) -> None:
    if not 0 <= rate <= 1:
        raise PrivacyError(f"the sampling rate is {rate}: it must be within 0 and 1")
