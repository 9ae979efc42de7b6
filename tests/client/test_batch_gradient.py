"""Gradients of a batch: as memory allows, and through float16."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from client import batch_gradient
from client.trainer import Assignment, LocalResult
from client.trainer import train as train_adapter
from fedgraft.adapter import Adapter, Tensors
from fedgraft.config import Config, TrainConfig
from fedgraft.errors import RunError
from fedgraft.resident_model import ResidentModel, load_task
from fedgraft.tasks.task import Batch, Task

SETTINGS = TrainConfig(steps=4, batch_size=16, lr=0.01, grad_clip=0.0)


def work(round: int = 1, **settings: object) -> Assignment:
    return Assignment(
        settings=SETTINGS.model_copy(update=settings), seed=0, round=round, rounds=3, client="0"
    )


def differs(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The largest difference of any entry."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def train(model: ResidentModel, task: Task, start: Tensors, work: Assignment) -> LocalResult:
    adapter = Adapter.from_tensors(start, model.scaling)
    return train_adapter(model, task, task.train(0), adapter, work)


@pytest.fixture
def start(model: ResidentModel) -> Tensors:
    return model.initial_adapter(0).tensors()


def short_of_memory(task: Task, monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Let the task run out of memory on more examples than `most`; return the sizes it is given."""
    sizes: list[int] = []
    loss = task.loss

    def limited(model: nn.Module, batch: Batch) -> Tensor:
        sizes.append(len(batch["labels"]))
        if sizes[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return loss(model, batch)

    monkeypatch.setattr(task, "loss", limited)
    return sizes


def test_out_of_memory_halves_the_micro_batch_and_not_the_batch(
    model: ResidentModel, digits: Task, start: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "micro_batch", None)
    whole = train(model, digits, start, work())
    sizes = short_of_memory(digits, monkeypatch, most=5)
    split = train(model, digits, start, work())
    assert sizes[:6] == [16, 8, 4, 4, 4, 4]
    assert set(sizes[6:]) == {4}  # it is remembered
    assert differs(split.tensors, whole.tensors) < 1e-4
    sizes.clear()
    train(model, digits, start, work(round=2))
    assert set(sizes) == {4}


def test_too_little_memory_for_one_example_is_said(
    model: ResidentModel, digits: Task, start: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "micro_batch", None)
    short_of_memory(digits, monkeypatch, most=0)
    with pytest.raises(RunError, match="not enough memory on cpu to train on one example"):
        train(model, digits, start, work())


def test_other_errors_are_not_taken_for_a_lack_of_memory(
    model: ResidentModel, digits: Task, start: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(model: nn.Module, batch: Batch) -> Tensor:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(digits, "loss", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        train(model, digits, start, work())


@pytest.mark.parametrize("scale", [4096.0, 2.0**127])  # the latter overflows, and is halved
def test_a_scaled_loss_trains_the_same(
    model: ResidentModel,
    digits: Task,
    start: Tensors,
    monkeypatch: pytest.MonkeyPatch,
    scale: float,
) -> None:
    plain = train(model, digits, start, work())
    monkeypatch.setattr(model, "half_precision", True)
    monkeypatch.setattr(batch_gradient, "LOSS_SCALE", scale)
    scaled = train(model, digits, start, work())
    assert scaled.loss == plain.loss
    assert differs(scaled.tensors, plain.tensors) < 1e-6


def test_float16_keeps_gradients_that_it_cannot_hold(
    tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.with_overrides({"model.dtype": "float16"})
    task = load_task(config)
    half = ResidentModel(task, config)
    assert half.half_precision
    start = half.initial_adapter(0).tensors()
    loss = task.loss
    monkeypatch.setattr(task, "loss", lambda model, batch: 1e-6 * loss(model, batch))
    moved = {}
    for scale in (1.0, 4096.0):
        monkeypatch.setattr(batch_gradient, "LOSS_SCALE", scale)
        one = work(steps=1, optimizer="sgd", lr=1.0)
        trained = train(half, task, start, one).tensors
        changed = [float((trained[n] != start[n]).float().mean()) for n in trained if "lora_B" in n]
        moved[scale] = sum(changed) / len(changed)
    assert moved[1.0] < 0.5
    assert moved[4096.0] == 1.0
