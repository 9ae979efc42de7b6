"""FedRot-LoRA: rotations by hand and by property, and what clients send."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from miniature import Miniature, Server, world
from torch import Tensor

from fedgraft.adapter import Tensors, factor_name
from fedgraft.errors import ConfigError
from strategies.fedrot_lora import nearest_rotation, soft_rotation
from strategies.local import LocalUpdate, Trained
from strategies.registry import build_rule

LAYER = "model.layers.0.q_proj"
A, B = factor_name(LAYER, "A"), factor_name(LAYER, "B")


def turn(angle: float) -> Tensor:
    c, s = math.cos(angle), math.sin(angle)
    return torch.tensor([[c, -s], [s, c]], dtype=torch.float64)


def random_rotation(rng: np.random.Generator, r: int) -> np.ndarray:
    Q, _ = np.linalg.qr(rng.standard_normal((r, r)))
    Q[:, -1] *= np.sign(np.linalg.det(Q))
    return Q


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), r=st.integers(1, 5), rank=st.integers(0, 5))
def test_nearest_rotation_is_a_rotation_and_none_is_nearer(seed: int, r: int, rank: int) -> None:
    """Also of singular matrices and of zero."""
    rng = np.random.default_rng(seed)
    M = rng.standard_normal((r, min(r, rank))) @ rng.standard_normal((min(r, rank), r))
    R = nearest_rotation(torch.from_numpy(M)).numpy()
    np.testing.assert_allclose(R.T @ R, np.eye(r), atol=1e-10)
    assert np.linalg.det(R) == pytest.approx(1.0)
    best = np.trace(R.T @ M)
    # the tie-break may cost its own size, 1e-9 of M
    slack = 1e-7 * max(1.0, np.linalg.norm(M))
    for _ in range(30):
        assert np.trace(random_rotation(rng, r).T @ M) <= best + slack


def test_rotations_by_hand() -> None:
    assert torch.allclose(nearest_rotation(3.0 * turn(0.7)), turn(0.7))
    assert torch.equal(nearest_rotation(torch.zeros(3, 3)), torch.eye(3, dtype=torch.float64))
    # a reflection is not taken: of diag(2, -1) the smaller direction is turned over
    assert torch.allclose(nearest_rotation(torch.diag(torch.tensor([2.0, -1.0]))), turn(0.0))
    # one direction is open (M has rank 1) and stays
    assert torch.allclose(nearest_rotation(torch.diag(torch.tensor([2.0, 0.0]))), turn(0.0))
    # half of the way between I and a turn is the turn by half the angle
    assert torch.allclose(soft_rotation(turn(1.0), 0.5), turn(0.5))
    assert torch.allclose(soft_rotation(turn(1.0), 1.0), turn(1.0))
    assert torch.allclose(soft_rotation(turn(1.0), 0.0), turn(0.0))
    # I/2 - I/2 leaves everything open; pi itself is rounded, which 1e-9 of I outweighs
    assert torch.allclose(soft_rotation(turn(math.pi), 0.5), turn(0.0), atol=1e-6)


def fixed(client: Miniature, tensors: Tensors) -> Miniature:
    """A client whose training always ends at the same tensors."""
    client.train = lambda start, how: Trained(start | tensors)  # type: ignore[method-assign]
    return client


def sent(round: int, start: Tensors, trained: Tensors, lambda_: float) -> LocalUpdate:
    rule = build_rule("fedrot-lora", {"lambda": lambda_})
    _, clients = world(layers=1)
    return rule.local(fixed(clients["0"], trained).work(rule, round, start, {}))


def test_factors_are_turned_back_by_hand() -> None:
    """What came was (I, I); the client has it turned by 1 rad, and scaled by 2."""
    start = {A: torch.eye(2), B: torch.eye(2)}
    Q = turn(1.0).float()
    trained = {A: 2.0 * Q, B: Q.T.contiguous()}
    for round in (2, 3):
        hard = sent(round, start, trained, 1.0).tensors
        torch.testing.assert_close(hard[A], 2.0 * torch.eye(2))
        torch.testing.assert_close(hard[B], torch.eye(2))
        half = sent(round, start, trained, 0.5).tensors
        torch.testing.assert_close(half[A], 2.0 * turn(0.5).float())
    assert sent(1, start, trained, 1.0).tensors == trained  # B was zero: nothing to turn to


def test_the_aligned_factor_alternates() -> None:
    """A would be turned by 1 rad, B by 0.4: B leads in even rounds, A in odd ones."""
    start = {A: torch.eye(2), B: torch.eye(2)}
    trained = {A: turn(1.0).float(), B: turn(-0.4).float()}
    even, odd = sent(2, start, trained, 1.0).tensors, sent(3, start, trained, 1.0).tensors
    torch.testing.assert_close(even[B], torch.eye(2))
    torch.testing.assert_close(even[A], turn(0.6).float())
    torch.testing.assert_close(odd[A], torch.eye(2))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    r=st.integers(1, 4),
    round=st.sampled_from([2, 3]),
    lambda_=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
)
def test_turning_keeps_the_product_and_comes_no_less_near(
    seed: int, r: int, round: int, lambda_: float
) -> None:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(rng.standard_normal(shape)).float()

    start, trained = ({A: normal(r, 6), B: normal(5, r)} for _ in range(2))
    turned = sent(round, start, trained, lambda_).tensors
    torch.testing.assert_close(turned[B] @ turned[A], trained[B] @ trained[A], rtol=0, atol=1e-5)
    lead = B if round == 2 else A
    before, after = (float((t[lead] - start[lead]).norm()) for t in (trained, turned))
    assert after <= before + 1e-5


def test_turned_copies_of_one_update_average_to_it() -> None:
    """The paper's point: the same product in three bases; FedAvg's mean is another product."""
    rng = np.random.default_rng(1)
    adapter, clients = world(layers=1, r=3)
    start = {A: torch.from_numpy(rng.standard_normal((3, 6))).float()}
    start[B] = torch.from_numpy(rng.standard_normal((5, 3))).float()
    adapter = adapter.with_tensors(start)
    update = {name: 1.5 * tensor for name, tensor in start.items()}
    for client in clients.values():
        Q = torch.from_numpy(random_rotation(rng, 3)).float()
        fixed(client, {A: Q.T @ update[A], B: update[B] @ Q})
    products = {}
    for rule in (build_rule("fedrot-lora", {"lambda": 1.0}), build_rule("fedavg")):
        host = Server(rule, adapter, round=1)
        host.step(clients)
        layer = host.adapter.layers[LAYER]
        products[rule.name] = layer.B @ layer.A
    expected = update[B] @ update[A]
    torch.testing.assert_close(products["fedrot-lora"], expected, rtol=0, atol=1e-5)
    assert float((products["fedavg"] - expected).norm() / expected.norm()) > 0.3


def test_lambda_is_checked() -> None:
    with pytest.raises(ConfigError, match=r"strategy\.lambda"):
        build_rule("fedrot-lora", {"lambda": 1.5})
