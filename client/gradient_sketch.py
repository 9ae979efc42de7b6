"""Linear sketches of a loss's gradient by frozen weights, without ever holding that gradient.

With x (n, d_in) a layer's inputs and g (n, d_out) the loss's gradient by its outputs, the gradient
by its weight is G = g^T x. Sketches G Omega = g^T (x Omega) and Psi G = (g Psi^T)^T x need only
thin matrices, and work on a quantised base, whose weights have no gradient at all.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedgraft.adapter import Adapter
from fedgraft.resident_model import ResidentModel
from fedgraft.tasks.task import Examples, Task

Sketches = dict[str, tuple[Tensor, Tensor]]


def gradient_sketches(
    model: ResidentModel,
    task: Task,
    examples: Examples,
    adapter: Adapter,
    probes: Mapping[str, tuple[Tensor, Tensor]],
) -> tuple[Sketches, float]:
    """Sketch the gradient of the mean loss over a client's examples.

    Args:
        model: the resident model.
        task: gives the loss.
        examples: the client's own.
        adapter: where the gradient is taken.
        probes: by layer name, Omega (d_in, m) and Psi (l, d_out).

    Returns:
        By layer name G Omega (d_out, m) and Psi G (l, d_in), float32; and the mean loss.
    """
    model.use_threads()
    model.take(adapter)
    model.model.eval()
    sums = {
        name: _LayerSketch(omega.to(model.device), psi.to(model.device))
        for name, (omega, psi) in probes.items()
    }
    handles = [
        model.lora_module(name).register_forward_hook(sketch.watch) for name, sketch in sums.items()
    ]
    size = task.config.train.micro_batch or task.config.train.batch_size
    total, count = 0.0, 0
    try:
        for batch in model.batches(examples, size):
            loss = task.loss(model.model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            total, count = total + float(loss.detach()), count + task.count(batch)
    finally:
        for handle in handles:
            handle.remove()
        for parameter in model.parameters.values():
            parameter.grad = None
    terms = max(1, count)
    return {name: sketch.mean(terms) for name, sketch in sums.items()}, total / terms


class _LayerSketch:
    """The two sums of one layer."""

    def __init__(self, omega: Tensor, psi: Tensor) -> None:
        self._omega, self._psi = omega, psi
        d_in, d_out = omega.shape[0], psi.shape[1]
        self._right = omega.new_zeros(d_out, omega.shape[1], dtype=torch.float64)
        self._left = omega.new_zeros(psi.shape[0], d_in, dtype=torch.float64)

    def watch(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Be told of a forward pass; the backward pass adds to the sums."""
        x = inputs[0].detach().reshape(-1, self._omega.shape[0]).float()

        def add(gradient: Tensor) -> None:
            g = gradient.detach().reshape(-1, self._psi.shape[1]).float()
            self._right += (g.T @ (x @ self._omega)).double()
            self._left += ((g @ self._psi.T).T @ x).double()

        output.register_hook(add)  # type: ignore[no-untyped-call]

    def mean(self, terms: int) -> tuple[Tensor, Tensor]:
        return (self._right / terms).float().cpu(), (self._left / terms).float().cpu()
