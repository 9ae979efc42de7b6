"""FedEx-LoRA: what the means' product lacks joins the base, to the precision of float32."""

from __future__ import annotations

from dataclasses import replace

import dense
import numpy as np
import pytest
import torch
from federations import LAYER, Federation, federation, numpy_of

from fedgraft.adapter import Adapter, LoraLayer


def joined(adapter: Adapter) -> np.ndarray | float:
    if LAYER not in adapter.residual:
        return 0.0
    A, B = numpy_of(adapter.residual[LAYER])
    return adapter.residual[LAYER].scaling * (B @ A)


def missing(fed: Federation) -> np.ndarray:
    """s (DW - Bbar Abar), means in float64."""
    clients = fed.clients()
    A, B = dense.means(clients)
    return fed.current.layers[LAYER].scaling * (dense.ideal(clients) - B @ A)


def test_by_hand() -> None:
    """d = 2, r = 1, equal shares, scaling 4: A = (1, 0), B = (2, 0)^T and A = (0, 3), B = (0, 4)^T.

    Abar = (.5, 1.5), Bbar = (1, 2)^T, DW = diag(1, 6): the base takes 4 ((.5, -1.5), (-1, 3)).
    """
    A, B = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"
    first = {A: torch.tensor([[1.0, 0.0]]), B: torch.tensor([[2.0], [0.0]])}
    second = {A: torch.tensor([[0.0, 3.0]]), B: torch.tensor([[0.0], [4.0]])}
    current = Adapter({LAYER: LoraLayer(torch.zeros(1, 2), torch.zeros(2, 1), 4.0)})
    made = Federation(current, {"0": (1.0, first), "1": (1.0, second)}).aggregate("fedex-lora")
    layer = made.adapter.layers[LAYER]
    assert layer.A.tolist() == [[0.5, 1.5]] and layer.B.tolist() == [[1.0], [2.0]]
    np.testing.assert_allclose(joined(made.adapter), [[2.0, -6.0], [-4.0, 12.0]], atol=1e-6)
    assert made.adapter.residual[LAYER].rank == 1


def test_the_model_is_the_mean_of_the_clients_models_in_every_round() -> None:
    """W0 drops out; each client's model is what stands beside the base, and s B_k A_k."""
    rng = np.random.default_rng(0)
    fed = federation(rng, d_out=12, d_in=14, r=2, weights=[1.0, 2.0, 4.0])
    for _ in range(4):
        before = joined(fed.current)
        mean = before + 2.0 * dense.ideal(fed.clients())
        made = fed.aggregate("fedex-lora").adapter
        A, B = numpy_of(made.layers[LAYER])
        whole = joined(made) + 2.0 * B @ A
        np.testing.assert_allclose(whole, mean, atol=1e-6 * np.linalg.norm(mean))
        drifted = federation(rng, d_out=12, d_in=14, r=2, weights=[1.0, 2.0, 4.0]).updates
        fed = Federation(made, drifted)


@pytest.mark.parametrize("drift", [1.0, 0.1, 1e-3])
def test_the_residual_is_small_and_right_at_small_drift(drift: float) -> None:
    """Rank (K - 1) r; right to float32's precision of the product, or better.

    Subtracted as products in float32, the residual would be off by more than 1e-7 of the product,
    which at a drift of 1e-3 is a tenth of it.
    """
    rng = np.random.default_rng(1)
    fed = federation(rng, d_out=40, d_in=50, r=4, weights=[1.0, 2.0, 3.0], drift=drift)
    made = fed.aggregate("fedex-lora").adapter
    assert made.residual[LAYER].rank <= 8
    product = 2.0 * np.linalg.norm(dense.ideal(fed.clients()))
    R = missing(fed)
    # what compression leaves out, and the residual's own rounding
    allowed = 1.5e-8 * product + 1e-7 * np.linalg.norm(R)
    assert np.linalg.norm(joined(made) - R) <= allowed


def test_energy_is_measured_against_the_whole_update() -> None:
    """1% of the update may be lost, in which the residual of a small drift disappears."""
    rng = np.random.default_rng(2)
    near, far = (
        federation(rng, d_out=20, d_in=20, r=3, weights=[1.0] * 3, drift=drift)
        for drift in (0.01, 1.0)
    )
    for fed, kept in ((near, False), (far, True)):
        made = fed.aggregate("fedex-lora", energy=1 - 0.01**2).adapter
        R, product = missing(fed), 2.0 * dense.ideal(fed.clients())
        assert bool(made.residual) == kept
        whole = np.sqrt(np.linalg.norm(product - R) ** 2 + np.linalg.norm(R) ** 2)
        assert np.linalg.norm(joined(made) - R) <= 0.01 * whole
    capped = far.aggregate("fedex-lora", **{"max-rank": 2}).adapter
    assert capped.residual[LAYER].rank == 2


def test_equal_clients_leave_nothing_behind() -> None:
    fed = federation(np.random.default_rng(3), d_out=6, d_in=7, r=2, weights=[1.0, 2.0, 3.0])
    update = next(iter(fed.updates.values()))[1]
    equal = replace(fed, updates={str(k): (0.1 * (k + 1), update) for k in range(3)})
    assert not equal.aggregate("fedex-lora").adapter.residual
