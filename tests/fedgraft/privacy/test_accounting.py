"""Epsilon against closed forms, published figures, an own oracle and two other implementations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant
from opacus.accountants import RDPAccountant as OpacusRDP
from scipy.optimize import brentq
from scipy.special import gammaln, logsumexp
from scipy.stats import norm

from fedgraft.errors import PrivacyError
from fedgraft.privacy.accounting import Accountant, calibrate, epsilon
from fedgraft.privacy.events import Release

DELTA = 1e-5
ACCOUNTANTS: list[Accountant] = ["rdp", "pld"]

# One Gaussian, and one sampled Gaussian, in closed form


def gaussian_delta(value: float, sigma: float) -> float:
    """Balle, Wang. Improving the Gaussian Mechanism. ICML 2018, arXiv 1805.06530, theorem 8."""
    high = norm.cdf(0.5 / sigma - value * sigma)
    # the second term's exponent and tail are joined: apart, one overflows and the other vanishes
    return float(high - math.exp(value + norm.logcdf(-0.5 / sigma - value * sigma)))


def sampled_delta(value: float, sigma: float, rate: float) -> float:
    """One sampled Gaussian: the larger divergence of N(0), (1-q) N(0) + q N(1), either way round.

    The likelihood ratio is monotone, so each is the difference of two tails beyond one threshold.
    """

    def threshold(ratio: float) -> float:  # where (1-q) + q exp((x - 1/2) / sigma^2) is the ratio
        return sigma**2 * math.log((ratio - 1 + rate) / rate) + 0.5

    def tails(x: float, side: Callable[..., float]) -> tuple[float, float]:
        alone = side(x / sigma)
        return alone, (1 - rate) * alone + rate * side((x - 1) / sigma)

    alone, mixed = tails(threshold(math.exp(value)), norm.sf)
    removed = mixed - math.exp(value) * alone
    added = 0.0
    if math.exp(-value) > 1 - rate:
        alone, mixed = tails(threshold(math.exp(-value)), norm.cdf)
        added = alone - math.exp(value) * mixed
    return max(removed, added)


def root(delta_of: Callable[[float], float]) -> float:
    return float(brentq(lambda value: delta_of(value) - DELTA, 1e-9, 400, xtol=1e-10))


@pytest.mark.parametrize("sigma", [0.6, 1.0, 3.0, 8.0, 50.0])
def test_one_gaussian_is_its_closed_form(sigma: float) -> None:
    exact = root(lambda value: gaussian_delta(value, sigma))
    tight = epsilon([Release((sigma,), 1.0)], DELTA, "pld")
    assert exact * (1 - 1e-9) <= tight <= exact * 1.001
    assert exact < epsilon([Release((sigma,), 1.0)], DELTA) < 1.25 * exact


def test_many_gaussians_of_any_kind_are_one_with_less_noise() -> None:
    releases = [Release((4.0,), 1.0, 3), Release((5.0, 4.0), 1.0), Release((9.0,), 1.0, 50)]
    joint = (3 / 16 + 1 / 25 + 1 / 16 + 50 / 81) ** -0.5
    exact = root(lambda value: gaussian_delta(value, joint))
    assert epsilon(releases, DELTA, "pld") == pytest.approx(exact, rel=1e-3)
    assert epsilon(releases, DELTA) == pytest.approx(epsilon([Release((joint,), 1.0)], DELTA))


@pytest.mark.parametrize(("sigma", "rate"), [(0.8, 0.5), (2.0, 0.3), (1.0, 0.001)])
def test_one_sampled_gaussian_is_its_closed_form(sigma: float, rate: float) -> None:
    exact = root(lambda value: sampled_delta(value, sigma, rate))
    tight = epsilon([Release((sigma,), rate)], DELTA, "pld")
    assert exact * (1 - 1e-9) <= tight <= exact * 1.001


# Published figures, by way of an oracle that has nothing in common with the libraries


def log_moments(sigma: float, rate: float, orders: range) -> list[float]:
    """(order - 1) x the Renyi divergence: arXiv 1908.10530, section 3.3, by plain summation."""
    sums = []
    for order in orders:
        k = np.arange(order + 1)
        log_binomial = gammaln(order + 1) - gammaln(k + 1) - gammaln(order - k + 1)
        log_weights = k * math.log(rate) + (order - k) * math.log1p(-rate)
        sums.append(float(logsumexp(log_binomial + log_weights + (k * k - k) / (2 * sigma**2))))
    return sums


def moments_epsilon(sigma: float, rate: float, steps: int) -> float:
    """Return epsilon as Abadi et al. turned moments into it (arXiv 1607.00133, theorem 2)."""
    orders = range(2, 200)
    moments = zip(orders, log_moments(sigma, rate, orders), strict=True)
    return min((steps * moment - math.log(DELTA)) / (order - 1) for order, moment in moments)


PUBLISHED = [
    # Abadi et al. Deep Learning with Differential Privacy. CCS 2016, section 3.2
    (4.0, 0.01, 10_000, 1.26),
    # Bu, Dong, Long, Su. Deep Learning with Gaussian Differential Privacy. HDSR 2020, figure 4
    (1.3, 256 / 60_000, 20 * 60_000 // 256, 1.34),
]


@pytest.mark.parametrize(("sigma", "rate", "steps", "published"), PUBLISHED)
def test_published_figures(sigma: float, rate: float, steps: int, published: float) -> None:
    """They are of the moments accountant; the tighter conversion gives less, PLD less again."""
    assert moments_epsilon(sigma, rate, steps) == pytest.approx(published, rel=0.01)
    release = [Release((sigma,), rate, steps)]
    orders = range(2, 200)
    tighter = min(
        steps * moment / (order - 1)
        + math.log1p(-1 / order)
        - math.log(DELTA * order) / (order - 1)
        for order, moment in zip(orders, log_moments(sigma, rate, orders), strict=True)
    )
    ours = epsilon(release, DELTA)
    assert ours == pytest.approx(tighter, rel=0.01) and ours <= tighter * (1 + 1e-9)
    assert epsilon(release, DELTA, "pld") < ours < published


PAIRS = [Release((3.0, 3.0), 0.3, 50)]


def test_two_queries_on_one_sample_are_one_event() -> None:
    """LoRA-FAIR's pairs: sampled apart they would count as 5.10 (RDP) and 4.68 (PLD), too little.

    With orders up to 200 and the same conversion the first is recomputed from plain sums.
    """
    assert PAIRS[0].noise_multiplier == pytest.approx(3 / math.sqrt(2))
    assert epsilon(PAIRS, DELTA) == pytest.approx(5.48, abs=0.006)
    assert epsilon(PAIRS, DELTA, "pld") == pytest.approx(5.00, abs=0.006)
    apart = [Release((3.0,), 0.3, 100)]
    assert epsilon(apart, DELTA) == pytest.approx(5.10, abs=0.006)
    assert epsilon(apart, DELTA, "pld") == pytest.approx(4.68, abs=0.006)


# Other implementations


def event(release: Release) -> dp_accounting.DpEvent:
    """A release as dp-accounting says it: the queries composed inside one sample."""
    queries = [dp_accounting.GaussianDpEvent(s) for s in release.noise_multipliers]
    inner = queries[0] if len(queries) == 1 else dp_accounting.ComposedDpEvent(queries)
    sampled = dp_accounting.PoissonSampledDpEvent(release.sampling_rate, inner)
    return dp_accounting.SelfComposedDpEvent(sampled, release.count)


def theirs(accountant: dp_accounting.PrivacyAccountant, releases: list[Release]) -> float:
    for release in releases:
        accountant.compose(event(release))
    return float(accountant.get_epsilon(DELTA))


UNLIKE = [Release((1.1,), 0.01, 300), Release((0.8,), 0.004, 200), Release((6.0,), 1.0, 4)]
GRID = [
    [Release((sigma,), rate, steps)]
    for sigma, rate, steps in itertools.product(
        [0.6, 1.0, 2.0, 8.0], [0.001, 0.02, 0.5], [1, 100, 5000]
    )
]


@pytest.mark.parametrize("releases", [*GRID, UNLIKE, [*UNLIKE, *UNLIKE[:2]]])
def test_rdp_is_dp_accountings(releases: list[Release]) -> None:
    assert epsilon(releases, DELTA) == pytest.approx(theirs(RdpAccountant(), releases), rel=1e-6)


def test_pairs_are_dp_accountings_too() -> None:
    """It takes no composed queries within a sample for PLD, and none for RDP: joint noise there."""
    joint = [Release((3 / math.sqrt(2),), 0.3, 50)]
    assert epsilon(PAIRS, DELTA) == pytest.approx(theirs(RdpAccountant(), joint), rel=1e-9)
    assert epsilon(PAIRS, DELTA, "pld") == pytest.approx(theirs(PLDAccountant(), joint), rel=1e-9)


TIGHT_GRID = [
    [Release((sigma,), rate, steps)]
    for sigma, rate, steps in [
        (0.6, 0.001, 5000),
        (1.0, 0.02, 500),
        (2.0, 0.02, 5000),
        (2.0, 0.5, 100),
        (4.0, 0.001, 5000),
        (8.0, 0.001, 1),
        (8.0, 0.02, 100),
        (8.0, 0.5, 100),
        (8.0, 0.5, 5000),
    ]
]


@pytest.mark.parametrize("releases", [*TIGHT_GRID, UNLIKE])
def test_pld_is_dp_accountings_and_rdp_is_never_below_it(releases: list[Release]) -> None:
    """At 1e-4, its own interval; ours is coarser for large figures alone, and adds below 0.1%."""
    fine = theirs(PLDAccountant(), releases)
    ours = epsilon(releases, DELTA, "pld")
    assert fine * (1 - 1e-6) <= ours <= fine * 1.001
    assert epsilon(releases, DELTA) >= fine


def test_a_coarse_grid_of_losses_adds_little() -> None:
    """Against an interval of 1e-3, where 1e-4 takes 4 s and 0.3 GB."""
    releases = [Release((0.6,), 0.5, 500)]
    fine = theirs(PLDAccountant(value_discretization_interval=1e-3), releases)
    assert fine * (1 - 1e-6) <= epsilon(releases, DELTA, "pld") <= fine * 1.001


def test_where_the_grid_is_too_coarse_pld_falls_back_on_rdp() -> None:
    """A step's loss of 3e-5 on a grid of 1e-4: alone, its rounding would add half in 10^6 steps."""
    releases = [Release((30.0,), 0.001, 10**6)]
    assert theirs(PLDAccountant(), releases) > epsilon(releases, DELTA)
    assert epsilon(releases, DELTA, "pld") == epsilon(releases, DELTA)


def test_the_corner_where_libraries_differ() -> None:
    """Noise 0.5, sampling 0.1, 10,000 steps: RDP's small orders do not converge.

    dp-accounting's PLD gives 783.287 at 1e-4 in 6 s.
    """
    releases = [Release((0.5,), 0.1, 10_000)]
    assert epsilon(releases, DELTA) == pytest.approx(2231.3, rel=1e-3)
    assert 783.287 <= epsilon(releases, DELTA, "pld") <= 783.287 * 1.001


@pytest.mark.parametrize(
    ("sigma", "rate", "steps"), [(1.0, 0.01, 1000), (4.0, 0.01, 10_000), (0.8, 0.004, 2000)]
)
def test_opacus_agrees(sigma: float, rate: float, steps: int) -> None:
    """RDP by other orders; PRV (Gopi, Lee, Wutschitz, arXiv 2106.02848) by another method."""
    release = [Release((sigma,), rate, steps)]
    renyi, tight = OpacusRDP(), PRVAccountant()
    renyi.history = tight.history = [(sigma, rate, steps)]
    assert epsilon(release, DELTA) == pytest.approx(renyi.get_epsilon(DELTA), rel=0.01)
    assert epsilon(release, DELTA, "pld") == pytest.approx(tight.get_epsilon(DELTA), abs=0.02)


# Properties


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_nothing_released_costs_nothing(accountant: Accountant) -> None:
    assert epsilon([], DELTA, accountant) == 0.0


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.builds(
            Release,
            st.tuples(st.sampled_from([0.7, 1.5, 6.0])),
            st.sampled_from([0.01, 0.3, 1.0]),
            st.integers(1, 50),
        ),
        min_size=1,
        max_size=6,
    ),
    st.randoms(use_true_random=False),
)
def test_order_and_splitting_change_nothing_and_more_costs_more(
    releases: list[Release], random: st.DataObject
) -> None:
    whole = epsilon(releases, DELTA)
    split = [
        Release(release.noise_multipliers, release.sampling_rate)
        for release in releases
        for _ in range(release.count)
    ]
    random.shuffle(split)  # type: ignore[attr-defined]
    assert epsilon(split, DELTA) == pytest.approx(whole, rel=1e-9)
    assert epsilon(releases[:-1], DELTA) <= whole
    assert epsilon(releases, DELTA / 10) > whole


def test_very_much_noise_is_never_free_by_rounding() -> None:
    """Rounding makes dp-accounting's divergences 0 or less here, and so any number of steps free.

    So many steps of q / sigma = 1e-9 are about one Gaussian of noise 1 / (1e-9 x 5e7) = 20.
    """
    releases = [Release((1e6,), 1e-3, 25 * 10**14)]
    exact = root(lambda value: gaussian_delta(value, 20.0))
    assert theirs(RdpAccountant(), releases) == 0 < exact < epsilon(releases, DELTA) < 4 * exact


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_very_much_noise_is_cheap(accountant: Accountant) -> None:
    assert epsilon([Release((1e4,), 0.01, 1000)], DELTA, accountant) < 0.01


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_very_little_noise_is_dear_and_ends(accountant: Accountant) -> None:
    exact = 0.5 / 0.01**2  # the mean loss of one Gaussian, and half of all losses are above it
    assert exact < epsilon([Release((0.01,), 1.0)], DELTA, accountant) < 1.3 * exact
    assert epsilon([Release((1e-6,), 0.1, 3)], DELTA, accountant) > 1e9
    assert epsilon([Release((1e-200,), 0.1)], DELTA, accountant) == math.inf


@pytest.mark.parametrize("delta", [0.0, 1.0, -1.0, math.nan])
def test_a_delta_that_means_nothing_is_refused(delta: float) -> None:
    with pytest.raises(PrivacyError, match="delta"):
        epsilon([Release((1.0,), 1.0)], delta)


@pytest.mark.parametrize(
    ("noise", "rate", "count"),
    [
        ((), 0.5, 1),
        ((0.0,), 0.5, 1),
        ((1.0, -1.0), 0.5, 1),
        ((math.nan,), 0.5, 1),
        ((math.inf,), 0.5, 1),
        ((1.0,), 0.0, 1),
        ((1.0,), 1.1, 1),
        ((1.0,), 0.5, 0),
    ],
)
def test_no_release_without_noise_sample_or_count(
    noise: tuple[float, ...], rate: float, count: int
) -> None:
    with pytest.raises(PrivacyError):
        Release(noise, rate, count)


# Calibration


@pytest.mark.parametrize(
    ("target", "accountant"),
    [(0.1, "rdp"), (0.5, "rdp"), (3.0, "rdp"), (60.0, "rdp"), (2.0, "pld")],
)
def test_calibrated_noise_spends_the_budget_and_no_more(
    target: float, accountant: Accountant
) -> None:
    def planned(sigma: float) -> list[Release]:
        return [Release((sigma,), 0.02, 400)]

    sigma = calibrate(target, DELTA, planned, (), accountant)
    assert 0.999 * target <= epsilon(planned(sigma), DELTA, accountant) <= target


def test_calibration_takes_few_tries() -> None:
    tried = []

    def planned(sigma: float) -> list[Release]:
        tried.append(sigma)
        return [Release((sigma,), 0.02, 400)]

    calibrate(3.0, DELTA, planned)
    assert len(tried) <= 8


def test_calibration_counts_what_is_spent() -> None:
    def planned(sigma: float) -> list[Release]:
        return [Release((sigma, sigma), 1.0, 20)]

    fresh = calibrate(4.0, DELTA, planned)
    later = calibrate(4.0, DELTA, planned, UNLIKE)
    assert later > fresh
    assert 0.999 * 4 <= epsilon([*UNLIKE, *planned(later)], DELTA) <= 4


def test_calibrated_noise_of_one_gaussian_is_the_closed_form() -> None:
    sigma = calibrate(1.0, DELTA, lambda s: [Release((s,), 1.0)], (), "pld")
    exact = brentq(lambda s: gaussian_delta(1.0, s) - DELTA, 1, 10)
    assert exact <= sigma <= 1.002 * exact


def test_a_spent_budget_and_one_out_of_reach_are_refused() -> None:
    spent = [Release((1.0,), 1.0)]
    with pytest.raises(PrivacyError, match=r"budget is spent: epsilon is 4\.\d+ at delta 1e-05"):
        calibrate(3.0, DELTA, lambda s: [Release((s,), 1.0)], spent)
    with pytest.raises(PrivacyError, match=r"no noise keeps epsilon at 3 .* makes it 4\.\d+"):
        calibrate(3.0, DELTA, lambda _: spent)  # whatever the noise


def test_a_budget_below_what_orders_tell_apart_is_kept_all_the_same() -> None:
    def planned(sigma: float) -> list[Release]:
        return [Release((sigma,), 1.0)]

    renyi, tight = (calibrate(1e-3, DELTA, planned, (), accountant) for accountant in ACCOUNTANTS)
    assert gaussian_delta(1e-3, tight) <= DELTA and 100 < tight < renyi
