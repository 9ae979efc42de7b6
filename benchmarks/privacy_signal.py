"""How much of a private round is signal: one round of a run, taken again with and without noise."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from client.private_training import Privately
from client.trainer import Assignment, train
from fedgraft import load_run
from fedgraft.adapter import factor_name
from fedgraft.config import Config
from fedgraft.logs import hushed
from fedgraft.privacy.ledger import Ledger
from fedgraft.privacy.randomness import SeededRandomness
from fedgraft.resident_model import resident_model, resident_task
from fedgraft.seeds import stream
from strategies.local import Training
from strategies.registry import build_rule
from strategies.signal import signal_to_noise


@dataclass
class Parts:
    """Ratios of a run's layers: signal over noise of each factor's mean, and of the product.

    Attributes:
        A, B, product: one ratio a layer; empty for a factor that does not train.
        share: the product of both noises over all of the product's noise, one a layer.
    """

    A: list[float] = field(default_factory=list)
    B: list[float] = field(default_factory=list)
    product: list[float] = field(default_factory=list)
    share: list[float] = field(default_factory=list)


def signal(path: Path) -> Parts:
    """Take the first round again from the adapter that a run chose, with its noise and without."""
    run = load_run(path)
    config, start = run.config, run.adapter()
    with hushed():
        task = resident_task(config)
        model = resident_model(task, config)
    plan = build_rule(config.strategy.name, config.strategy.options).plan(1)
    means: dict[bool, dict[str, Tensor]] = {True: {}, False: {}}  # with noise, and without
    clients = config.federation.clients
    training = Training(plan.train, plan.extras)
    for client in map(str, range(clients)):
        entry = Ledger(path / "ledgers" / f"{client}.jsonl").entries[0]
        for noisy, mean in means.items():
            how = Privately(
                entry.release.noise_multiplier,
                config.privacy.clip,
                config.train.batch_size,
                drawn(config, client),
                drawn(config, client) if noisy else Silence(),
            )
            rounds = config.federation.rounds
            work = Assignment(config.train, config.seed, 1, rounds, client, training, how)
            made = train(model, task, task.train(int(client)), start, work).tensors
            for name, tensor in made.items():
                mean[name] = mean.get(name, 0.0) + tensor.double() / clients  # type: ignore[operator]
    parts = Parts()
    for layer, current in start.layers.items():
        names = {factor: factor_name(layer, factor) for factor in plan.train}
        noised = {factor: means[True][name] for factor, name in names.items()}
        clean = {factor: means[False][name] for factor, name in names.items()}
        noise = {f: noised[f] - clean[f] for f in noised}
        for factor in noised:
            moved = clean[factor] - getattr(current, factor).double()
            getattr(parts, factor).append(float(moved.norm() / noise[factor].norm()))
        found = signal_to_noise(current, noised, noise)
        parts.product.append(found.ratio if found.ratio is not None else math.inf)
        parts.share.append(found.noise_product / found.noise)
    return parts


def drawn(config: Config, client: str) -> SeededRandomness:
    return SeededRandomness(stream(config.seed, "signal", client=client))


class Silence:
    """No noise, in place of a source of it."""

    def normal(self, shape: tuple[int, ...], scale: float) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64)

    def poisson_sample(self, count: int, rate: float) -> Any:
        raise AssertionError("the batches of a measured round are given")
