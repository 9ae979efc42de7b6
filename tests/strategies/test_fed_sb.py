"""Fed-SB: the sketched SVD, the initialisation, and rounds of R."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from miniature import HEAD, Server, world

from fedgraft.adapter import factor_name
from fedgraft.config import Config
from fedgraft.errors import ConfigError
from strategies.local import beside
from strategies.registry import build_rule
from strategies.sketched_svd import leading, probes, sketch_sizes


def sketched(G: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    omega, psi = probes(0, "layer", rank, *G.shape)
    M = torch.from_numpy(G)
    # float32, as they travel
    Y, W = (M @ omega.double()).float(), (psi.double() @ M).float()
    return tuple(t.numpy() for t in leading(Y, W, psi, rank))  # type: ignore[return-value]


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    d_out=st.integers(1, 30),
    d_in=st.integers(1, 30),
    rank=st.integers(1, 5),
    true=st.integers(0, 5),
)
def test_a_matrix_of_low_rank_is_recovered(
    seed: int, d_out: int, d_in: int, rank: int, true: int
) -> None:
    """Exactly, up to float32 sketches; also where a side is shorter than the rank, or G = 0."""
    rng = np.random.default_rng(seed)
    true = min(true, rank)
    G = rng.standard_normal((d_out, true)) @ rng.standard_normal((true, d_in))
    U, S, V = sketched(G, rank)
    n = min(rank, d_out, d_in)
    assert U.shape == (d_out, n) and S.shape == (n,) and V.shape == (n, d_in)
    np.testing.assert_allclose(U.T @ U, np.eye(n), atol=1e-9)
    np.testing.assert_allclose(V @ V.T, np.eye(n), atol=1e-9)
    assert (S >= 0).all() and (np.diff(S) <= 1e-9).all()
    # 6e-8 of float32, times the condition of the random square Psi Q, hundreds at worst
    np.testing.assert_allclose(U * S @ V, G, atol=1e-4 * max(1.0, np.linalg.norm(G)))


def test_noise_costs_little() -> None:
    """Of values that fall as 1 / i the found directions hold nearly what the best ones do."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((80, 80)))[0] for _ in range(2))
    values = 1.0 / np.arange(1, 81)
    G = left * values @ right
    U, _, V = sketched(G, 4)
    # 0.97 on average over probes
    assert np.linalg.norm(U.T @ G @ V.T) > 0.9 * np.linalg.norm(values[:4])


def test_small_sides_are_seen_whole() -> None:
    assert sketch_sizes(2, 100, 80) == (5, 11)
    assert sketch_sizes(8, 10, 64) == (17, 10)
    omega, psi = probes(0, "x", 8, 10, 12)
    assert torch.equal(omega, torch.eye(12)) and torch.equal(psi, torch.eye(10))
    one, two = probes(0, "x", 2, 100, 80), probes(0, "y", 2, 100, 80)
    assert one[0].shape == (80, 5) and one[1].shape == (11, 100)
    assert not torch.equal(one[0], two[0]) and torch.equal(one[0], probes(0, "x", 2, 100, 80)[0])


@pytest.mark.parametrize("shape", [(5, 6, 2), (7, 3, 4)], ids=["wide", "rank above a side"])
def test_round_1_is_a_step_of_full_fine_tuning_cut_to_rank_r(shape: tuple[int, int, int]) -> None:
    d_out, d_in, r = shape
    adapter, clients = world(d_out=d_out, d_in=d_in, r=r)
    rule = build_rule("fed-sb", {"initial-lr": 0.1})
    host = Server(rule, adapter)
    start = adapter.tensors()
    host.step(clients)
    assert all(not client.calls for client in clients.values())  # nothing trains
    assert all(update.tensors == {} for update in host.updates.values())
    for layer, made in host.adapter.layers.items():
        G = sum((k + 1) / 6 * clients[str(k)].gradient(start, layer) for k in range(3)).numpy()
        left, values, right = np.linalg.svd(G)
        best = left[:, :r] * values[:r][: len(left)] @ right[:r] if r <= d_in else G
        np.testing.assert_allclose(made.product().numpy(), -0.1 * best, atol=1e-5)
        # s A0 and B0 have orthonormal rows and columns, zero where there are none
        n = min(shape)
        B0 = host.state[beside(layer, "B0")].numpy()
        A0 = made.scaling * host.state[beside(layer, "A0")].numpy()
        for gram in (B0.T @ B0, A0 @ A0.T):
            np.testing.assert_allclose(gram, np.diag([1.0] * n + [0.0] * (r - n)), atol=1e-5)
    assert torch.equal(host.adapter.extras[HEAD], adapter.extras[HEAD])


@pytest.mark.parametrize("shape", [(5, 6, 2), (7, 3, 4)], ids=["wide", "rank above a side"])
def test_later_rounds_train_and_average_R_exactly(shape: tuple[int, int, int]) -> None:
    d_out, d_in, r = shape
    adapter, clients = world(d_out=d_out, d_in=d_in, r=r)
    host = Server(build_rule("fed-sb"), adapter)
    host.step(clients)
    bases = {key: t for key, t in host.state.items() if not key.endswith("::R")}
    losses = []
    for _ in range(3):
        host.step(clients)
        for layer, made in host.adapter.layers.items():
            B0, A0 = bases[beside(layer, "B0")], bases[beside(layer, "A0")]
            R = {k: update.companions[beside(layer, "R")] for k, update in host.updates.items()}
            mean = sum(
                (k + 1) / 6 * made.scaling * (B0.double() @ R[str(k)].double() @ A0.double())
                for k in range(3)
            )
            torch.testing.assert_close(made.product().double(), mean, rtol=0, atol=1e-6)
            assert torch.equal(made.A, A0)
        assert all(torch.equal(host.state[key], t) for key, t in bases.items())
        mean_head = sum((k + 1) / 6 * host.updates[str(k)].tensors[HEAD] for k in range(3))
        torch.testing.assert_close(host.adapter.extras[HEAD], mean_head)
        whole = {name: t.double() for name, t in host.adapter.tensors().items()}
        losses.append(sum(client.weight * float(client.loss(whole)) for client in clients.values()))
    assert losses[2] < losses[1] < losses[0]
    # behind a basis of independent columns, padding left out
    _, how = clients["0"].calls[0]
    layer = next(iter(adapter.layers))
    n = min(shape)
    assert how.factors == {"B"} and how.bases[factor_name(layer, "B")].shape == (d_out, n)


def test_the_gradient_by_R_needs_no_scaling() -> None:
    """One step: R - eta U^T G V, with alpha / r = 1 or 4."""
    for scaling in (1.0, 4.0):
        adapter, clients = world(scaling=scaling)
        host = Server(build_rule("fed-sb"), adapter)
        host.step(clients)
        client = clients["0"]
        client.steps = 1
        layer = next(iter(adapter.layers))
        R0 = host.state[beside(layer, "R")].double()
        U = host.state[beside(layer, "B0")].double()
        V = scaling * host.state[beside(layer, "A0")].double()
        G = client.gradient(host.adapter.tensors(), layer)
        host.step(clients)
        R = host.updates["0"].companions[beside(layer, "R")].double()
        torch.testing.assert_close(R, R0 - client.lr * U.T @ G @ V.T, rtol=0, atol=1e-6)


def test_after_round_1_only_r_squared_numbers_travel() -> None:
    adapter, clients = world()
    rule = build_rule("fed-sb")
    host = Server(rule, adapter)
    late = clients.pop("2")
    host.step(clients)
    assert rule.plan(2).send == rule.plan(2).train == frozenset()
    layers = list(adapter.layers)
    sent = rule.companions(host.state, 2)
    assert {key: tuple(t.shape) for key, t in sent.items()} == {
        beside(layer, "R"): (2, 2) for layer in layers
    }
    once = rule.constants(host.state, 2)
    assert set(once) == {beside(layer, short) for layer in layers for short in ("A0", "B0")}
    assert rule.companions(host.state, 1) == rule.constants(host.state, 1) == {}
    host.step(clients | {"2": late})  # who missed round 1 comes in with the constants
    # what a client holds is what the server has, bit for bit
    held = host.hold(late, 3)
    assert all(torch.equal(held[name], t) for name, t in host.adapter.tensors().items())


def test_a_start_from_R_zero_and_refusals() -> None:
    adapter, clients = world()
    host = Server(build_rule("fed-sb", {"initial-lr": 0.0}), adapter)
    host.step(clients)
    assert all(not layer.B.any() for layer in host.adapter.layers.values())
    host.step(clients)
    assert all(layer.B.any() for layer in host.adapter.layers.values())
    rule = build_rule("fed-sb")
    rule.check(Config.load())
    with pytest.raises(ConfigError, match=r"adapter\.from") as caught:
        rule.check(Config.load(settings=["adapter.from=somewhere"]))
    assert "fedavg" in caught.value.remedy
