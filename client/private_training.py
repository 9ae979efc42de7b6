"""DP-SGD: steps on Poisson batches of clipped per-example gradients with Gaussian noise.

Abadi, Chu, Goodfellow, McMahan, Mironov, Talwar, Zhang 2016, "Deep Learning with Differential
Privacy", arXiv:1607.00133, algorithm 1. An example's loss is the mean over its own terms (its
tokens that count, or its one class), so that a long text weighs as much as a short one; the clip
is over all trained tensors together. A step's gradient is

    (sum over the batch of clipped gradients + N(0, (noise multiplier * clip)^2)) / batch size

with the config's batch size, whatever the batch drawn holds: every example is in it by itself with
probability batch size / n, and a batch of none is a step on noise alone. What the loop does with
the gradient afterwards (masks, penalties, an optimizer's state) sees the data through it alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from client.batch_gradient import BatchGradient
from client.per_example import PerExampleGradients, wide
from fedgraft.adapter import parse_factor
from fedgraft.errors import RunError
from fedgraft.privacy.randomness import Randomness, add_noise
from fedgraft.quantization import mixes_examples
from fedgraft.resident_model import ResidentModel
from fedgraft.tasks.task import Batch, Examples, Task


@dataclass(frozen=True)
class Privately:
    """How local training is made differentially private.

    Attributes:
        noise_multiplier: the noise's standard deviation over `clip`.
        clip: the largest L2 norm that an example's gradient keeps.
        batch_size: expected examples of a batch, and what sums are divided by.
        batches: draws the batches.
        noise: draws the noise.
    """

    noise_multiplier: float
    clip: float
    batch_size: int
    batches: Randomness
    noise: Randomness

    def drawn(self, examples: int) -> Iterator[NDArray[np.int64]]:
        """Yield Poisson batches for ever, empty ones among them."""
        rate = sampling_rate(self.batch_size, examples)
        while True:
            yield self.batches.poisson_sample(examples, rate)


def sampling_rate(batch_size: int, examples: int) -> float:
    """Return the probability with which each of so many examples is in a batch."""
    return min(1.0, batch_size / examples)


class PrivateGradient(BatchGradient):
    """Gives parameters the noised mean of a batch's clipped gradients; see the module.

    Args:
        model: the resident model.
        task: gives the loss.
        examples: where batches are picked from.
        parameters: what trains, by name.
        how: clip and noise.
        masks: by name, 1 where an entry may move.
        micro_batch: examples a forward pass at most; `how.batch_size` for None.

    Raises:
        PrivacyError: a parameter lies in a layer whose per-example gradients are not known.
    """

    def __init__(
        self,
        model: ResidentModel,
        task: Task,
        examples: Examples,
        parameters: Mapping[str, nn.Parameter],
        how: Privately,
        masks: Mapping[str, Tensor],
        micro_batch: int | None = None,
    ) -> None:
        # Some layers treat an example differently for what else is in its batch: one at a time.
        largest = 1 if mixes_examples(model.model) else (micro_batch or how.batch_size)
        super().__init__(model, task, examples, parameters.values(), largest)
        self._named, self._how = parameters, how
        self._per_example = PerExampleGradients(model.model, parameters, masks)
        self._wide = wide(model.device)
        self._sums: dict[str, Tensor] = {}
        self._connected = False

    def watching(self) -> AbstractContextManager[None]:
        """Have hooks on the model inside the block, where alone `add` works."""
        return self._per_example.watching()

    def add(self, indices: NDArray[np.int64]) -> Tensor:
        """Give the parameters their gradient; return 0 in place of the loss, which is kept back.

        Raises:
            RunError: memory does not suffice for a single example, or no factor has a gradient.
            PrivacyError: a layer does not keep the examples apart.
        """
        self._forget()
        if len(indices):
            super().add(indices)
        self._give()
        return torch.zeros((), device=self._model.device)

    def _backward(self, indices: NDArray[np.int64], size: int) -> Tensor:
        for at in range(0, len(indices), size):
            batch = self._model.to_device(self._examples.batch(indices[at : at + size]))
            counts = self._counts(batch, len(indices[at : at + size]))
            self._task.loss(self._model.model, batch).backward()  # type: ignore[no-untyped-call]
            self._check_connected()
            for name, part in self._per_example.clipped_sum(1.0 / counts, self._how.clip).items():
                self._sums[name] = self._sums.get(name, 0.0) + part.to(self._wide)
            for parameter in self._parameters:
                parameter.grad = None  # autograd's own sum, of gradients as they are
        return torch.zeros((), device=self._model.device)

    def _counts(self, batch: Batch, examples: int) -> Tensor:
        """Return how many terms each example's loss has, 1 for one without any."""
        counts = [
            self._task.count({name: tensor[i : i + 1] for name, tensor in batch.items()})
            for i in range(examples)
        ]
        return torch.tensor(counts, device=self._model.device).clamp(min=1)

    def _check_connected(self) -> None:
        """Fail when no gradient reaches any factor, which the noise would hide."""
        if not self._connected and not any(map(parse_factor, self._per_example.seen())):
            if not any(map(parse_factor, self._named)):
                return
            raise RunError(
                "no gradient reaches any LoRA factor",
                "Check adapter.targets, and that the loss depends on them.",
            )
        self._connected = True

    def _give(self) -> None:
        """Give every parameter its part of the noised sum, over the batch size."""
        parts = [
            self._sums[name].flatten() if name in self._sums else torch.zeros(parameter.numel())
            for name, parameter in self._named.items()
        ]
        whole = torch.cat([part.to("cpu", torch.float64) for part in parts])
        scale = self._how.noise_multiplier * self._how.clip
        mean = add_noise(whole, scale, self._how.noise) / self._how.batch_size
        pieces = torch.split(mean, [len(part) for part in parts])
        for parameter, piece in zip(self._named.values(), pieces, strict=True):
            parameter.grad = piece.reshape(parameter.shape).to(parameter.device, parameter.dtype)
        self._sums = {}

    def _forget(self) -> None:
        super()._forget()
        self._per_example.forget()
        self._sums = {}
