"""Noise has the distribution that is promised, and a deployed run's cannot be repeated.

Bounds on random figures are so wide that a right sampler fails one in 10^9 runs or less: six
standard errors, and Kolmogorov-Smirnov at p = 1e-9.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import binom, kstest, norm

from fedgraft.config import Config
from fedgraft.errors import PrivacyError
from fedgraft.privacy.randomness import (
    Randomness,
    SeededRandomness,
    SystemRandomness,
    add_noise,
    randomness,
)

SIZE = 400_001  # odd, and more than one chunk of pairs
SOURCES: list[Randomness] = [SystemRandomness(), SeededRandomness(np.random.default_rng(1))]
IDS = ["system", "seeded"]
both = pytest.mark.parametrize("source", SOURCES, ids=IDS)


@both
def test_noise_is_gaussian_of_the_promised_scale(source: Randomness) -> None:
    noise = source.normal((SIZE,), 3.0)
    assert noise.dtype == torch.float64 and noise.shape == (SIZE,)
    standard = noise.numpy() / 3.0
    # the moments of a standard Gaussian are 0, 1, 0, 3; their variances 1, 2, 15, 96 over n
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        error = np.mean(standard**power) - moment
        assert abs(error) < 6.2 * math.sqrt(variance / SIZE), power
    assert kstest(standard, norm.cdf).pvalue > 1e-9
    # tails: 30 are expected beyond 4; fewer than 2 or more than 80 are one in 10^10
    assert 2 <= np.sum(np.abs(standard) > 4) <= 80


@both
def test_numbers_are_independent_of_their_neighbours(source: Randomness) -> None:
    """So are the two of one draw, at distance 1, and their squares."""
    noise = source.normal((SIZE,), 1.0).numpy()
    for distance in (1, 2, 3, 1 << 17, 1 << 18):
        left, right = noise[:-distance], noise[distance:]
        limit = 6.2 / math.sqrt(len(left))
        assert abs(np.mean(left * right)) < limit
        # of (x^2 - 1)(y^2 - 1) the standard deviation is 2
        assert abs(np.mean((left**2 - 1) * (right**2 - 1))) < 2 * limit


@both
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0), (2, 3, 5)])
def test_any_shape(source: Randomness, shape: tuple[int, ...]) -> None:
    noise = source.normal(shape, 1.0)
    assert noise.shape == shape and noise.dtype == torch.float64 and torch.isfinite(noise).all()


def test_the_last_bits_of_system_noise_are_spread() -> None:
    """float64 throughout: rounded to float32 nearly all numbers change, and none occurs twice."""
    noise = SystemRandomness().normal((100_000,), 1.0)
    assert (noise.float().double() == noise).double().mean() < 0.01
    assert len(noise.unique()) == len(noise)


@both
@pytest.mark.parametrize("rate", [0.0, 1e-3, 0.25, 0.9, 1.0])
def test_poisson_samples_take_each_index_by_itself(source: Randomness, rate: float) -> None:
    count, draws = 400, 500
    samples = [source.poisson_sample(count, rate) for _ in range(draws)]
    assert all(s.dtype == np.int64 and (np.diff(s) > 0).all() for s in samples)
    sizes = np.array([len(s) for s in samples])
    assert abs(sizes.sum() - count * draws * rate) <= 6.2 * math.sqrt(
        count * draws * rate * (1 - rate)
    )
    if 0 < rate < 1:
        # sizes vary as a binomial's: samples of a fixed size would not
        spread = np.var(sizes) / (count * rate * (1 - rate))
        kurtosis = 2 + (1 - 6 * rate * (1 - rate)) / (count * rate * (1 - rate))
        assert abs(spread - 1) < 6.5 * math.sqrt(kurtosis / draws)
        times = np.bincount(np.concatenate(samples), minlength=count)
        low, high = binom.ppf([1e-12, 1 - 1e-12], draws, rate)
        assert low <= times.min() and times.max() <= high


@both
def test_samples_of_nobody_are_empty(source: Randomness) -> None:
    assert source.poisson_sample(0, 0.5).shape == (0,)
    assert source.poisson_sample(5, 1.0).tolist() == [0, 1, 2, 3, 4]


@both
@pytest.mark.parametrize("rate", [-0.1, 1.1, math.nan])
def test_a_rate_that_is_none_is_refused(source: Randomness, rate: float) -> None:
    with pytest.raises(PrivacyError, match="rate"):
        source.poisson_sample(3, rate)


def test_a_deployed_run_never_repeats_and_a_study_does() -> None:
    config = Config()

    def noise(deployed: bool, **where: int | str) -> list[float]:
        source = randomness(config, deployed, "noise", **{"round": 2, **where})  # type: ignore[arg-type]
        return [*source.normal((3,), 1.0).tolist(), *source.poisson_sample(1000, 0.5).tolist()]

    assert noise(True) != noise(True)
    assert noise(False) == noise(False)
    assert noise(False) != noise(False, round=3)
    assert noise(False) != noise(False, client="north")


def test_system_randomness_ignores_every_seed() -> None:
    found = []
    for _ in range(2):
        np.random.seed(0)
        torch.manual_seed(0)
        found.append(SystemRandomness().normal((4,), 1.0).tolist())
    assert found[0] != found[1]


@both
@pytest.mark.parametrize("scale", [1.0, 0.7, 3e-5, 1e3])
def test_noised_values_lie_on_a_grid_and_have_the_promised_scale(
    source: Randomness, scale: float
) -> None:
    size = 100_000
    values = torch.linspace(-2, 2, size) * scale
    noised = add_noise(values, scale, source)
    grid = 2.0 ** (math.floor(math.log2(scale)) - 20)
    assert noised.dtype == torch.float64
    assert torch.equal(torch.round(noised / grid) * grid, noised)
    assert scale * 2**-21 < grid <= scale * 2**-20
    standard = ((noised - values.double()) / scale).numpy()
    assert abs(standard.mean()) < 6.2 / math.sqrt(size)
    assert abs(standard.var() - 1) < 6.2 * math.sqrt(2 / size)
    assert kstest(standard, norm.cdf).pvalue > 1e-9
    near = noised.abs() <= 8 * scale
    assert torch.equal(noised[near].float().double(), noised[near])


def test_no_noise_changes_nothing() -> None:
    values = torch.tensor([1.0, 1 / 3])
    assert torch.equal(add_noise(values, 0.0, SystemRandomness()), values.double())
