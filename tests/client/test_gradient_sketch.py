"""Sketches of a gradient, against the gradient that autograd gives a base weight."""

from __future__ import annotations

import torch

from client.gradient_sketch import gradient_sketches
from fedgraft.adapter import Adapter, parse_factor
from fedgraft.config import Config
from fedgraft.resident_model import ResidentModel
from fedgraft.tasks.task import Task


def test_sketches_are_the_gradients(tiny: Config, model: ResidentModel, digits: Task) -> None:
    adapter = model.initial_adapter(0)
    tensors = {  # B not zero, so that the adapter counts
        name: tensor + 0.01 if parse_factor(name) else tensor
        for name, tensor in adapter.tensors().items()
    }
    adapter = Adapter.from_tensors(tensors, model.scaling)
    examples = digits.train(0)
    layers = list(adapter.layers)[::5]
    generator = torch.Generator().manual_seed(0)
    probes = {}
    for name in layers:
        d_out, d_in = len(adapter.layers[name].B), adapter.layers[name].A.shape[1]
        probes[name] = (
            torch.randn(d_in, 3, generator=generator),
            torch.randn(4, d_out, generator=generator),
        )
    before = model.frozen_digest()
    sketches, loss = gradient_sketches(model, digits, examples, adapter, probes)
    assert model.frozen_digest() == before
    assert all(parameter.grad is None for parameter in model.parameters.values())

    model.take(adapter)
    weights = {name: model.lora_module(name).base_layer.weight for name in layers}  # type: ignore[union-attr]
    try:
        for weight in weights.values():
            weight.requires_grad_(True)  # type: ignore[operator]
        whole = next(iter(model.batches(examples, len(examples))))
        mean = digits.loss(model.model.eval(), whole) / len(examples)
        gradients = torch.autograd.grad(mean, list(weights.values()))  # type: ignore[arg-type]
    finally:
        for weight in weights.values():
            weight.requires_grad_(False)  # type: ignore[operator]
    assert abs(loss - float(mean.detach())) < 1e-5
    for name, gradient in zip(layers, gradients, strict=True):
        omega, psi = probes[name]
        right, left = sketches[name]
        torch.testing.assert_close(right, gradient @ omega, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(left, psi @ gradient, rtol=1e-4, atol=1e-6)
