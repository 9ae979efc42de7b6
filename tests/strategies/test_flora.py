"""FLoRA: products join the base with their scalings, round after round; factors start afresh."""

from __future__ import annotations

from dataclasses import replace

import dense
import numpy as np
import pytest
import torch
from federations import LAYER, Federation, federation, federations, of_ranks, two_clients
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedgraft.adapter import Adapter
from strategies import low_rank
from strategies.aggregation import aggregate
from strategies.registry import build_rule
from strategies.rule import Rule

A_NAME = f"{LAYER}.lora_A.weight"
many = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def joined(adapter: Adapter) -> np.ndarray:
    return adapter.residual[LAYER].product().double().numpy()


def play(fed: Federation, rule: Rule | None = None, *, round: int = 1, seed: int = 0) -> Adapter:
    with fed.spooled() as spool:
        rule = rule or build_rule("flora")
        return aggregate(rule, spool, fed.current, {}, round, seed=seed).adapter


def test_by_hand() -> None:
    """Shares 1/4 and 3/4, scaling 2: the base takes 2 * diag(1/4 * 2, 3/4 * 4) = diag(1, 6)."""
    made = play(two_clients())
    np.testing.assert_allclose(joined(made), np.diag([1.0, 6.0]), atol=1e-6)
    assert made.residual[LAYER].rank == 2
    layer = made.layers[LAYER]
    assert layer.scaling == 2.0 and not layer.B.any()
    assert layer.A.shape == (1, 2) and 0.0 < float(layer.A.abs().max()) <= 2**-0.5


def test_the_new_A_is_a_function_of_seed_round_and_layer() -> None:
    fed = federation(np.random.default_rng(0), d_out=5, d_in=6, r=2, weights=[1.0], layers=2)
    first = play(fed).layers
    assert torch.equal(play(fed).layers[LAYER].A, first[LAYER].A)
    others = [
        play(fed, round=2).layers[LAYER].A,
        play(fed, seed=1).layers[LAYER].A,
        *(layer.A for name, layer in first.items() if name != LAYER),
    ]
    assert not any(torch.equal(other, first[LAYER].A) for other in others)


@many
@given(fed=federations(), data=st.data())
def test_the_scalings_of_all_ranks_stand_inside_the_sum(
    fed: Federation, data: st.DataObject
) -> None:
    """sum p_k alpha / r_k B_k A_k: with the server's alpha / r it would be another matrix."""
    rank = fed.current.layers[LAYER].rank
    fed, clients = of_ranks(fed, [data.draw(st.integers(1, rank)) for _ in fed.updates])
    size = max(np.linalg.norm(c.B) * np.linalg.norm(c.A) for c in clients)
    np.testing.assert_allclose(joined(play(fed)), dense.ideal(clients), atol=1e-6 * size)


def test_the_base_holds_the_sum_of_all_rounds() -> None:
    """Over five rounds of rank 6 each, where the layer has room for 8: never a larger residual.

    float32 factors are rounded once a round, 6e-8 of the whole.
    """
    rng = np.random.default_rng(1)
    fed = federation(rng, d_out=8, d_in=10, r=2, weights=[1.0, 2.0, 3.0])
    total = np.zeros((8, 10))
    for round in range(1, 6):
        total += 2.0 * dense.ideal(fed.clients())
        made = play(fed, round=round)
        assert made.residual[LAYER].rank == min(6 * round, 8)
        np.testing.assert_allclose(joined(made), total, atol=1e-6 * np.linalg.norm(total))
        # as a checkpoint and a message have it
        made = replace(made, residual={}).with_residual(made.residual_tensors())
        again = federation(rng, d_out=8, d_in=10, r=2, weights=[1.0, 2.0, 3.0])
        fed = replace(again, current=made)


def test_hundreds_of_ranks_in_a_larger_layer_are_stacked_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(low_rank, "_EXACT", 5)
    fed = federation(np.random.default_rng(4), d_out=20, d_in=30, r=3, weights=[1.0, 2.0, 3.0])
    fed, clients = of_ranks(fed, [3, 1, 2])
    DW = dense.ideal(clients)
    made = play(fed)
    assert made.residual[LAYER].rank == 6  # padding is not stacked
    np.testing.assert_allclose(joined(made), DW, atol=1e-6 * np.linalg.norm(DW))
    torch.testing.assert_close(made.residual[LAYER].A[:3], fed.updates["client-0"][1][A_NAME])
    again = play(replace(fed, current=made), round=2)
    assert again.residual[LAYER].rank == 12
    np.testing.assert_allclose(joined(again), 2 * DW, atol=1e-6 * np.linalg.norm(DW))


@pytest.mark.parametrize(("d_out", "d_in"), [(9, 14), (14, 9)])
def test_a_full_residual_is_one_dense_matrix_without_a_decomposition(
    monkeypatch: pytest.MonkeyPatch, d_out: int, d_in: int
) -> None:
    monkeypatch.setattr(low_rank, "_EXACT", 5)
    monkeypatch.setattr(torch.linalg, "svd", None)
    fed = federation(np.random.default_rng(5), d_out=d_out, d_in=d_in, r=3, weights=[1.0, 2.0])
    total = np.zeros((d_out, d_in))
    for round, rank in ((1, 6), (2, 9), (3, 9)):
        total += 2.0 * dense.ideal(fed.clients())
        made = play(fed, round=round)
        assert made.residual[LAYER].rank == rank
        np.testing.assert_allclose(joined(made), total, atol=1e-6 * np.linalg.norm(total))
        fed = replace(fed, current=made)


@pytest.mark.parametrize(("energy", "rank"), [(0.5, None), (0.9999, None), (1.0, 3), (0.5, 1)])
def test_compression_keeps_the_stated_energy(energy: float, rank: int | None) -> None:
    fed = federation(np.random.default_rng(2), d_out=20, d_in=30, r=4, weights=[1.0] * 4)
    rule = build_rule("flora", {"energy": energy} | ({"max-rank": rank} if rank else {}))
    made = play(fed, rule)
    DW = 2.0 * dense.ideal(fed.clients())
    values = np.linalg.svd(DW, compute_uv=False)
    kept = made.residual[LAYER].rank
    lost = np.linalg.norm(values[kept:]) / np.linalg.norm(values)
    error = np.linalg.norm(DW - joined(made)) / np.linalg.norm(values)
    assert error == pytest.approx(lost, abs=1e-6)
    if rank is None:
        assert lost**2 <= 1 - energy < (np.linalg.norm(values[kept - 1 :]) ** 2) / (values**2).sum()
    else:
        assert kept == rank


def test_clients_that_learned_nothing_add_nothing() -> None:
    fed = federation(np.random.default_rng(3), d_out=5, d_in=6, r=2, weights=[1.0, 2.0])
    zero = {
        client: (w, {n: torch.zeros_like(t) if "lora_B" in n else t for n, t in tensors.items()})
        for client, (w, tensors) in fed.updates.items()
    }
    assert not play(replace(fed, updates=zero)).residual
