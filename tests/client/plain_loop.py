"""Local LoRA training as anybody would write it: the oracle for FedGraft's trainer.

Nothing of `client/` is used. The model is PEFT's on a fresh base, the loop is torch.optim's, and
the order of the examples comes from the definition of the stream: one permutation after the other,
cut into batches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import (
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import Tensor
from torch.nn import functional

from fedgraft.config import Config
from fedgraft.seeds import stream
from fedgraft.tasks.task import Examples, Task

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]


@dataclass
class PlainLoop:
    """One client's training on the digits, over as many rounds as it is called for.

    Attributes:
        optimizer: makes the optimizer from a list of parameters.
        keep: one optimizer for all rounds instead of one each.
        factors: which factors train.
        clip: largest norm of the gradient; None for none.
        mu: FedProx's; its penalty is part of the loss here, and autograd takes the gradient.
        cosine: decay over `rounds` times `steps`.
    """

    task: Task
    config: Config
    optimizer: Any
    rounds: int
    steps: int
    batch: int
    lr: float
    keep: bool = False
    factors: str = "AB"
    clip: float | None = None
    mu: float = 0.0
    cosine: bool = True

    def __post_init__(self) -> None:
        lora = LoraConfig(
            r=self.config.adapter.rank,
            lora_alpha=self.config.adapter.alpha,
            lora_dropout=self.config.adapter.dropout,
            target_modules=TARGETS,
            modules_to_save=["classifier"],
        )
        self.model = get_peft_model(self.task.load_base(), lora)
        frozen = [f"lora_{factor}" for factor in "AB" if factor not in self.factors]
        for name, parameter in self.model.named_parameters():
            if any(part in name for part in frozen):
                parameter.requires_grad_(False)
        # In the order of the state dict's names: a norm over tensors depends on their order.
        self.parameters = dict(
            sorted((n, p) for n, p in self.model.named_parameters() if p.requires_grad)
        )
        self._optimizer: torch.optim.Optimizer | None = None

    def train(
        self, examples: Examples, client: str, round: int, start: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Train one round and return the whole adapter after it, by PEFT's names."""
        set_peft_model_state_dict(self.model, {n: t.clone() for n, t in start.items()})
        anchors = [p.detach().clone() for p in self.parameters.values()]
        optimizer = self._optimizer if self.keep and self._optimizer else None
        if optimizer is None:
            self._optimizer = optimizer = self.optimizer(list(self.parameters.values()))
        rng = stream(self.config.seed, "batches", round=round, client=client)
        passes = math.ceil(self.steps * self.batch / len(examples)) + 1
        order = np.concatenate([rng.permutation(len(examples)) for _ in range(passes)])
        self.model.train()
        for step in range(self.steps):
            done = ((round - 1) * self.steps + step) / (self.rounds * self.steps)
            rate = self.lr * (0.5 * (1 + math.cos(math.pi * done)) if self.cosine else 1.0)
            for group in optimizer.param_groups:
                group["lr"] = rate
            batch = examples.batch(order[step * self.batch : (step + 1) * self.batch])
            logits = self.model(pixel_values=batch["pixel_values"]).logits
            loss = functional.cross_entropy(logits, batch["labels"])
            for parameter, anchor in zip(self.parameters.values(), anchors, strict=True):
                if self.mu:
                    loss = loss + self.mu / 2 * (parameter - anchor).square().sum()
            optimizer.zero_grad()
            loss.backward()
            if self.clip is not None:
                gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
                norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
                if norm > self.clip:
                    for gradient in gradients:
                        gradient.mul_(self.clip / norm)
            optimizer.step()
        trained = get_peft_model_state_dict(self.model)
        return {name: tensor.detach().clone() for name, tensor in trained.items()}
