"""Optimizers, and their state as tensors: taken out and put back, nothing is lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from client.optimizers import make_optimizer, optimizer_tensors, restore_optimizer
from fedgraft.config import TrainConfig

SETTINGS = {
    "adamw": TrainConfig(weight_decay=0.01),
    "sgd": TrainConfig(optimizer="sgd"),
    "momentum": TrainConfig(optimizer="sgd", momentum=0.9),
}


def parameters() -> dict[str, nn.Parameter]:
    return {"m.q": nn.Parameter(torch.ones(3, 2)), "m.q.bias": nn.Parameter(torch.zeros(2))}


def steps(optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter], count: int) -> None:
    for number in range(count):
        for k, parameter in enumerate(named.values()):
            parameter.grad = torch.full_like(parameter, 0.1 * (number + 1) - 0.25 * k)
        optimizer.step()


@pytest.mark.parametrize("name", SETTINGS)
def test_an_optimizer_put_back_goes_on_as_if_never_stopped(name: str):
    one, other = parameters(), parameters()
    uninterrupted = make_optimizer(one, SETTINGS[name])
    first = make_optimizer(other, SETTINGS[name])
    steps(uninterrupted, one, 3)
    steps(first, other, 3)
    kept = optimizer_tensors(first, other)
    second = make_optimizer(other, SETTINGS[name])
    restore_optimizer(second, other, kept)
    steps(uninterrupted, one, 3)
    steps(second, other, 3)
    assert all(torch.equal(one[n], other[n]) for n in one)
    assert set(optimizer_tensors(second, other)) == set(kept)


def test_state_is_named_by_parameter_and_entry():
    named = parameters()
    optimizer = make_optimizer(named, SETTINGS["adamw"])
    assert optimizer_tensors(optimizer, named) == {}
    steps(optimizer, named, 1)
    entries = ("step", "exp_avg", "exp_avg_sq")
    assert set(optimizer_tensors(optimizer, named)) == {f"{n}::{e}" for n in named for e in entries}


def test_the_order_of_parameters_does_not_matter():
    named = parameters()
    optimizer = make_optimizer(named, SETTINGS["adamw"])
    steps(optimizer, named, 2)
    kept = optimizer_tensors(optimizer, named)
    backwards = dict(reversed(named.items()))
    other = make_optimizer(backwards, SETTINGS["adamw"])
    restore_optimizer(other, backwards, kept)
    assert all(torch.equal(t, kept[n]) for n, t in optimizer_tensors(other, backwards).items())


def test_what_is_taken_out_and_put_back_is_a_copy():
    named = parameters()
    optimizer = make_optimizer(named, SETTINGS["momentum"])
    steps(optimizer, named, 1)
    kept = optimizer_tensors(optimizer, named)
    before = {name: tensor.clone() for name, tensor in kept.items()}
    steps(optimizer, named, 1)
    other = make_optimizer(named, SETTINGS["momentum"])
    restore_optimizer(other, named, kept)
    steps(other, named, 1)
    assert all(torch.equal(kept[n], before[n]) for n in kept)


def test_parameters_without_state_start_afresh():
    named = parameters()
    optimizer = make_optimizer(named, SETTINGS["adamw"])
    steps(optimizer, named, 2)
    kept = {k: t for k, t in optimizer_tensors(optimizer, named).items() if "bias" not in k}
    other = make_optimizer(named, SETTINGS["adamw"])
    restore_optimizer(other, named, kept)
    steps(other, named, 1)
    state: dict[str, Any] = {name: other.state[parameter] for name, parameter in named.items()}
    assert (float(state["m.q"]["step"]), float(state["m.q.bias"]["step"])) == (3.0, 1.0)


def test_the_configs_numbers_reach_the_optimizer():
    adamw = make_optimizer(parameters(), TrainConfig(lr=0.3, weight_decay=0.2)).param_groups[0]
    assert (adamw["lr"], adamw["weight_decay"]) == (0.3, 0.2)
    settings = TrainConfig(optimizer="sgd", lr=0.3, momentum=0.5, weight_decay=0.2)
    sgd = make_optimizer(parameters(), settings).param_groups[0]
    assert (sgd["lr"], sgd["momentum"], sgd["weight_decay"]) == (0.3, 0.5, 0.2)
