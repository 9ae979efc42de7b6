"""A federation in miniature: linear layers, squares, full-batch SGD; no model, no Flower.

It lets both halves of a rule run round after round against oracles that need no model either. A
client's loss is sum over layers of mean ||x W^T - y||^2 / 2 with W = s B A, plus
||h - t||^2 / 2 for its one extra h. Everything is float64 until it is handed back.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedgraft.adapter import Adapter, LoraLayer, Tensors, factor_name, parse_factor
from strategies.aggregation import aggregate
from strategies.client_privacy import ClientPrivacy
from strategies.local import LocalUpdate, LocalWork, Trained, Training
from strategies.private_round import aggregate_privately
from strategies.rule import Rule
from strategies.spool import UpdateSpool

HEAD = "classifier.weight"


@dataclass
class Miniature:
    """One client: its data by layer, and the head that it would like to have.

    Attributes:
        data: by layer, x (n, d_in) and y (n, d_out).
        head: t.
        weight: w_k.
        steps, lr: of a round; `Training.epochs` stands for so many steps.
        calls: what `train` was asked for.
    """

    data: dict[str, tuple[Tensor, Tensor]]
    head: Tensor
    scaling: float
    weight: float = 1.0
    steps: int = 3
    lr: float = 0.05
    calls: list[tuple[Tensors, Training]] = field(default_factory=list)
    kept: Tensors = field(default_factory=dict)

    def loss(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the loss at an adapter."""
        total = (tensors[HEAD] - self.head.double()).square().sum() / 2
        for layer, (x, y) in self.data.items():
            A, B = tensors[factor_name(layer, "A")], tensors[factor_name(layer, "B")]
            W = self.scaling * B @ A
            total = total + (x.double() @ W.T - y.double()).square().sum() / (2 * len(x))
        return total

    def gradient(self, start: Tensors, layer: str) -> Tensor:
        """Return G (d_out, d_in), the loss's gradient by a layer's W."""
        x, y = (t.double() for t in self.data[layer])
        A, B = start[factor_name(layer, "A")].double(), start[factor_name(layer, "B")].double()
        return (x @ (self.scaling * B @ A).T - y).T @ x / len(x)

    def train(self, start: Tensors, how: Training) -> Trained:
        """Take SGD steps as `how` asks."""
        self.calls.append((start, how))
        now = {name: tensor.double() for name, tensor in start.items()}
        names = [
            name
            for name in start
            if (how.extras if (p := parse_factor(name)) is None else p[1] in how.factors)
        ]
        bases = {name: basis.double() for name, basis in how.bases.items()}
        cores = {name: torch.linalg.pinv(basis) @ now[name] for name, basis in bases.items()}
        steps = self.steps if how.epochs is None else int(how.epochs)
        for _ in range(steps):
            for name in names:
                now[name] = now[name].detach().requires_grad_(True)
            loss = self.loss(now)
            if how.penalty is not None:
                loss = loss + how.penalty({name: now[name] for name in names})
            gradients = torch.autograd.grad(loss, [now[name] for name in names])
            for name, gradient in zip(names, gradients, strict=True):
                parsed = parse_factor(name)
                rate = self.lr * (1.0 if parsed is None else how.rates.get(parsed[1], 1.0))
                step = rate * gradient * how.masks.get(name, torch.ones(()))
                if name in bases:
                    cores[name] = cores[name] - bases[name].T @ step
                    now[name] = bases[name] @ cores[name]
                else:
                    now[name] = now[name].detach() - step
        trained = {name: now[name].detach().float() for name in names}
        return Trained(trained, steps * self.lr, {name: C.float() for name, C in cores.items()})

    def work(self, rule: Rule, round: int, start: Tensors, companions: Tensors) -> LocalWork:
        """Return what the rule's client half sees."""
        plan = rule.plan(round)

        def sketch(
            probes: Mapping[str, tuple[Tensor, Tensor]],
        ) -> dict[str, tuple[Tensor, Tensor]]:
            found = {}
            for layer, (omega, psi) in probes.items():
                G = self.gradient(start, layer)
                found[layer] = ((G @ omega.double()).float(), (psi.double() @ G).float())
            return found

        return LocalWork(
            round=round,
            seed=0,
            client="0",
            start=start,
            scalings=dict.fromkeys(self.data, self.scaling),
            scaling_at=lambda rank: self.scaling,
            companions=companions,
            kept=self.kept,
            plan_factors=plan.train,
            plan_extras=plan.extras,
            train=self.train,
            sketch=sketch,
        )


@dataclass
class Server:
    """The other side, and what it saw of each round."""

    rule: Rule
    adapter: Adapter
    privacy: ClientPrivacy | None = None
    state: Tensors = field(default_factory=dict)
    round: int = 0
    held: dict[str, Tensors] = field(default_factory=dict)
    updates: dict[str, LocalUpdate] = field(default_factory=dict)

    def hold(self, client: Miniature, round: int, *, training: bool = True) -> Tensors:
        """Return the adapter that a client holds in a round."""
        plan = self.rule.plan(round)
        sent = self.rule.outgoing(self.adapter, round) if training else self.adapter
        received = sent.tensors(plan.send | ({"A"} if plan.derive_A else set()))
        return self.rule.assemble(received, self.beside(round), client.kept)

    def beside(self, round: int) -> Tensors:
        """Return what the rule sends beside the adapter."""
        return self.rule.companions(self.state, round) | self.rule.constants(self.state, round)

    def step(self, clients: dict[str, Miniature], participation: float = 1.0) -> None:
        """Run one round with these clients, checking what every host relies on."""
        rule, round = self.rule, self.round + 1
        plan = rule.plan(round)
        whole = self.adapter.tensors()
        self.held, self.updates = {}, {}
        with tempfile.TemporaryDirectory() as folder:
            spool = UpdateSpool(Path(folder))
            for name, client in clients.items():
                start = self.hold(client, round)
                assert list(start) and set(start) == set(whole)
                update = rule.local(client.work(rule, round, start, self.beside(round)))
                expected = self.adapter.tensors(plan.train, extras=plan.extras)
                assert set(update.tensors) == set(expected)
                shapes = {key: tuple(t.shape) for key, t in update.companions.items()}
                assert shapes == rule.companion_shapes(self.adapter, round)
                sent = update.tensors
                if plan.sparse:
                    sent = {n: whole[n].float() + (t - start[n]) for n, t in sent.items()}
                spool.add(name, client.weight, sent | update.companions)
                client.kept = update.kept
                self.held[name], self.updates[name] = start, update
            if self.privacy is not None:
                how = self.privacy
                made = aggregate_privately(rule, spool, self.adapter, self.state, round, how).made
            else:
                made = aggregate(
                    rule, spool, self.adapter, self.state, round, participation=participation
                )
        self.adapter, self.state, self.round = made.adapter, made.state, round


def world(
    clients: int = 3,
    *,
    layers: int = 2,
    d_out: int = 5,
    d_in: int = 6,
    r: int = 2,
    scaling: float = 2.0,
    seed: int = 0,
    drift: float = 1.0,
) -> tuple[Adapter, dict[str, Miniature]]:
    """Return an adapter with B = 0 and clients of different data, sizes and heads."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(rng.standard_normal(shape)).float()

    names = [f"model.layers.{index}.q_proj" for index in range(layers)]
    adapter = Adapter(
        {name: LoraLayer(normal(r, d_in) / 2, torch.zeros(d_out, r), scaling) for name in names},
        {HEAD: torch.zeros(2)},
    )
    common = {name: normal(d_out, d_in) for name in names}
    found = {}
    for index in range(clients):
        data = {}
        for name in names:
            x = normal(8, d_in)
            data[name] = (x, x @ (common[name] + drift * normal(d_out, d_in)).T)
        found[str(index)] = Miniature(data, normal(2), scaling, weight=float(index + 1))
    return adapter, found
