"""FedSVD: the exact mean of B over a shared A, in a basis that is remade."""

from __future__ import annotations

from dataclasses import replace

import dense
import numpy as np
import pytest
import torch
from federations import LAYER, Federation, federation, federations, numpy_of
from hypothesis import HealthCheck, given, settings

from fedgraft.adapter import Adapter, LoraLayer
from strategies.aggregation import aggregate
from strategies.registry import build_rule

many = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def play(fed: Federation, round: int = 1, **options: int) -> LoraLayer:
    with fed.spooled() as spool:
        rule = build_rule("fedsvd", options)
        return aggregate(rule, spool, fed.current, {}, round).adapter.layers[LAYER]


def test_by_hand() -> None:
    """B = (2, 0; 0, 4) and (2, 0; 0, 8) in equal shares over A = (0, 5, 0; 3, 0, 0).

    Bbar A = (0, 10, 0; 18, 0, 0): 18 on the first axis, 10 on the second.
    """
    A = torch.tensor([[0.0, 5.0, 0.0], [3.0, 0.0, 0.0]])
    current = Adapter({LAYER: LoraLayer(A, torch.zeros(2, 2))})
    name = f"{LAYER}.lora_B.weight"
    updates = {str(b): (1.0, {name: torch.diag(torch.tensor([2.0, b]))}) for b in (4.0, 8.0)}
    layer = play(Federation(current, updates))
    torch.testing.assert_close(layer.A, torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
    torch.testing.assert_close(layer.B, torch.tensor([[0.0, 10.0], [18.0, 0.0]]))


@many
@given(fed=federations())
def test_the_rows_of_A_are_orthonormal_and_span_what_they_did(fed: Federation) -> None:
    old = numpy_of(fed.current.layers[LAYER])[0]
    A, B = numpy_of(play(fed))
    used = A.any(1)
    assert used.sum() == min(A.shape) and not (~used[:-1] & used[1:]).any()
    rows = A[used]
    np.testing.assert_allclose(rows @ rows.T, np.eye(len(rows)), atol=1e-6)
    np.testing.assert_allclose(old @ rows.T @ rows, old, atol=1e-6 * np.linalg.norm(old))
    lengths = np.linalg.norm(B, axis=0)
    assert (np.diff(lengths) <= 1e-6 * lengths.max(initial=0.0)).all()


def test_directions_that_were_not_used_can_be() -> None:
    """Clients that train one column of B, or none: A keeps all its rows."""
    fed = federation(np.random.default_rng(0), d_out=7, d_in=9, r=3, weights=[1.0, 2.0])
    for columns in (0, 1):
        updates = {}
        for client, (weight, tensors) in fed.updates.items():
            B = torch.zeros(7, 3)
            B[:, :columns] = tensors[f"{LAYER}.lora_B.weight"][:, :columns]
            updates[client] = (weight, tensors | {f"{LAYER}.lora_B.weight": B})
        A, B = numpy_of(play(replace(fed, updates=updates)))
        np.testing.assert_allclose(A @ A.T, np.eye(3), atol=1e-6)
        assert (np.linalg.norm(B, axis=0) > 1e-6).sum() == columns


@pytest.mark.parametrize(("round", "turns"), [(1, False), (2, False), (3, True), (6, True)])
def test_period(round: int, turns: bool) -> None:
    fed = federation(np.random.default_rng(1), d_out=7, d_in=9, r=3, weights=[1.0, 2.0])
    layer = play(fed, round, period=3)
    assert torch.equal(layer.A, fed.current.layers[LAYER].A) != turns
    A, B = numpy_of(layer)
    DW = dense.ideal(fed.clients(factors="B"))
    np.testing.assert_allclose(B @ A, DW, atol=1e-6 * np.linalg.norm(DW))


def test_plan() -> None:
    """A goes down, since it changes, and never up."""
    plan = build_rule("fedsvd").plan(2)
    assert plan.train == {"B"} and plan.send == {"A", "B"} and not plan.derive_A
