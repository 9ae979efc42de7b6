"""FedSA-LoRA: what travels, what stays, and who holds what."""

from __future__ import annotations

import pytest
import torch
from miniature import HEAD, Server, world

from fedgraft.adapter import factor_name
from strategies.registry import build_rule


def server(**options: bool) -> tuple[Server, dict]:
    adapter, clients = world()
    return Server(build_rule("fedsa-lora", options), adapter), clients


@pytest.mark.parametrize("personal", [True, False])
def test_only_A_travels_and_extras_by_option(personal: bool) -> None:
    host, clients = server(**{"personal-extras": personal})
    layers = list(host.adapter.layers)
    As = {factor_name(layer, "A") for layer in layers}
    Bs = {factor_name(layer, "B") for layer in layers}
    host.step(clients)
    update = host.updates["0"]
    assert set(update.tensors) == As | (set() if personal else {HEAD})
    assert set(update.kept) == Bs | ({HEAD} if personal else set())
    assert update.companions == {}
    # both factors and the head trained, whatever the plan says comes up
    start = host.held["0"]
    moved = update.tensors | update.kept
    assert all(not torch.equal(moved[name], start[name]) for name in Bs | {HEAD})


def test_clients_go_on_from_the_global_A_and_their_own_B() -> None:
    host, clients = server()
    host.step(clients)
    own = {name: dict(client.kept) for name, client in clients.items()}
    weights = {"0": 1 / 6, "1": 2 / 6, "2": 3 / 6}
    for layer, made in host.adapter.layers.items():
        A = sum(w * host.updates[k].tensors[factor_name(layer, "A")] for k, w in weights.items())
        torch.testing.assert_close(made.A, A)
        assert not made.B.any()  # the server never sees one
    assert not host.adapter.extras[HEAD].any()
    host.step(clients)
    for name in clients:
        held = host.held[name]
        for key, tensor in own[name].items():
            assert torch.equal(held[key], tensor)
    A = factor_name(next(iter(host.adapter.layers)), "A")
    assert torch.equal(host.held["0"][A], host.held["2"][A])
    B = factor_name(next(iter(host.adapter.layers)), "B")
    assert not torch.equal(host.held["0"][B], host.held["2"][B])


def test_late_clients_get_the_first_B_once() -> None:
    host, clients = server()
    late = clients.pop("2")
    host.step(clients)
    rule, state = host.rule, host.state
    assert rule.plan(1).send == {"A", "B"} and rule.plan(2).send == {"A"}
    assert rule.constants(state, 1) == {}  # in round 1 it is in the adapter
    constants = rule.constants(state, 2)
    assert len(constants) == 2 and rule.companions(state, 2) == {}
    host.step(clients | {"2": late})
    for layer in host.adapter.layers:
        assert not host.held["2"][factor_name(layer, "B")].any()
    assert set(rule.constants(host.state, 3)) == set(constants)  # and still the same
    assert all(not tensor.any() for tensor in rule.constants(host.state, 3).values())


def test_shared_extras_are_averaged() -> None:
    host, clients = server(**{"personal-extras": False})
    host.step(clients)
    mean = sum((k + 1) / 6 * host.updates[str(k)].tensors[HEAD] for k in range(3))
    torch.testing.assert_close(host.adapter.extras[HEAD], mean)


def test_the_server_optimiser_steps_A_and_its_buffers_do_not_travel() -> None:
    adapter, clients = world()
    rule = build_rule("fedsa-lora", {"server-optimizer": "avgm", "server-lr": 2.0})
    host = Server(rule, adapter)
    layer = next(iter(adapter.layers))
    A0 = adapter.layers[layer].A
    host.step(clients)
    name = factor_name(layer, "A")
    mean = sum((k + 1) / 6 * host.updates[str(k)].tensors[name] for k in range(3))
    torch.testing.assert_close(host.adapter.layers[layer].A, A0 + 2.0 * (mean - A0))
    assert any("server-optimizer" in name for name in host.state)
    assert {key.split("::")[1] for key in rule.constants(host.state, 2)} == {"B"}
