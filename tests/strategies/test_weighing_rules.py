"""Krum, the geometric median and norm bounding, against dense definitions on whole updates."""

from __future__ import annotations

import dense
import numpy as np
import pytest
import torch
from federations import LAYER, Federation, federation, federations
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

from fedgraft.adapter import LoraLayer
from strategies.geometric_median import typical_distance, weiszfeld
from strategies.gram import gram_of_changes, norms_of_changes, squared_distances

quick = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])


# Distances


@quick
@given(
    seed=st.integers(0, 2**32 - 1),
    r=st.integers(1, 4),
    drift=st.sampled_from([1.0, 1e-3, 1e-5]),
)
def test_gram_matrix_is_that_of_the_dense_changes(seed: int, r: int, drift: float) -> None:
    """Also where clients hardly moved: by <B_i A_i, B_j A_j> it would be off by 1e-6 at 1e-5."""
    fed = federation(
        np.random.default_rng(seed), d_out=7, d_in=5, r=r, weights=[1.0] * 4, drift=drift
    ).without_extras()
    clients = [LoraLayer(*map(torch.from_numpy, (c.A, c.B)), 2.0) for c in fed.clients()]
    current = fed.current.layers[LAYER]
    gram = gram_of_changes(clients, current).numpy()
    B, A = current.B.double().numpy(), current.A.double().numpy()
    # in the form that does not cancel, for the dense difference itself is off by 1e-11 at 1e-5
    dense_changes = np.stack(
        [2.0 * ((c.B - B) @ c.A + B @ (c.A - A)).ravel() for c in fed.clients()]
    )
    expected = dense_changes @ dense_changes.T
    np.testing.assert_allclose(gram, expected, atol=1e-13 * np.abs(expected).max())
    assert (gram == gram.T).all()
    norms = norms_of_changes(clients, current).numpy()
    np.testing.assert_allclose(norms, gram.diagonal(), rtol=1e-9, atol=1e-13 * gram.max())


def test_gram_matrix_over_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    fed = federation(np.random.default_rng(0), d_out=9, d_in=8, r=2, weights=[1.0] * 3)
    layers = [LoraLayer(*map(torch.from_numpy, (c.A, c.B)), 2.0) for c in fed.clients()]
    whole = gram_of_changes(layers, fed.current.layers[LAYER])
    monkeypatch.setattr("strategies.gram._BLOCK", 4)
    torch.testing.assert_close(gram_of_changes(layers, fed.current.layers[LAYER]), whole)


def test_equal_changes_are_at_distance_zero() -> None:
    rng = np.random.default_rng(1)
    changes = np.repeat(rng.standard_normal((1, 500)), 3, axis=0)
    rounding = 1.0 + 1e-15 * rng.standard_normal((3, 3))
    gram = torch.from_numpy(changes @ changes.T * rounding)
    assert not squared_distances(gram).any()


# Krum and Multi-Krum


@quick
@given(fed=federations(), byzantine=st.none() | st.integers(0, 2))
def test_krum_hands_out_the_client_of_the_lowest_score(
    fed: Federation, byzantine: int | None
) -> None:
    K = len(fed.updates)
    assume(K >= 3)
    f = min((K - 1) // 3 if byzantine is None else byzantine, (K - 3) // 2)
    order = dense.krum_order(changes(fed), f)
    made = fed.aggregate("krum", byzantine=byzantine).adapter
    _, tensors = list(in_order(fed).updates.values())[order[0]]
    for name, tensor in made.tensors().items():
        assert torch.equal(tensor, tensors[name].float())


@quick
@given(fed=federations(), selected=st.none() | st.integers(1, 7))
def test_multi_krum_is_the_mean_of_the_lowest_scores(fed: Federation, selected: int | None) -> None:
    K = len(fed.updates)
    assume(K >= 3)
    f = min((K - 1) // 3, (K - 3) // 2)
    m = min(selected or K, K - f)
    chosen = sorted(dense.krum_order(changes(fed), f)[:m])
    made = fed.aggregate("multi-krum", selected=selected).adapter
    is_best_for(made.layers[LAYER], products(fed)[chosen].mean(0), size_of(fed))
    values = [t[EXTRA].double().numpy() for _, t in in_order(fed).updates.values()]
    expected = np.mean([values[k] for k in chosen], axis=0)
    np.testing.assert_allclose(made.extras[EXTRA], expected, rtol=1e-6, atol=1e-6)


def test_krum_by_hand() -> None:
    """Of 1, 2, 4, 8, 100 with f = 1 each has 2 neighbours: scores 1 + 9, 1 + 4, 4 + 9, ..."""
    fed = scalars(1.0, 2.0, 4.0, 8.0, 100.0)
    assert number(fed.aggregate("krum", byzantine=1)) == 2.0
    assert number(fed.aggregate("multi-krum", byzantine=1)) == pytest.approx(15.0 / 4.0)
    # 2 (5), 1 (10), 4 (13)
    made = fed.aggregate("multi-krum", byzantine=1, selected=3)
    assert number(made) == pytest.approx(7.0 / 3.0)


def test_equal_scores_go_to_the_first_name() -> None:
    assert number(scalars(5.0, 1.0, 1.0, 5.0, 3.0).aggregate("krum")) == 5.0
    made = scalars(2.0, 1.0, 3.0).aggregate("krum")  # 1 neighbour each, all at distance 1
    assert number(made) == 2.0 and made.notes == ()


def test_krum_says_what_it_cannot_hold_against() -> None:
    assert scalars(1.0, 2.0).aggregate("krum").notes == (
        "krum cannot tell a hostile update among 2: it takes 3",
    )
    assert scalars(1.0, 2.0, 3.0, 4.0).aggregate("multi-krum", byzantine=3).notes == (
        "multi-krum holds against 0 hostile updates of 4, not 3",
    )


# Geometric median


@quick
@given(fed=federations(), weights=st.sampled_from(["equal", "examples"]))
def test_geometric_median_is_where_all_pulls_cancel(fed: Federation, weights: str) -> None:
    fed, D = in_order(fed), changes(fed)
    w = np.array([weight for weight, _ in fed.updates.values()])
    w = w / w.sum() if weights == "examples" else np.full(len(D), 1.0 / len(D))
    shares = weiszfeld(torch.from_numpy(D @ D.T), torch.from_numpy(w), 1e-6).numpy()
    assert shares.sum() == pytest.approx(1.0) and (shares >= 0.0).all()
    # Weiszfeld's steps get small where the optimum is a client or nearly one
    assert dense.median_slope(D, w, shares @ D) <= 1e-3
    made = fed.aggregate("geometric-median", weights=weights).adapter
    wanted = np.einsum("k,kij->ij", shares, products(fed))
    is_best_for(made.layers[LAYER], wanted, size_of(fed))
    values = np.stack([t[EXTRA].double().numpy() for _, t in fed.updates.values()])
    expected = np.einsum("k,kij->ij", shares, values)
    np.testing.assert_allclose(made.extras[EXTRA], expected, rtol=1e-5, atol=1e-5)


def test_geometric_median_by_hand() -> None:
    """On a line it is the median; at the corners of a cross, the crossing."""
    assert number(scalars(1.0, 2.0, 9.0).aggregate("geometric-median")) == pytest.approx(2, 1e-4)
    cross = torch.tensor([[3.0, 0], [-1, 0], [0, 5], [0, -2]]).double()
    shares = weiszfeld(cross @ cross.T, torch.full((4,), 0.25).double(), 1e-6)
    torch.testing.assert_close(shares @ cross, torch.zeros(2).double(), atol=1e-6, rtol=0)


def test_where_most_of_the_weight_agrees_is_the_geometric_median() -> None:
    """However far off the others are: with a smoothed distance 1e20 would have got through."""
    made = scalars(2.0, 2.0, 2.0, 1e20, -1.0).aggregate("geometric-median")
    assert number(made) == 2.0
    assert number(scalars(3.0, 3.0, 3.0).aggregate("geometric-median")) == pytest.approx(3.0)


def test_typical_distance_is_that_of_the_closer_half() -> None:
    points = torch.tensor([0.0, 1.0, 3.0, 1e9, -1e9]).double()
    squares = (points[:, None] - points).square()
    assert typical_distance(squares) == 2.0  # of 1 to its two closest, 0 and 3
    together = torch.tensor([0.0, 0.0, 0.0, 7.0]).double()
    assert typical_distance((together[:, None] - together).square()) == 7.0


# Norm bounding


@quick
@given(fed=federations(), bound=st.none() | st.sampled_from([1e-3, 1.0, 1e6]))
def test_norm_bounding_is_the_mean_of_clipped_changes(fed: Federation, bound: float | None) -> None:
    fed, D = in_order(fed), changes(fed)
    norms = np.sort(np.linalg.norm(D, axis=1))
    M = norms[(len(norms) - 1) // 2] if bound is None else bound
    K = len(D)
    kept = np.array([min(1.0, M / max(np.linalg.norm(d), 1e-300)) for d in D]) / K
    made = fed.aggregate("norm-bounding", norm=bound).adapter
    now = product_of(fed.current.layers[LAYER])
    wanted = now + np.einsum("k,kij->ij", kept, products(fed) - now)
    is_best_for(made.layers[LAYER], wanted, size_of(fed))
    whole = dense.norm_bounded(D, np.full(K, 1.0 / K), M)
    extra = whole[-made.extras[EXTRA].numel() :].reshape(made.extras[EXTRA].shape)
    expected = fed.current.extras[EXTRA].double().numpy() + extra
    np.testing.assert_allclose(made.extras[EXTRA], expected, rtol=1e-5, atol=1e-5)


def test_norm_bounding_by_hand() -> None:
    """From 0: 1, -2 and 60 clipped to the median norm 2 have the mean 1 / 3."""
    fed = scalars(1.0, -2.0, 60.0)
    assert number(fed.aggregate("norm-bounding")) == pytest.approx(1.0 / 3.0)
    assert number(fed.aggregate("norm-bounding", norm=4.0)) == pytest.approx(1.0)
    assert number(fed.aggregate("norm-bounding", norm=0.5)) == pytest.approx(0.5 / 3.0)
