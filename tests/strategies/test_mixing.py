"""Nearest-neighbour mixing before the robust rules, against dense means of neighbours."""

from __future__ import annotations

from typing import Any

import dense
import numpy as np
import pytest
import torch
from federations import LAYER, Federation, federations
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from rounds_by_hand import (
    EXTRA,
    changes,
    in_order,
    is_best_for,
    number,
    product_of,
    products,
    scalars,
    size_of,
)
from test_robust import attacked

from fedgraft.config import Config
from fedgraft.errors import ConfigError
from strategies.geometric_median import weiszfeld
from strategies.krum import krum_scores
from strategies.mixing import nearest_neighbours
from strategies.registry import build_rule

quick = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
MIXABLE = ["krum", "multi-krum", "geometric-median", "trimmed-mean", "coordinate-median"]
rules = pytest.mark.parametrize("name", MIXABLE)


def test_neighbours_by_hand() -> None:
    """Of 1, 4, 7 with f = 1 each has one besides itself; 4 lies between, and takes the first."""
    values = torch.tensor([[1.0], [4.0], [7.0]]).double()
    M = nearest_neighbours(values @ values.T, 1)
    assert (M @ values).flatten().tolist() == [2.5, 2.5, 5.5]


@rules
def test_rules_by_hand(name: str) -> None:
    """Of 1, 2, 4, 8, 100 all but the last take the first four, 3.75; 100 takes 2, 4, 8: 28.5."""
    fed = scalars(1.0, 2.0, 4.0, 8.0, 100.0)
    made = fed.aggregate(name, mixing=True, byzantine=1)
    assert number(made) == pytest.approx(3.75, rel=1e-4)


def mixing_of(fed: Federation, f: int) -> np.ndarray:
    """The dense M, where no two neighbours are so alike that rounding decides."""
    D = changes(fed)
    distances = np.sort(((D[:, None] - D) ** 2).sum(-1), axis=1)
    last, next_ = distances[:, len(D) - f - 1], distances[:, min(len(D) - f, len(D) - 1)]
    assume(f == 0 or (next_ - last > 1e-6 * next_).all())
    return dense.mixed(D, f)


@quick
@given(fed=federations(), byzantine=st.none() | st.integers(0, 3))
def test_coordinatewise_rules_see_mixed_entries(fed: Federation, byzantine: int | None) -> None:
    fed, K = in_order(fed), len(fed.updates)
    f = min((K - 1) // 3 if byzantine is None else byzantine, (K - 1) // 2)
    M = mixing_of(fed, f)
    theirs = np.einsum("kj,jab->kab", M, products(fed))
    values = np.stack([t[EXTRA].double().numpy() for _, t in fed.updates.values()])
    extras = np.einsum("kj,jab->kab", M, values)
    made = fed.aggregate("trimmed-mean", byzantine=byzantine, mixing=True).adapter
    is_best_for(made.layers[LAYER], dense.trimmed_mean(theirs, f), size_of(fed))
    np.testing.assert_allclose(made.extras[EXTRA], dense.trimmed_mean(extras, f), 1e-5, 1e-6)
    made = fed.aggregate("coordinate-median", byzantine=byzantine, mixing=True).adapter
    is_best_for(made.layers[LAYER], np.median(theirs, axis=0), size_of(fed))
    np.testing.assert_allclose(made.extras[EXTRA], np.median(extras, axis=0), 1e-5, 1e-6)


@quick
@given(fed=federations())
def test_shares_of_mixed_updates_are_traced_back(fed: Federation) -> None:
    fed, K = in_order(fed), len(fed.updates)
    assume(K >= 3)
    M = mixing_of(fed, (K - 1) // 3)
    mixed = M @ changes(fed)
    shares = weiszfeld(
        torch.from_numpy(mixed @ mixed.T), torch.full((K,), 1.0 / K, dtype=torch.float64), 1e-6
    )
    made = fed.aggregate("geometric-median", mixing=True).adapter
    wanted = np.einsum("k,kj,jab->ab", shares.numpy(), M, products(fed))
    # Weiszfeld's shares hang on distances between means that nearly agree
    is_best_for(made.layers[LAYER], wanted, 10 * size_of(fed))  # 2e-5
    f = min((K - 1) // 3, (K - 3) // 2)
    M = mixing_of(fed, f)
    scores = dense.krum_order(M @ changes(fed), f)
    made = fed.aggregate("krum", mixing=True).adapter
    chosen = np.einsum("j,jab->ab", M[scores[0]], products(fed))
    is_best_for(made.layers[LAYER], chosen, size_of(fed))


@rules
@pytest.mark.parametrize("attack", ["sign", "noise", "colluding", "huge"])
def test_what_three_hostile_clients_of_ten_can_still_move(name: str, attack: str) -> None:
    fed = attacked(np.random.default_rng(6), attack)
    honest = products(fed)[3:]
    mean = honest.mean(0)
    spread = np.linalg.norm(honest - mean, axis=(1, 2)).max()
    errors = {
        mixing: np.linalg.norm(
            product_of(fed.aggregate(name, mixing=mixing).adapter.layers[LAYER]) - mean
        )
        for mixing in (True, False)
    }
    assert errors[True] <= 0.02 * spread
    if name != "multi-krum":  # which is the mean of the seven honest ones here
        assert errors[False] > 2 * errors[True]


def test_only_mixing_asks_entrywise_rules_for_a_survey() -> None:
    assert not build_rule("coordinate-median").surveys  # type: ignore[attr-defined]
    assert build_rule("coordinate-median", {"mixing": True}).surveys  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("geometric-median", {"byzantine": 2}, "holds without knowing it.*strategy.mixing=true"),
        ("coordinate-median", {"byzantine": 2}, "holds without knowing it.*strategy.mixing=true"),
        ("coordinate-median", {"byzantine": 3, "mixing": True}, "more than .* = 6 clients a round"),
        ("norm-bounding", {"mixing": True}, "strategy.mixing"),
        ("krum", {"mixing": True}, "would average all 4 clients"),
        ("multi-krum", {}, "leaves nobody out of 4"),
    ],
)
def test_options_that_nothing_honours_are_refused(
    name: str, options: dict[str, Any], message: str
) -> None:
    clients = 4 if "4" in message else 6
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        build_rule(name, options).check(Config.from_dict({"federation": {"clients": clients}}))


def test_a_round_of_too_few_says_so() -> None:
    made = scalars(1.0, 2.0, 3.0).aggregate("coordinate-median", mixing=True)
    assert made.notes == ("mixing leaves 0 of 3 updates out, not 1",)


def test_equal_scores_of_mixed_updates_go_to_the_first_name() -> None:
    """Sums that ran in another order differ by a rounding, which must not choose."""
    scores = krum_scores(torch.tensor([[0.0, 1.0], [1.0 + 1e-14, 0.0]]).double(), 0)
    assert scores.tolist() == [1.0, 1.0]
