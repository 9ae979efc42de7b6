"""FLASC: what goes down, what comes up, and the server's step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from miniature import HEAD, Server, world

from fedgraft.adapter import Adapter, LoraLayer, factor_name
from fedgraft.errors import ConfigError
from strategies.local import Trained
from strategies.registry import build_rule

FIRST, SECOND = "model.layers.0.q_proj", "model.layers.1.q_proj"


def by_hand() -> Adapter:
    """Ten LoRA entries in two layers, and an extra."""
    layers = {
        FIRST: LoraLayer(torch.tensor([[9.0, -1.0]]), torch.tensor([[0.0], [4.0]])),
        SECOND: LoraLayer(torch.tensor([[-5.0, 0.5, 2.0]]), torch.tensor([[0.1], [-0.2], [3.0]])),
    }
    return Adapter(layers, {HEAD: torch.tensor([0.01, 100.0])})


def test_the_largest_entries_of_all_layers_and_factors_go_down() -> None:
    rule = build_rule("flasc", {"density-down": 0.4})  # 4 of 10: 9, -5, 4, 3
    sent = rule.outgoing(by_hand(), 1)
    assert sent.layers[FIRST].A.tolist() == [[9.0, 0.0]]
    assert sent.layers[FIRST].B.tolist() == [[0.0], [4.0]]
    assert sent.layers[SECOND].A.tolist() == [[-5.0, 0.0, 0.0]]
    assert sent.layers[SECOND].B.tolist() == [[0.0], [0.0], [3.0]]
    assert torch.equal(sent.extras[HEAD], by_hand().extras[HEAD])
    assert rule.plan(1).sparse
    whole = build_rule("flasc", {"density-down": 1.0}).outgoing(by_hand(), 1)
    assert whole.digest() == by_hand().digest()


def test_the_largest_differences_come_up_by_hand() -> None:
    rule = build_rule("flasc", {"density-up": 0.3})  # 3 of 10
    _, clients = world(layers=1)
    client = clients["0"]
    client.data = {FIRST: client.data[FIRST], SECOND: client.data[FIRST]}
    start = by_hand().tensors()
    moves = {  # 0.7, -0.6 and 0.5 are the largest, whatever the entries themselves are
        factor_name(FIRST, "A"): torch.tensor([[0.1, 0.7]]),
        factor_name(FIRST, "B"): torch.tensor([[-0.6], [0.2]]),
        factor_name(SECOND, "A"): torch.tensor([[0.5, 0.4, 0.3]]),
        factor_name(SECOND, "B"): torch.zeros(3, 1),
        HEAD: torch.tensor([0.001, 0.0]),
    }
    trained = Trained({name: start[name] + move for name, move in moves.items()})
    client.train = lambda begin, how: trained  # type: ignore[method-assign]
    sent = rule.local(client.work(rule, 1, start, {})).tensors
    difference = {name: tensor - start[name] for name, tensor in sent.items()}
    kept = {
        (name, index)
        for name, move in difference.items()
        for index in np.flatnonzero(move.numpy()).tolist()
    }
    assert kept == {
        (factor_name(FIRST, "A"), 1),
        (factor_name(FIRST, "B"), 0),
        (factor_name(SECOND, "A"), 0),
        (HEAD, 0),  # extras are whole
    }
    assert all(torch.equal(sent[n].flatten()[i], trained.tensors[n].flatten()[i]) for n, i in kept)


@pytest.mark.parametrize("optimizer", ["none", "adam"])
def test_the_server_steps_its_own_dense_adapter_by_the_mean_difference(optimizer: str) -> None:
    """Two rounds against dense numpy: D from what clients held, added to what the server holds."""
    settings = {"server-lr": 0.01, "server-momentum": 0.9, "server-beta2": 0.99, "server-tau": 1e-3}
    options = {"density-down": 0.5, "density-up": 0.2, "server-optimizer": optimizer}
    rule = build_rule("flasc", options | settings)
    adapter, clients = world()
    host = Server(rule, adapter)
    m: dict[str, np.ndarray] = {}
    v: dict[str, np.ndarray] = {}
    for _ in range(2):
        before = {name: t.double().numpy() for name, t in host.adapter.tensors().items()}
        host.step(clients)
        # half of the entries were zero where clients started, none on the server beyond B = 0
        held = torch.cat([t.flatten() for n, t in host.held["0"].items() if n != HEAD])
        assert int((held != 0).sum()) <= held.numel() // 2
        after = host.adapter.tensors()
        for name in before:
            D = sum(
                (k + 1)
                / 6
                * (host.updates[str(k)].tensors[name] - host.held[str(k)][name]).double()
                for k in range(3)
            ).numpy()
            if optimizer == "none":
                expected = before[name] + D
            else:  # FedAdam of Reddi et al., from m = 0 and v = tau^2
                m[name] = 0.9 * m.get(name, np.zeros_like(D)) + 0.1 * D
                v[name] = 0.99 * v.get(name, np.full_like(D, 1e-6)) + 0.01 * D**2
                expected = before[name] + 0.01 * m[name] / (np.sqrt(v[name]) + 1e-3)
            np.testing.assert_allclose(after[name].numpy(), expected, atol=1e-6)
    entries = sum(t.numel() for n, t in adapter.tensors().items() if n != HEAD)
    for k, update in host.updates.items():
        moved = [int((t != host.held[k][n]).sum()) for n, t in update.tensors.items() if n != HEAD]
        assert sum(moved) == entries // 5


def test_clients_train_everything() -> None:
    rule = build_rule("flasc")
    adapter, clients = world()
    Server(rule, adapter).step(clients)
    ((_, how),) = clients["0"].calls
    assert how.factors == {"A", "B"} and how.extras and not how.masks


def test_densities_are_checked() -> None:
    for key in ("density-up", "density-down"):
        with pytest.raises(ConfigError, match=key):
            build_rule("flasc", {key: 0.0})
