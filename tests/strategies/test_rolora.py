"""RoLoRA: one factor moves in a round and the other one stands, also under a server optimiser."""

from __future__ import annotations

import dense
import numpy as np
import pytest
import torch
from federations import LAYER, Federation, federation, numpy_of, two_clients

from fedgraft.adapter import Tensors
from strategies.aggregation import Aggregated, aggregate
from strategies.registry import build_rule
from strategies.rule import Rule


def play(fed: Federation, rule: Rule, round: int, state: Tensors | None = None) -> Aggregated:
    with fed.spooled() as spool:
        return aggregate(rule, spool, fed.current, state or {}, round)


@pytest.mark.parametrize("round", range(1, 7))
def test_B_moves_in_odd_rounds_and_A_in_even_ones(round: int) -> None:
    rule = build_rule("rolora")
    moving = "B" if round % 2 else "A"
    plan = rule.plan(round)
    assert plan.train == {moving} and plan.send == {"A", "B"} and not plan.derive_A
    fed = federation(np.random.default_rng(round), d_out=5, d_in=6, r=2, weights=[1.0, 2.0, 4.0])
    layer, current = play(fed, rule, round).adapter.layers[LAYER], fed.current.layers[LAYER]
    frozen = "A" if moving == "B" else "B"
    assert torch.equal(getattr(layer, frozen), getattr(current, frozen))
    A, B = numpy_of(layer)
    DW = dense.ideal(fed.clients(factors=moving))
    np.testing.assert_allclose(B @ A, DW, atol=1e-6 * np.linalg.norm(DW))


def test_by_hand() -> None:
    """A stands at (8, 16) in round 1; B at 0 in round 2, which B = (0.5, 3) would follow."""
    rule = build_rule("rolora")
    first = play(two_clients(), rule, 1).adapter.layers[LAYER]
    assert first.A.tolist() == [[8.0, 16.0]] and first.B.tolist() == [[0.5], [3.0]]
    second = play(two_clients(), rule, 2).adapter.layers[LAYER]
    assert second.A.tolist() == [[0.25, 0.75]] and second.B.tolist() == [[0.0], [0.0]]


def test_a_server_optimiser_waits_with_the_frozen_factor() -> None:
    """FedAvgM, beta1 = 1/2, lr 1, from B = 0 and A = (8, 16), the same updates in each round.

    Round 1: m_B = (.5, 3), B = (.5, 3). Round 2: m_A = (.25, .75) - (8, 16), A = (.25, .75); B
    stands although m_B is not 0. Round 3: m_B = m_B / 2 + 0, B = (.75, 4.5).
    """
    rule = build_rule("rolora", {"server-optimizer": "avgm", "server-momentum": 0.5})
    fed, state = two_clients(), {}
    found = []
    for round in (1, 2, 3):
        made = play(fed, rule, round, state)
        fed, state = Federation(made.adapter, fed.updates), made.state
        layer = made.adapter.layers[LAYER]
        found.append((layer.A.flatten().tolist(), layer.B.flatten().tolist()))
    assert found == [
        ([8.0, 16.0], [0.5, 3.0]),
        ([0.25, 0.75], [0.5, 3.0]),
        ([0.25, 0.75], [0.75, 4.5]),
    ]
