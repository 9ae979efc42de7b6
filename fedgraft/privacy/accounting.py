"""Epsilon of all releases together, and the noise that keeps it within a budget.

Two accountants, both dp-accounting's (https://github.com/google/differential-privacy), both for
neighbours that differ by adding or removing one unit:

- "rdp": Renyi differential privacy. Mironov, Talwar, Zhang. Renyi Differential Privacy of the
  Sampled Gaussian Mechanism. arXiv 1908.10530, 2019; turned into epsilon as in Canonne, Kamath,
  Steinke (NeurIPS 2020, arXiv 2004.00010, proposition 12). Quick, and always an upper bound. Its
  orders are dp-accounting's own, 1.1 to 1024, so that figures agree with what others compute with
  that library. Outside the reach of the orders it is loose, never too small: below 0.01 at delta
  1e-5, and above some hundreds, where small fractional orders do not converge.
- "pld": privacy loss distributions. Doroshenko, Ghazi, Kamath, Kumar, Manurangsi. Connect the
  Dots: Tighter Discrete Approximations of Privacy Loss Distributions. PoPETs 2022,
  arXiv 2207.04380. Tight, and an upper bound, too: losses are kept on a grid whose rounding only
  ever adds. The grid's interval is dp-accounting's default, 1e-4, while the RDP figure is below
  20. Above that it is a multiple of 1e-4, at most 1e-5 of the figure and small against the
  spread of a single step's loss, so that thousands of steps take a second or two and not half a
  minute; the tests hold what that adds below 0.1%. It never exceeds the RDP figure.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, lru_cache, reduce
from itertools import count
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedgraft.errors import PrivacyError
from fedgraft.privacy.events import Release

Accountant = Literal["rdp", "pld"]
ADJACENCY = "add-or-remove-one"
"""The relation between neighbouring data that both accountants assume."""

_ROUNDING = 1e-13
"""More than what log A(order), a sum of up to 1025 terms near 1, is wrong by in float64."""
_FINEST = 1e-4
_COARSEST = 1.0
_LARGEST = 1e5
"""Epsilon above which the loss distribution has too many points; the RDP figure stands there."""
_MOST_NOISE = 1e6
_LEAST_NOISE = 1e-6
"""A multiplier below which epsilon is above 10^11, and formulas overflow: it counts as infinite."""
_CLOSE = 0.999
"""A calibrated multiplier is good enough when it spends this share of the budget."""


def epsilon(releases: Iterable[Release], delta: float, accountant: Accountant = "rdp") -> float:
    """Return the epsilon of all releases together, which may be infinite.

    Args:
        releases: all that was answered about the same data, in any order.
        delta: the probability that the guarantee leaves out, within (0, 1).
        accountant: "rdp" (quick), or "pld" (tighter, slower).

    Returns:
        An upper bound under add-or-remove-one; 0 where nothing was released.

    Raises:
        PrivacyError: delta is not within (0, 1).
    """
    if not 0 < delta < 1:
        raise PrivacyError(f"delta is {delta}: it must be above 0 and below 1")
    # Equal mechanisms are composed at once: a ledger of a thousand rounds is a few groups.
    groups: Counter[tuple[float, float]] = Counter()
    for release in releases:
        groups[release.noise_multiplier, release.sampling_rate] += release.count
    if not groups:
        return 0.0
    bound = _renyi_epsilon(groups, delta)
    if accountant == "rdp" or bound > _LARGEST:
        return bound
    steps = sum(groups.values())
    parts = [_losses(*key, groups[key], _interval(bound, steps)) for key in sorted(groups)]
    together = reduce(lambda left, right: left.compose(right), parts)
    # Losses far below the grid's interval, millions of times: there RDP is the better bound.
    return min(bound, float(together.get_epsilon_for_delta(delta)))


def calibrate(
    target: float,
    delta: float,
    planned: Callable[[float], Sequence[Release]],
    spent: Sequence[Release] = (),
    accountant: Accountant = "rdp",
) -> float:
    """Return the smallest noise multiplier that keeps all releases within a budget.

    Args:
        target: the largest epsilon that may be reached.
        delta: the guarantee's delta.
        planned: all releases that are still to come, as a function of the noise multiplier; more
            noise must not make them tell more.
        spent: what was released before.
        accountant: as in `epsilon`.

    Returns:
        A multiplier that never exceeds the budget and spends at least 99.9% of it, or is within a
        millionth of one that exceeds it.

    Raises:
        PrivacyError: the budget is spent already, or no noise is enough.
    """
    before = epsilon(spent, delta, accountant)
    if before >= target:
        raise PrivacyError(
            f"the privacy budget is spent: epsilon is {before:.4g} at delta {delta:g}, and "
            f"{target:g} is all that there is",
            "Stop here, or raise privacy.target-epsilon.",
        )

    def total(multiplier: float) -> float:
        return epsilon([*spent, *planned(multiplier)], delta, accountant)

    enough, step = 1.0, 2.0
    if accountant == "pld":  # it needs a little less noise than RDP, which is quick
        with suppress(PrivacyError):
            enough, step = calibrate(target, delta, planned, spent), 1.2
    while (reached := total(enough)) > target:
        enough *= step
        if enough > _MOST_NOISE:
            raise PrivacyError(
                f"no noise keeps epsilon at {target:g} and delta {delta:g}: {before:.4g} is spent, "
                f"and what is planned makes it {reached:.4g} at least",
                "Raise privacy.target-epsilon, or plan fewer rounds.",
            )
    short = enough / step
    while (more := total(short)) <= target:
        enough, reached, short = short, more, short / step
        if short < _LEAST_NOISE:
            return enough
    # Epsilon is nearly a power of the noise: a line between logarithms finds it in a few tries.
    for attempt in count(1):
        if reached >= _CLOSE * target or enough - short <= 1e-6 * enough:
            break
        share = 0.5
        if attempt % 3 and reached > 0 and math.isfinite(more):
            aim = math.sqrt(_CLOSE) * target
            share = min(max(math.log(aim / reached) / math.log(more / reached), 0.01), 0.99)
        middle = enough * (short / enough) ** share
        if (found := total(middle)) <= target:
            enough, reached = middle, found
        else:
            short, more = middle, found
    return enough


def _renyi_epsilon(groups: Counter[tuple[float, float]], delta: float) -> float:
    from dp_accounting.rdp import compute_epsilon

    divergences = sum(_divergences(*key) * times for key, times in groups.items())
    value, _ = compute_epsilon(_orders(), divergences, delta)
    return float(value)


@cache
def _orders() -> NDArray[np.float64]:
    """Return dp-accounting's own orders, (orders,)."""
    # dp-accounting takes a second to import, which runs without privacy need not wait for.
    from dp_accounting.rdp import RdpAccountant

    return np.asarray(RdpAccountant().orders, dtype=np.float64)


@lru_cache(maxsize=256)
def _divergences(noise_multiplier: float, sampling_rate: float) -> NDArray[np.float64]:
    """Return the Renyi divergences of one sampled Gaussian, (orders,)."""
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    orders = _orders()
    if noise_multiplier < _LEAST_NOISE:
        return np.full(len(orders), np.inf)
    accountant = RdpAccountant(orders)
    event = PoissonSampledDpEvent(sampling_rate, GaussianDpEvent(noise_multiplier))
    with _hushed():
        accountant.compose(event)
    # With very much noise rounding can leave a divergence of nothing, or less: a free release.
    found: NDArray[np.float64] = np.maximum(accountant.rdp, _ROUNDING / (orders - 1))
    return found


def _interval(bound: float, steps: int) -> float:
    """Return the loss grid's interval for an epsilon of about `bound` in so many steps.

    Rounding to a grid of interval h adds at most h^2 / 8 to a step's mean loss, and to its variance
    at most h^2 / 4: the second bound keeps what all steps add below a thousandth of epsilon.
    """
    wanted = min(bound * 1e-5, math.sqrt(4e-3 * bound / steps), _COARSEST)
    # Multiples of the finest only: such a grid is part of the finest one, and never gives less.
    return _FINEST * max(1, int(wanted / _FINEST))


@lru_cache(maxsize=8)
def _losses(noise_multiplier: float, sampling_rate: float, times: int, interval: float) -> Any:
    """Return the privacy loss distribution of so many sampled Gaussians."""
    from dp_accounting.pld import privacy_loss_distribution as losses

    if sampling_rate == 1:  # so many Gaussians are one with less noise
        return losses.from_gaussian_mechanism(
            noise_multiplier / math.sqrt(times), value_discretization_interval=interval
        )
    return losses.from_gaussian_mechanism(
        noise_multiplier, value_discretization_interval=interval, sampling_prob=sampling_rate
    ).self_compose(times)


@contextmanager
def _hushed() -> Iterator[None]:
    """Keep quiet that an order did not converge: it is left out, and the others bound epsilon."""
    logger = logging.getLogger("absl")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before
