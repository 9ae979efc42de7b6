"""The frozen base of a resident model: loaded onto its device, and who it is."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fedgraft import quantization
from fedgraft.config import Config
from fedgraft.errors import ModelError
from fedgraft.tasks.task import Task


def load_base(task: Task, config: Config, device: torch.device) -> nn.Module:
    """Load the task's base onto the device.

    Raises:
        ModelError: it cannot be loaded, or `model.quantization` has quantised nothing of it.
    """
    base = task.load_base()
    if config.model.quantization == "none":
        # Before PEFT attaches: moving afterwards leaves optimizers on stale tensors.
        return base.to(device)
    if not quantization.quantised_modules(base):
        raise ModelError(
            f"model.quantization is {config.model.quantization!r}, and the base of task "
            f"{config.task.name} has no linear layer that can be quantised",
            'Set model.quantization to "none".',
        )
    return base


def hash_base(model: nn.Module, quantised_as: str = "none") -> str:
    """Return the base's identity: SHA-256 of its source tensors and quantisation settings.

    Of a quantised base the packed bytes, which differ by machine, are left out; what they were made
    of counts instead, and every tensor that is not quantised as it is.
    """
    total = hashlib.sha256(f"quantization={quantised_as}".encode())
    if (source := quantization.source_of(model)) is not None:
        total.update(f"\x1fsource={source}".encode())
    packed = tuple(f"{name}." for name in quantization.quantised_modules(model))
    for name, tensor in sorted(model.state_dict().items()):
        if not name.startswith(packed) or name.endswith(".bias"):
            quantization.hash_tensor(total, name, tensor)
    return total.hexdigest()


def train_in_float32(model: nn.Module, extras: Iterable[str]) -> None:
    """Keep modules that are trained whole in float32 on a base of a narrower type.

    The steps of an optimizer are lost in bfloat16; PEFT sees to the factors itself.
    """
    for name, module in model.named_modules():
        if name.endswith(tuple(f"{extra}.modules_to_save.default" for extra in extras)):
            module.float()
            module.register_forward_pre_hook(_widen)


def _widen(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Forward pre-hook: give a float32 module float32 inputs."""
    return tuple(
        value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
        for value in inputs
    )
