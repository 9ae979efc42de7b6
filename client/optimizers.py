"""Optimizers, and their state as named tensors that outlive a round."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedgraft.adapter import Tensors
from fedgraft.config import TrainConfig

_SEPARATOR = "::"


def make_optimizer(
    parameters: Mapping[str, nn.Parameter], settings: TrainConfig
) -> torch.optim.Optimizer:
    """Return a fresh AdamW or SGD over the parameters, in their order."""
    values = list(parameters.values())
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            values,
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            fused=True,
        )
    return torch.optim.AdamW(values, lr=settings.lr, weight_decay=settings.weight_decay, fused=True)


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> Tensors:
    """Return the optimizer's state as tensors named "parameter::entry"."""
    return {
        f"{name}{_SEPARATOR}{entry}": value.detach().cpu().clone()
        for name, parameter in parameters.items()
        for entry, value in optimizer.state[parameter].items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Tensors
) -> None:
    """Put back what `optimizer_tensors` returned; parameters without state start afresh."""
    state: dict[int, dict[str, Tensor]] = {}
    for index, name in enumerate(parameters):
        prefix = f"{name}{_SEPARATOR}"
        entries = {  # cloned, since the optimizer works in them
            k.removeprefix(prefix): t.clone() for k, t in tensors.items() if k.startswith(prefix)
        }
        if entries:
            state[index] = entries
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
