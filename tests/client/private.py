"""Small models of every family for the tests of private training, and gradients one by one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_models import save_bert, save_llama, save_model
from torch import Tensor

from client.private_training import Privately
from client.trainer import Assignment, LocalResult, train
from fedgraft.adapter import Adapter, Tensors
from fedgraft.config import Config
from fedgraft.privacy.randomness import SeededRandomness
from fedgraft.resident_model import ResidentModel, load_task
from fedgraft.seeds import stream
from fedgraft.tasks.task import Examples, Task
from strategies.local import Training

FAMILIES = ("digits", "vit", "bert", "llama")
ROWS = 24


@dataclass(frozen=True)
class Family:
    """A task with its model; all factors and extras are drawn, so no gradient is zero."""

    task: Task
    model: ResidentModel
    start: Adapter

    @property
    def examples(self) -> Examples:
        return self.task.train(0)

    @property
    def names(self) -> list[str]:
        return list(self.model.parameters)


def family(kind: str, folder: Path, **settings: Any) -> Family:
    """Make one of `FAMILIES` in a folder."""
    config = Config().with_overrides(
        {"model.device": "cpu", "threads": 1, "federation.clients": 1, **_of(kind, folder)}
        | {key.replace("__", ".").replace("_", "-"): value for key, value in settings.items()}
    )
    task = load_task(config)
    model = ResidentModel(task, config)
    rng = np.random.default_rng(0)
    tensors = {
        name: tensor + 0.1 * torch.from_numpy(rng.standard_normal(tensor.shape)).float()
        for name, tensor in model.initial_adapter(0).tensors().items()
    }
    return Family(task, model, Adapter.from_tensors(tensors, model.scaling))


def _of(kind: str, folder: Path) -> dict[str, Any]:
    if kind == "digits":
        return {"federation.partition": "iid"}
    if kind == "vit":
        return {"task.name": "digits", "model.base": str(_vit(folder / "base"))}
    if kind == "bert":  # whose own dropout would draw anew for every pass
        quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        base = save_bert(folder / "base", **quiet)
    else:
        base = save_llama(folder / "base")
    words = ["a", "bad", "good", "film", "very", "dull", "fine", "the", "was", "it"]
    rows = []
    for row in range(ROWS):
        text = " ".join(words[(row * 3 + k) % len(words)] for k in range(1 + row % 7))
        if kind == "bert":
            rows.append({"text": text, "label": ("good", "bad", "fine")[row % 3]})
        else:
            rows.append({"question": text, "answer": " ".join(words[: 1 + row % 5])})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    name = "text-classification" if kind == "bert" else "causal-lm"
    return {
        "task.name": name,
        "task.data": str(folder / "rows.jsonl"),
        "model.base": str(base),
        "adapter.rank": 4,
    }


def _vit(folder: Path) -> Path:
    """Save a ViT with a head of ten classes, for images of one channel."""
    from transformers import AutoModelForImageClassification, ViTConfig

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    images = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 10}
    base = ViTConfig(**sizes, **images, intermediate_size=24)
    return save_model(folder, AutoModelForImageClassification, base)


def one_by_one(made: Family, indices: np.ndarray, names: list[str]) -> list[Tensors]:
    """Return the gradient of every example's mean loss, by a backward pass of its own."""
    made.model.take(made.start)
    made.model.train_mode()
    found = []
    for index in indices:
        batch = made.examples.batch(np.array([index]))
        loss = made.task.loss(made.model.model, batch) / made.task.count(batch)
        parameters = [made.model.parameters[name] for name in names]
        gradients = torch.autograd.grad(loss, parameters)
        found.append(dict(zip(names, gradients, strict=True)))
    return found


def norm(gradients: Tensors) -> float:
    """The L2 norm over all tensors together."""
    return float(sum(g.double().square().sum() for g in gradients.values()) ** 0.5)


def differs(one: Tensors, other: Tensors) -> float:
    """The largest difference of any entry, over the largest entry where that is above 1."""
    assert one.keys() == other.keys()
    scale = max(1.0, *(float(tensor.abs().max()) for tensor in other.values()))
    return max(float((one[name] - other[name]).abs().max()) for name in one) / scale


class Silent:
    """No noise; the batches are those given, one after the other."""

    def __init__(self, *batches: list[int]) -> None:
        self.batches = [np.array(batch, dtype=np.int64) for batch in batches]

    def normal(self, shape: tuple[int, ...], scale: float) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64)

    def poisson_sample(self, count: int, rate: float) -> np.ndarray:
        return self.batches.pop(0)


def privately(clip: float, *batches: list[int], batch_size: int = 4, noise: float = 0.0) -> Any:
    """Private training on given batches, with noise only where there is to be some."""
    silent = Silent(*batches)
    drawn = SeededRandomness(stream(1, "noise")) if noise else silent
    return Privately(noise or 1.0, clip, batch_size, silent, drawn)


def trained(
    made: Family,
    how: Privately,
    *,
    start: Adapter | None = None,
    plan: Training | None = None,
    **settings: Any,
) -> LocalResult:
    """Train one round of SGD with a rate of 1, so that a step is the gradient."""
    defaults = {"optimizer": "sgd", "lr": 1.0, "schedule": "constant", "steps": 1}
    chosen = made.task.config.train.model_copy(update=defaults | settings)
    work = Assignment(chosen, 0, 1, 1, "0", plan or Training(), how)
    return train(made.model, made.task, made.examples, start or made.start, work)
