"""The gradient of one batch: in micro-batches as small as memory asks for, also in float16."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from fedgraft.devices import is_out_of_memory, release_memory
from fedgraft.errors import NO_MEMORY, RunError
from fedgraft.resident_model import ResidentModel
from fedgraft.tasks.task import Batch, Examples, Task

log = logging.getLogger(__name__)

LOSS_SCALE = 4096.0
"""What the loss is multiplied by in float16 at first."""


class BatchGradient:
    """Adds gradients of batches to parameters.

    Args:
        model: the resident model; it remembers how much its memory has been found to hold.
        task: gives the loss.
        examples: where batches are picked from.
        parameters: what gets the gradient; nothing else does.
        micro_batch: examples a forward pass at most; the whole batch for None.
    """

    def __init__(
        self,
        model: ResidentModel,
        task: Task,
        examples: Examples,
        parameters: Iterable[nn.Parameter],
        micro_batch: int | None = None,
    ) -> None:
        self._model, self._task, self._examples = model, task, examples
        self._parameters = list(parameters)
        self._micro_batch = micro_batch
        self._scale = LOSS_SCALE if model.half_precision else 1.0

    def add(self, indices: np.ndarray) -> Tensor:
        """Add the gradient of the mean loss of these examples; return that loss.

        What the parameters held before has to be nothing: a second try starts from there.

        Raises:
            RunError: memory does not suffice for a single example.
        """
        while True:
            limits = (len(indices), self._micro_batch, self._model.micro_batch)
            size = min(limit for limit in limits if limit is not None)
            try:
                loss = self._backward(indices, size)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            else:
                if self._unscaled():
                    return loss
                continue
            # Here and not above, where the error still holds what had been allocated.
            self._forget()
            release_memory(self._model.device)
            if size == 1:
                raise RunError(
                    f"{NO_MEMORY} on {self._model.device} to train on one example",
                    "Lower task.max-length, set model.gradient-checkpointing, or quantise the base "
                    "(model.quantization).",
                )
            self._model.micro_batch = -(-size // 2)
            log.warning("out of memory: going on with micro-batches of %d", -(-size // 2))

    def _backward(self, indices: np.ndarray, size: int) -> Tensor:
        return backward(self._model, self._task, self._examples, indices, size, self._scale)

    def _unscaled(self) -> bool:
        """Undo the scale of the gradients; where it was too large, halve it and return False.

        Float16 holds no gradient below 6e-8, so the loss is scaled up first (Micikevicius et al.
        2018, arXiv:1710.03740, section 3.2), as far as it overflows nowhere.
        """
        if self._scale == 1.0:
            return True
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        if all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
            for gradient in gradients:
                gradient.div_(self._scale)
            return True
        self._scale /= 2.0
        self._forget()
        return False

    def _forget(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None


def backward(
    model: ResidentModel,
    task: Task,
    examples: Examples,
    indices: np.ndarray,
    size: int,
    scale: float = 1.0,
) -> Tensor:
    """Add `scale` times one batch's gradient; return its mean loss.

    It goes through micro-batches of `size` examples, of equal weight per term.
    """
    parts: list[Batch] = [
        model.to_device(examples.batch(indices[at : at + size]))
        for at in range(0, len(indices), size)
    ]
    count = max(1, sum(task.count(part) for part in parts))
    mean = torch.zeros((), device=model.device)
    for part in parts:
        loss = task.loss(model.model, part) / count
        (loss * scale if scale != 1.0 else loss).backward()  # type: ignore[no-untyped-call]
        mean += loss.detach()
    return mean
