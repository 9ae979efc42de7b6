"""The trainer against a plain PyTorch loop, and what it must never let happen."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from plain_loop import PlainLoop
from torch import Tensor, nn
from torch.nn import functional

from client.trainer import Assignment, Trained, batch_indices, train
from fedgraft.adapter import Tensors, parse_factor
from fedgraft.config import Config, TrainConfig
from fedgraft.errors import ModelError, RunError
from fedgraft.resident_model import ResidentModel
from fedgraft.seeds import stream, torch_seed
from fedgraft.tasks.digits import Digits
from fedgraft.tasks.task import Batch, Task

ROUNDS, STEPS, BATCH, LR = 3, 4, 16, 0.01
SETTINGS = TrainConfig(steps=STEPS, batch_size=BATCH, lr=LR, grad_clip=0.0)
ADAMW = partial(torch.optim.AdamW, lr=LR, weight_decay=0.0, fused=True)
SGD = partial(torch.optim.SGD, lr=LR, fused=True)


def work(round: int = 1, client: str = "0", factors: str = "AB", **settings: Any) -> Assignment:
    return Assignment(
        settings=SETTINGS.model_copy(update=settings),
        seed=0,
        round=round,
        rounds=ROUNDS,
        client=client,
        factors=frozenset(factors),
    )


def differs(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The largest difference of any entry."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.fixture
def start(model: ResidentModel) -> Tensors:
    return model.initial_adapter(0).tensors()


def federated(
    model: ResidentModel, task: Task, start: Tensors, client: int = 0, **settings: Any
) -> Tensors:
    """Train three rounds, each from what the last one left, as a federation of one would."""
    tensors, state = dict(start), None
    for round in range(1, ROUNDS + 1):
        factors = settings.get("factors", "AB")
        rest = {name: value for name, value in settings.items() if name != "factors"}
        assignment = work(round, str(client), factors, **rest)
        trained = train(model, task, task.train(client), tensors, assignment, state)
        state = trained.optimizer or None
        tensors |= trained.tensors
    return tensors


def plain(task: Task, start: Tensors, optimizer: Any, client: int = 0, **options: Any) -> Tensors:
    loop = PlainLoop(task, task.config, optimizer, ROUNDS, STEPS, BATCH, LR, **options)
    tensors = dict(start)
    for round in range(1, ROUNDS + 1):
        tensors = loop.train(task.train(client), str(client), round, tensors)
    return tensors


# Against the plain loop. Every sum is the same in both, so they agree to the bit, but for two:
# - the loop's loss is a mean, and the trainer's a sum over a count;
CASES: dict[str, tuple[dict[str, Any], Any, dict[str, Any]]] = {
    "adamw": ({}, ADAMW, {}),
    "adamw with weight decay": (
        {"weight_decay": 0.1},
        partial(torch.optim.AdamW, lr=LR, weight_decay=0.1, fused=True),
        {},
    ),
    "constant": ({"schedule": "constant"}, ADAMW, {"cosine": False}),
    "optimizer kept": ({"optimizer_state": "keep"}, ADAMW, {"keep": True}),
    "sgd": ({"optimizer": "sgd"}, SGD, {}),
    "sgd with momentum": (
        {"optimizer": "sgd", "momentum": 0.9},
        partial(SGD, momentum=0.9),
        {},
    ),
    "sgd with momentum kept": (
        {"optimizer": "sgd", "momentum": 0.9, "optimizer_state": "keep"},
        partial(SGD, momentum=0.9),
        {"keep": True},
    ),
    "b only": ({"factors": "B"}, ADAMW, {"factors": "B"}),
    "a only": ({"factors": "A"}, ADAMW, {"factors": "A"}),
    "clipped": ({"grad_clip": 0.5}, ADAMW, {"clip": 0.5}),
    "proximal": ({"proximal_mu": 0.3}, ADAMW, {"mu": 0.3}),
}


@pytest.mark.parametrize(("settings", "optimizer", "options"), CASES.values(), ids=CASES)
def test_three_rounds_equal_a_plain_loop(
    settings: dict[str, Any],
    optimizer: Any,
    options: dict[str, Any],
    model: ResidentModel,
    digits: Task,
    start: Tensors,
):
    if options.get("factors") == "A":  # from B = 0 nothing would move
        start = {n: t if "lora_B" not in n else torch.full_like(t, 0.02) for n, t in start.items()}
    ours = federated(model, digits, start, **settings)
    theirs = plain(digits, start, optimizer, **options)
    print("DIFF", settings, differs(ours, theirs))
    assert differs(ours, start) > 0.01  # something was trained
