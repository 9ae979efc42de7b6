"""What a rule may ask of local training, against a plain step of SGD by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from client import trainer
from client.trainer import Assignment, LocalResult
from fedgraft.adapter import Adapter, Tensors, parse_factor
from fedgraft.config import Config, TrainConfig
from fedgraft.resident_model import ResidentModel
from fedgraft.seeds import stream
from fedgraft.tasks.task import Task
from strategies.local import Training

LR, BATCH = 0.05, 16
SETTINGS = TrainConfig(
    steps=1, batch_size=BATCH, lr=LR, optimizer="sgd", grad_clip=0.0, schedule="constant"
)


@pytest.fixture
def start(model: ResidentModel) -> Tensors:
    tensors = model.initial_adapter(0).tensors()
    return {n: t + 0.02 if parse_factor(n) else t for n, t in tensors.items()}


def train(model: ResidentModel, task: Task, start: Tensors, how: Training) -> LocalResult:
    work = Assignment(SETTINGS, seed=0, round=1, rounds=1, client="0", how=how)
    return trainer.train(
        model, task, task.train(0), Adapter.from_tensors(start, model.scaling), work
    )


def gradients(model: ResidentModel, task: Task, start: Tensors) -> Tensors:
    """The gradient of the first batch's mean loss, by autograd on the whole model."""
    examples = task.train(0)
    indices = stream(0, "batches", round=1, client="0").permutation(len(examples))[:BATCH]
    model.take(Adapter.from_tensors(start, model.scaling))
    model.train_mode()
    loss = task.loss(model.model, examples.batch(indices)) / BATCH
    found = torch.autograd.grad(loss, list(model.parameters.values()))
    return dict(zip(model.parameters, found, strict=True))


def test_only_the_factors_asked_for_train(
    model: ResidentModel, digits: Task, start: Tensors
) -> None:
    how = Training(factors=frozenset("A"), extras=False)
    trained = train(model, digits, start, how).tensors
    assert set(trained) == {name for name in start if "lora_A" in name}


def test_rates_multiply_the_learning_rate(
    model: ResidentModel, digits: Task, start: Tensors
) -> None:
    by_hand = gradients(model, digits, start)
    result = train(model, digits, start, Training(rates={"B": 5.0}))
    assert result.rate == pytest.approx(LR)
    for name, tensor in result.tensors.items():
        rate = 5.0 * LR if "lora_B" in name else LR
        torch.testing.assert_close(tensor, start[name] - rate * by_hand[name])


def test_masks_hold_entries_still(model: ResidentModel, digits: Task, start: Tensors) -> None:
    by_hand = gradients(model, digits, start)
    masks = {name: torch.arange(t.numel()).reshape(t.shape) % 3 == 0 for name, t in start.items()}
    trained = train(model, digits, start, Training(masks=masks)).tensors
    for name, tensor in trained.items():
        expected = torch.where(masks[name], start[name] - LR * by_hand[name], start[name])
        torch.testing.assert_close(tensor, expected)
        assert torch.equal(tensor[~masks[name]], start[name][~masks[name]])


def test_a_penalty_adds_its_gradient(model: ResidentModel, digits: Task, start: Tensors) -> None:
    by_hand = gradients(model, digits, start)
    pull = {name: torch.full_like(t, 0.3) for name, t in start.items()}

    def penalty(parameters: Mapping[str, Tensor]) -> Tensor:
        return sum((pull[n] * p).sum() + p.square().sum() for n, p in parameters.items())  # type: ignore[return-value]

    trained = train(model, digits, start, Training(penalty=penalty)).tensors
    for name, tensor in trained.items():
        slope = by_hand[name] + pull[name] + 2 * start[name]
        torch.testing.assert_close(tensor, start[name] - LR * slope)


def test_behind_a_basis_only_the_core_moves(
    model: ResidentModel, digits: Task, start: Tensors
) -> None:
    generator = torch.Generator().manual_seed(0)
    bases = {n: torch.randn(len(t), 8, generator=generator) for n, t in start.items() if "_B" in n}
    cores = {
        n: torch.randn(8, t.shape[1], generator=generator) * 0.01
        for n, t in start.items()
        if "_B" in n
    }
    begin = start | {name: bases[name] @ core for name, core in cores.items()}
    by_hand = gradients(model, digits, begin)
    result = train(model, digits, begin, Training(frozenset("B"), False, bases=bases))
    for name, core in cores.items():
        expected = core - LR * bases[name].T @ by_hand[name]
        torch.testing.assert_close(result.cores[name], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            result.tensors[name], bases[name] @ expected, rtol=1e-4, atol=1e-4
        )


def test_epochs_replace_the_configs_steps(
    tiny: Config, model: ResidentModel, digits: Task, start: Tensors
) -> None:
    result = train(model, digits, start, Training(epochs=1.0))
    assert result.steps == round(len(digits.train(0)) / BATCH)


def test_a_smaller_rank_sees_itself_in_masks_and_penalties(
    tiny: Config, model: ResidentModel, digits: Task
) -> None:
    """The model is padded from rank 3 to 8; the rule is not told."""
    small = model.initial_adapter(0).tensors()
    start = {
        n: (t[:3] if "lora_A" in n else t[:, :3]) if parse_factor(n) else t
        for n, t in small.items()
    }
    seen: list[Any] = []

    def penalty(parameters: Mapping[str, Tensor]) -> Tensor:
        seen.extend(p.shape for n, p in parameters.items() if "lora_A" in n)
        return sum(p.sum() for p in parameters.values())  # type: ignore[return-value]

    masks = {n: torch.ones_like(t) for n, t in start.items()}
    trained = train(model, digits, start, Training(masks=masks, penalty=penalty)).tensors
    assert {shape[0] for shape in seen} == {3}
    assert all(trained[name].shape == tensor.shape for name, tensor in start.items())


def test_lora_plus_lets_b_step_further_than_a(model: ResidentModel, digits: Task, tiny: Config):
    """Plain SGD with the same gradients: B moves lr-ratio times as far, and A as ever."""
    initial = model.initial_adapter(0)
    start = initial.with_tensors({n: t + 0.05 for n, t in initial.tensors().items()})
    moved = {}
    for ratio in (1.0, 16.0):
        settings = {"train.lr-ratio": ratio, "train.steps": 1, "train.optimizer": "sgd"}
        settings |= {"train.lr": 1e-3, "train.grad-clip": 0.0, "train.schedule": "constant"}
        config = tiny.with_overrides(settings)
        work = Assignment(config.train, seed=0, round=1, rounds=1, client="0")
        after = trainer.train(model, digits, digits.train(0), start, work).tensors
        moved[ratio] = {name: after[name] - t for name, t in start.tensors().items()}
    for name, step in moved[1.0].items():
        times = 16.0 if name.endswith("lora_B.weight") else 1.0
        torch.testing.assert_close(moved[16.0][name], times * step, rtol=1e-2, atol=1e-6)
        assert step.any()


def test_a_rule_with_a_ratio_of_its_own_is_not_multiplied(tiny: Config):
    settings = tiny.with_overrides({"train.lr-ratio": 16.0}).train
    assert settings.rates == {"B": 16.0} and tiny.train.rates == {}
    plain = Assignment(settings, seed=0, round=1, rounds=1, client="0")
    own = replace(plain, how=Training(rates={"B": 5.0}))
    assert plain.rates == {"B": 16.0} and own.rates == {"B": 5.0}
