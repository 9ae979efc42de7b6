"""Optimizers, and their state as named tensors that outlive a round."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedgraft.adapter import Tensors, parse_factor
from fedgraft.config import TrainConfig
from fedgraft.devices import check_optimizer

_SEPARATOR = "::"


def make_optimizer(
    parameters: Mapping[str, nn.Parameter],
    settings: TrainConfig,
    rates: Mapping[str, float] | None = None,
) -> torch.optim.Optimizer:
    """Return a fresh optimizer over the parameters, in their order.

    AdamW and SGD are torch's; AdamW with an 8-bit state (Dettmers et al. 2022, arXiv:2110.02861),
    or one that may move to the machine's memory, is bitsandbytes' and runs on CUDA.

    Args:
        parameters: by tensor name; those of one rate beside each other.
        settings: which optimizer, and its settings.
        rates: by factor, what the learning rate is multiplied by; the groups carry it as
            "multiplier".

    Raises:
        ConfigError: an optimizer that runs on CUDA only, and parameters elsewhere.
    """
    groups = [
        {"params": [parameter for _, parameter in members], "multiplier": multiplier}
        for multiplier, members in itertools.groupby(
            parameters.items(), key=lambda item: rate_of(item[0], rates or {})
        )
    ]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            groups,
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            fused=True,
        )
    if settings.optimizer != "adamw":
        check_optimizer(settings.optimizer, next(iter(parameters.values())).device)
        import bitsandbytes

        kind = {
            "adamw-8bit": "AdamW8bit",
            "paged-adamw": "PagedAdamW32bit",
            "paged-adamw-8bit": "PagedAdamW8bit",
        }[settings.optimizer]
        made: torch.optim.Optimizer = getattr(bitsandbytes.optim, kind)(
            groups, lr=settings.lr, weight_decay=settings.weight_decay
        )
        return made
    return torch.optim.AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay, fused=True)


def rate_of(name: str, rates: Mapping[str, float]) -> float:
    """Return what the learning rate of a tensor is multiplied by; 1 for an extra."""
    parsed = parse_factor(name)
    return rates.get(parsed[1], 1.0) if parsed is not None else 1.0


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
