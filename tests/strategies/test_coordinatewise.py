"""Trimmed mean and coordinate median, against numpy on dense products."""

from __future__ import annotations

import dense
import numpy as np
import pytest
import torch
from federations import LAYER, Federation, federation, federations, two_clients
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rounds_by_hand import (
    EXTRA,
    in_order,
    is_best_for,
    number,
    product_of,
    products,
    scalars,
    size_of,
)

from strategies import coordinatewise
from strategies.coordinatewise import rising

quick = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@quick
@given(fed=federations(), byzantine=st.none() | st.integers(0, 3))
def test_coordinatewise_rules_equal_their_dense_definitions(
    fed: Federation, byzantine: int | None
) -> None:
    fed, K = in_order(fed), len(fed.updates)
    f = min((K - 1) // 3 if byzantine is None else byzantine, (K - 1) // 2)
    values = np.stack([t[EXTRA].double().numpy() for _, t in fed.updates.values()])
    made = fed.aggregate("trimmed-mean", byzantine=byzantine).adapter
    is_best_for(made.layers[LAYER], dense.trimmed_mean(products(fed), f), size_of(fed))
    np.testing.assert_allclose(made.extras[EXTRA], dense.trimmed_mean(values, f), rtol=1e-6)
    made = fed.aggregate("coordinate-median").adapter
    is_best_for(made.layers[LAYER], np.median(products(fed), axis=0), size_of(fed))
    np.testing.assert_allclose(made.extras[EXTRA], np.median(values, axis=0), rtol=1e-6)


def test_coordinatewise_rules_by_hand() -> None:
    fed = scalars(-50.0, 1.0, 2.0, 6.0, 1000.0)
    assert number(fed.aggregate("coordinate-median")) == 2.0
    assert number(fed.aggregate("trimmed-mean", byzantine=1)) == 3.0
    assert number(fed.aggregate("trimmed-mean", byzantine=9)) == 2.0  # as many as leave a median
    assert number(scalars(1.0, 2.0, 4.0, 9.0).aggregate("coordinate-median")) == 3.0
    assert number(scalars(1.0, 4.0).aggregate("trimmed-mean", byzantine=1)) == 2.5


def test_rows_are_made_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    fed = federation(np.random.default_rng(2), d_out=7, d_in=5, r=2, weights=[1.0] * 4)
    whole = fed.aggregate("coordinate-median").adapter
    seen: list[int] = []

    def counted(values: torch.Tensor) -> torch.Tensor:
        seen.append(values.shape[1])
        return rising(values)

    monkeypatch.setattr(coordinatewise, "_BLOCK", 4 * 5 * 3)
    monkeypatch.setattr(coordinatewise, "_TILE", 4)
    monkeypatch.setattr(coordinatewise, "rising", counted)
    assert fed.aggregate("coordinate-median").adapter.digest() == whole.digest()
    assert seen == [15, 15, 5, 15]  # three blocks of rows, and the classifier


def test_two_clients_by_hand() -> None:
    """Products are diag(2, 0) and diag(0, 4); their mean, cut to rank 1, is diag(0, 2)."""
    made = two_clients().aggregate("trimmed-mean").adapter.layers[LAYER]
    np.testing.assert_allclose(product_of(made), [[0, 0], [0, 2]], atol=1e-6)
