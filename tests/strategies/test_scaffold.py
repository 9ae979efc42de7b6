"""SCAFFOLD: against its algorithm in dense numpy, and what it is for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from miniature import HEAD, Miniature, Server, world

from fedgraft.adapter import Tensors, factor_name
from fedgraft.config import Config
from fedgraft.errors import ConfigError
from strategies.local import beside
from strategies.registry import build_rule

Arrays = dict[str, np.ndarray]


def gradients(client: Miniature, w: Arrays) -> Arrays:
    """The loss's gradient by hand, in numpy."""
    found = {HEAD: w[HEAD] - client.head.double().numpy()}
    for layer, (x, y) in client.data.items():
        A, B = w[factor_name(layer, "A")], w[factor_name(layer, "B")]
        s = client.scaling
        X, Y = x.double().numpy(), y.double().numpy()
        G = (X @ (s * B @ A).T - Y).T @ X / len(X)
        found[factor_name(layer, "A")] = s * B.T @ G
        found[factor_name(layer, "B")] = s * G @ A.T
    return found


def control(name: str) -> str:
    layer, _, rest = name.partition(".lora_")
    return beside(layer, f"control.{rest[0]}") if rest else beside(name, "control")


@pytest.mark.parametrize("under", ["fedavg", "ffa-lora", "rolora"])
def test_rounds_equal_the_papers_algorithm(under: str) -> None:
    """Algorithm 1, option II, with shares p_k, in rounds of 2, 3, 2 and 1 of 3 clients."""
    adapter, clients = world(layers=2)
    host = Server(build_rule("scaffold", {"under": under}), adapter)
    x: Arrays = {name: t.double().numpy() for name, t in adapter.tensors().items()}
    c = {name: np.zeros_like(array) for name, array in x.items()}
    own = {k: dict(c) for k in clients}
    for chosen in (["0", "2"], ["0", "1", "2"], ["0", "1"], ["1"]):
        plan = host.rule.plan(host.round + 1)
        trained = list(adapter.tensors(plan.train))
        share = {k: clients[k].weight / sum(clients[j].weight for j in chosen) for k in chosen}
        ends: dict[str, Arrays] = {}
        changes: dict[str, Arrays] = {}
        for k in chosen:
            y = dict(x)
            for _ in range(clients[k].steps):
                g = gradients(clients[k], y)
                y |= {n: y[n] - clients[k].lr * (g[n] - own[k][n] + c[n]) for n in trained}
            total = clients[k].steps * clients[k].lr
            new = {n: own[k][n] - c[n] + (x[n] - y[n]) / total for n in trained}
            changes[k] = {n: new[n] - own[k][n] for n in trained}
            own[k], ends[k] = own[k] | new, y
        x |= {n: sum(share[k] * ends[k][n] for k in chosen) for n in trained}
        c |= {
            n: c[n] + len(chosen) / 3 * sum(share[k] * changes[k][n] for k in chosen)
            for n in trained
        }
        host.step({k: clients[k] for k in chosen}, participation=len(chosen) / 3)
        for name, tensor in host.adapter.tensors().items():
            np.testing.assert_allclose(tensor.numpy(), x[name], atol=1e-6)
        sent = host.rule.companions(host.state, host.round)
        assert set(sent) == {control(name) for name in trained}
        for name in trained:
            # float32 on its way; (x - y) / sum eta divides its rounding by 0.15
            np.testing.assert_allclose(sent[control(name)].numpy(), c[name], atol=1e-5)
            for k in chosen:
                kept = clients[k].kept[control(name)]
                np.testing.assert_allclose(kept.numpy(), own[k][name], atol=1e-5)


def test_round_1_is_that_of_the_rule_below() -> None:
    made = []
    for rule in (build_rule("scaffold"), build_rule("fedavg")):
        adapter, clients = world()
        host = Server(rule, adapter)
        host.step(clients)
        made.append(host.adapter.digest())
        assert clients["0"].calls[0][1].penalty is None
    assert made[0] == made[1]


def gap(under: str, options: dict[str, Any]) -> float:
    """How far from stationary the federation ends: the norm of the mean loss's gradient."""
    adapter, clients = world(layers=1, drift=2.0)
    for client in clients.values():
        client.steps, client.lr = 10, 0.02
    host = Server(build_rule(under, options), adapter)
    for _ in range(60):
        host.step(clients)
    w = {name: t.double().numpy() for name, t in host.adapter.tensors().items()}
    names = [name for name in w if "lora_A" not in name]
    mean = {n: sum((k + 1) / 6 * gradients(clients[str(k)], w)[n] for k in range(3)) for n in names}
    return float(np.sqrt(sum((g**2).sum() for g in mean.values())))


def test_it_ends_where_the_common_loss_does_and_drift_does_not() -> None:
    """A is fixed, so the loss is convex; many local steps on different data."""
    assert gap("scaffold", {"under": "ffa-lora"}) < 1e-3
    assert gap("ffa-lora", {}) > 0.1


def test_a_rate_of_zero_teaches_nothing() -> None:
    """The last step of a schedule: c_k stays, and what is sent is no NaN."""
    adapter, clients = world()
    host = Server(build_rule("scaffold"), adapter)
    host.step(clients)
    before = {key: tensor.clone() for key, tensor in clients["0"].kept.items()}
    c: Tensors = host.rule.companions(host.state, 2)
    for client in clients.values():
        client.lr = 0.0
    host.step(clients)
    assert all(not t.any() for t in host.updates["0"].companions.values())
    assert all(torch.equal(clients["0"].kept[key], tensor) for key, tensor in before.items())
    after = host.rule.companions(host.state, 3)
    assert all(torch.equal(after[key], tensor) for key, tensor in c.items())


def test_options_and_the_server_optimiser_of_the_rule_below() -> None:
    rule = build_rule("scaffold", {"under": "lora-fair", "lambda": 0.5, "server-optimizer": "avgm"})
    assert rule.under.options.lambda_ == 0.5  # type: ignore[attr-defined]
    assert rule.server_optimizer is not None and rule.server_optimizer.kind == "avgm"
    adapter, clients = world()
    host = Server(rule, adapter)
    for _ in range(2):
        host.step(clients)
    kinds = {key.split("::")[1] for key in rule.companions(host.state, 3)}
    assert kinds == {"control.A", "control.B", "control"}  # and no buffer of the optimiser


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"under": "fedavgg"}, "no such rule"),
        ({"under": "lora-fair", "objective": "cosine"}, "every client's own factors"),
        ({"under": "fedsa-lora"}, "changes local training"),
        ({"under": "scaffold"}, "changes local training"),
        ({"under": "lora-fair", "lamda": 1.0}, r"strategy\.lambda"),
        ({"undr": "rolora"}, "Did you mean strategy.under?"),
        ({"xyz": 1.0}, "There are: strategy.under, strategy.server-optimizer"),
    ],
)
def test_what_it_cannot_go_on_top_of(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_rule("scaffold", options)
    assert message.replace("\\", "") in f"{caught.value.message} {caught.value.remedy}"


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ([], "train.optimizer is 'adamw'"),
        (["train.optimizer=sgd", "train.momentum=0.9"], "train.momentum is 0.9"),
        (["train.optimizer=sgd"], "train.grad-clip is 1"),
        (
            ["train.optimizer=sgd", "train.grad-clip=0", "train.proximal-mu=0.1"],
            "train.proximal-mu is 0.1",
        ),
    ],
)
def test_only_plain_sgd_will_do(settings: list[str], found: str) -> None:
    rule = build_rule("scaffold")
    with pytest.raises(ConfigError, match=found) as caught:
        rule.check(Config.load(settings=settings))
    assert "train.grad-clip=0" in caught.value.remedy and "fedavg" in caught.value.remedy
    rule.check(Config.load(settings=["train.optimizer=sgd", "train.grad-clip=0"]))
