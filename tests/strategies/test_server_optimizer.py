"""Server optimisers: by hand, against numpy over several rounds, and what they leave alone."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from federations import LAYER, Federation, federation

from fedgraft.adapter import Tensors
from fedgraft.errors import ConfigError
from server.checkpoint import Checkpoint, Checkpoints
from strategies.aggregation import Aggregated, aggregate
from strategies.options import SETTINGS_OF
from strategies.registry import build_rule
from strategies.rounds import StrategyState
from strategies.rule import Rule
from strategies.server_optimizer import Kind, ServerOptimizer

A, B, EXTRA = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight", "classifier.weight"
NAMED: list[tuple[str, Kind]] = [
    ("fedavgm", "avgm"),
    ("fedadam", "adam"),
    ("fedyogi", "yogi"),
    ("fedadagrad", "adagrad"),
]
named = pytest.mark.parametrize(("name", "kind"), NAMED)


@dataclass
class Numpy:
    """Algorithm 2 of Reddi et al., and FedAvgM, one number or array at a time."""

    kind: str
    lr: float
    beta1: float
    beta2: float
    tau: float
    m: dict[str, np.ndarray] = field(default_factory=dict)
    v: dict[str, np.ndarray] = field(default_factory=dict)

    def step(self, name: str, x: np.ndarray, mean: np.ndarray) -> np.ndarray:
        delta = mean - x
        m = self.m.get(name, np.zeros_like(x))
        if self.kind == "avgm":
            self.m[name] = self.beta1 * m + delta
            return x + self.lr * self.m[name]
        v = self.v.get(name, np.full_like(x, self.tau**2))
        self.m[name] = self.beta1 * m + (1 - self.beta1) * delta
        if self.kind == "adagrad":
            self.v[name] = v + delta**2
        elif self.kind == "adam":
            self.v[name] = self.beta2 * v + (1 - self.beta2) * delta**2
        else:
            self.v[name] = v - (1 - self.beta2) * delta**2 * np.sign(v - delta**2)
        return x + self.lr * self.m[name] / (np.sqrt(self.v[name]) + self.tau)


@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [
        # D = 2, then 1: m = 2, then 0.5 * 2 + 1
        ("avgm", 10 + 0.1 * 2, 20 + 0.1 * 2),
        # m = 1, then 0.5 + 0.5; v = 1 + 4, then 5 + 1
        ("adagrad", 10 + 0.1 * 1 / (5**0.5 + 1), 20 + 0.1 * 1 / (6**0.5 + 1)),
        # v = 0.75 + 1, then 0.75 * 1.75 + 0.25
        ("adam", 10 + 0.1 / (1.75**0.5 + 1), 20 + 0.1 / (1.5625**0.5 + 1)),
        # v = 1 - 0.25 * 4 * sign(1 - 4) = 2, then 2 - 0.25 * 1 * sign(2 - 1) = 1.75
        ("yogi", 10 + 0.1 / (2**0.5 + 1), 20 + 0.1 / (1.75**0.5 + 1)),
    ],
)
def test_two_steps_by_hand(kind: Kind, first: float, second: float) -> None:
    """lr 0.1, beta1 1/2, beta2 3/4, tau 1, so that v starts from 1."""
    optimizer = ServerOptimizer(kind, 0.1, 0.5, 0.75, 1.0)
    value, state = optimizer.step(torch.tensor([12.0]), torch.tensor([10.0]), {})
    assert value.item() == pytest.approx(first, rel=1e-12) and value.dtype == torch.float64
    value, _ = optimizer.step(torch.tensor([21.0]), torch.tensor([20.0]), state)
    assert value.item() == pytest.approx(second, rel=1e-12)


def rounds(
    rule: Rule, fed: Federation, count: int, state: Tensors | None = None, begin: int = 1
) -> tuple[Federation, Aggregated]:
    """Aggregate `count` rounds; clients move by the same each round, the weights in between."""
    made: Aggregated | None = None
    state = state or {}
    for round in range(begin, begin + count):
        moved = {
            client: (
                weight + round,
                {n: fed.current.tensors()[n] + 0.01 * round * t for n, t in tensors.items()},
            )
            for client, (weight, tensors) in fed.updates.items()
        }
        with replace(fed, updates=moved).spooled() as spool:
            made = aggregate(rule, spool, fed.current, state, round)
        fed, state = replace(fed, current=made.adapter), made.state
    assert made is not None
    return fed, made


def mean_of(fed: Federation, current: Tensors, round: int, name: str) -> np.ndarray:
    total = sum(weight + round for weight, _ in fed.updates.values())
    return sum(
        (weight + round) / total * (current[name] + 0.01 * round * tensors[name]).double().numpy()
        for weight, tensors in fed.updates.values()
    )


@named
def test_rounds_follow_the_paper(name: str, kind: Kind) -> None:
    """Four rounds through the host, factors and extras, against numpy."""
    fed = federation(np.random.default_rng(0), d_out=5, d_in=4, r=2, weights=[1.0, 4.0, 2.0])
    options = {"server-lr": 0.05, "server-momentum": 0.8, "server-beta2": 0.9, "server-tau": 0.01}
    options = {key: v for key, v in options.items() if key in SETTINGS_OF.get(kind, options)}
    rule = build_rule(name, options)
    oracle = Numpy(kind, 0.05, 0.8, 0.9, 0.01)
    state: Tensors = {}
    for round in range(1, 5):
        before = fed.current.tensors()
        fed, made = rounds(rule, fed, 1, state, round)
        state = made.state
        for tensor in (A, B, EXTRA):
            mean = mean_of(fed, before, round, tensor)
            expected = oracle.step(tensor, before[tensor].double().numpy(), mean)
            # the host hands out float32, and Adam divides by entries of v that may be small
            np.testing.assert_allclose(
                made.adapter.tensors()[tensor], expected, rtol=2e-6, atol=1e-6
            )


@named
def test_named_rules_are_fedavg_with_the_optimizer(name: str, kind: Kind) -> None:
    fed = federation(np.random.default_rng(1), d_out=5, d_in=4, r=2, weights=[1.0, 4.0])
    _, ours = rounds(build_rule(name), fed, 3)
    _, other = rounds(build_rule("fedavg", {"server-optimizer": kind}), fed, 3)
    assert ours.adapter.digest() == other.adapter.digest()
    with pytest.raises(ConfigError, match=r"strategy\.server-optimizer is 'none'"):
        build_rule(name, {"server-optimizer": "none"})


def test_plain_averaging_is_momentum_0_and_lr_1() -> None:
    fed = federation(np.random.default_rng(2), d_out=5, d_in=4, r=2, weights=[1.0, 4.0])
    _, plain = rounds(build_rule("fedavg"), fed, 3)
    _, stepped = rounds(build_rule("fedavgm", {"server-lr": 1.0, "server-momentum": 0.0}), fed, 3)
    for name, tensor in plain.adapter.tensors().items():
        torch.testing.assert_close(stepped.adapter.tensors()[name], tensor)


@named
def test_ranks_that_nobody_has_are_not_stepped(name: str, kind: Kind) -> None:
    """All clients first, then only one of rank 1: momentum would go on moving the second rank."""
    fed = federation(np.random.default_rng(5), d_out=5, d_in=4, r=2, weights=[1.0, 4.0])
    rule, state = build_rule(name), {}
    fed, made = rounds(rule, fed, 1, state, 1)
    before, buffers = made.adapter.tensors(), made.state
    client, (weight, tensors) = next(iter(fed.updates.items()))
    cut = {n: t.clone() for n, t in tensors.items()}
    cut[A][1:], cut[B][:, 1:] = 0.0, 0.0
    few = Federation(made.adapter, {client: (weight, cut)}, {client: 1})
    _, made = rounds(rule, few, 1, buffers, 2)
    after = made.adapter.tensors()
    assert torch.equal(after[A][1:], before[A][1:])
    assert torch.equal(after[B][:, 1:], before[B][:, 1:])
    assert not torch.equal(after[A][:1], before[A][:1])
    for key, buffer in made.state.items():
        if ".A." in key:
            assert torch.equal(buffer[1:], buffers[key][1:])
            assert not torch.equal(buffer[:1], buffers[key][:1])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fedavgm", {"server-tau": 0.1}, "server-tau is set, and fedavgm does not use it"),
        ("fedadagrad", {"server-beta2": 0.9}, "server-beta2 is set, and fedadagrad does not"),
    ],
)
def test_settings_that_nothing_uses_are_refused(
    name: str, options: dict[str, float], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build_rule(name, options)


@named
def test_a_frozen_factor_is_not_stepped(name: str, kind: Kind) -> None:
    """Under FFA-LoRA A stays what every client holds, whatever its updates say."""
    fed = federation(np.random.default_rng(3), d_out=5, d_in=4, r=2, weights=[1.0, 4.0])
    rule = build_rule("ffa-lora", {"server-optimizer": kind})
    before = fed.current.tensors()
    fed, made = rounds(rule, fed, 3)
    assert torch.equal(made.adapter.tensors()[A], before[A])
    assert not torch.equal(made.adapter.tensors()[B], before[B])
    assert made.state and not any(".A." in key for key in made.state)


def test_a_factor_that_rests_keeps_its_buffers() -> None:
    """RoLoRA moves B in one round and A in the next: each finds its own buffers again."""
    fed = federation(np.random.default_rng(4), d_out=5, d_in=4, r=2, weights=[1.0, 4.0])
    rule = build_rule("rolora", {"server-optimizer": "adam"})
    moved, first = rounds(rule, fed, 1)
    _, second = rounds(rule, moved, 1, first.state, 2)
    key = next(key for key in first.state if key.endswith("server-optimizer.B.m"))
    assert torch.equal(second.state[key], first.state[key])
    assert torch.equal(second.adapter.tensors()[B], first.adapter.tensors()[B])


@named
def test_rounds_go_on_from_a_checkpoint_bit_for_bit(name: str, kind: Kind, tmp_path: Path) -> None:
    fed = federation(np.random.default_rng(5), d_out=5, d_in=4, r=2, weights=[1.0, 4.0])
    rule = build_rule(name)
    half, made = rounds(rule, fed, 2)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(Checkpoint(StrategyState(2, made.adapter, made.state), None))
    loaded = checkpoints.latest()
    assert loaded is not None
    state = loaded.state
    _, resumed = rounds(rule, replace(half, current=state.adapter), 2, dict(state.rule), 3)
    _, whole = rounds(rule, fed, 4)
    assert resumed.adapter.digest() == whole.adapter.digest()
    assert all(torch.equal(resumed.state[key], tensor) for key, tensor in whole.state.items())


def test_defaults_by_kind() -> None:
    rates = {name: build_rule(name).server_optimizer.lr for name, _ in NAMED}  # type: ignore[union-attr]
    assert rates == {"fedavgm": 1.0, "fedadam": 0.01, "fedyogi": 0.01, "fedadagrad": 0.03}
