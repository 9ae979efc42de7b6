"""Every example's own gradient against a backward pass of its own, and clipped sums of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from private import FAMILIES, Family, differs, family, norm, one_by_one
from torch import Tensor, nn
from torch.nn import functional

from client.per_example import PerExampleGradients, check_layers
from fedgraft.adapter import Tensors
from fedgraft.errors import PrivacyError

INDICES = np.array([5, 1, 13, 2, 7])  # of several lengths


def clipped(made: Family, weights: Tensor, clip: float, names: list[str]) -> Tensors:
    """One backward pass over the examples of `INDICES`, and the clipped sum of it."""
    made.model.take(made.start)
    made.model.train_mode()
    parameters = {name: made.model.parameters[name] for name in names}
    per_example = PerExampleGradients(made.model.model, parameters)
    with per_example.watching():
        made.task.loss(made.model.model, made.examples.batch(INDICES)).backward()
        assert per_example.seen() == set(names)
        return per_example.clipped_sum(weights, clip)


def counts(made: Family) -> Tensor:
    found = [made.task.count(made.examples.batch(INDICES[i : i + 1])) for i in range(len(INDICES))]
    return torch.tensor(found)


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_it_is_that_of_a_backward_pass_of_its_own(
    kind: str, quantization: str, tmp_path: Path
) -> None:
    made = family(kind, tmp_path, model__quantization=quantization)
    for index, alone in enumerate(one_by_one(made, INDICES, made.names)):
        chosen = torch.zeros(len(INDICES))
        chosen[index] = 1.0
        found = clipped(made, chosen / counts(made), float("inf"), made.names)
        assert differs(found, alone) < 1e-5


@pytest.mark.parametrize(
    "settings",
    [
        {"model__gradient_checkpointing": True},
        {"model__attention": "sdpa"},
        {"train__loss": "all"},
        {"adapter__type": "rslora", "adapter__targets": "all-linear"},
    ],
)
def test_whatever_else_is_set(settings: dict[str, object], tmp_path: Path) -> None:
    made = family("llama", tmp_path, **settings)
    if "model__gradient_checkpointing" in settings:
        assert made.model.model.is_gradient_checkpointing
    alone = one_by_one(made, INDICES, made.names)
    total = {name: sum(g[name] for g in alone) for name in made.names}
    found = clipped(made, 1.0 / counts(made), float("inf"), made.names)
    assert differs(found, total) < 1e-5  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", FAMILIES)
def test_each_is_clipped_by_its_norm_over_all_tensors(kind: str, tmp_path: Path) -> None:
    made = family(kind, tmp_path)
    names = [name for name in made.names if "lora_A" not in name]  # as FFA-LoRA trains
    alone = one_by_one(made, INDICES, names)
    norms = [norm(gradients) for gradients in alone]
    clip = float(np.median(norms))
    assert min(norms) < clip < max(norms)
    by_hand = {
        name: sum(min(1.0, clip / n) * g[name] for g, n in zip(alone, norms, strict=True))
        for name in names
    }
    assert differs(clipped(made, 1.0 / counts(made), clip, names), by_hand) < 1e-5  # type: ignore[arg-type]


class Layers(nn.Module):
    """A layer that makes Gram matrices cheap, and one that does not, on sequences."""

    def __init__(self, positions: int) -> None:
        super().__init__()
        self.wide = nn.Linear(16, 12)
        self.thin = nn.Linear(12, 1)
        self.positions = positions

    def forward(self, x: Tensor) -> Tensor:
        return self.thin(self.wide(x).tanh()).flatten(1).sum(1)


def layers_sum(model: Layers, x: Tensor, weights: Tensor, clip: float) -> Tensors:
    per_example = PerExampleGradients(model, dict(model.named_parameters()))
    with per_example.watching():
        model(x).sum().backward()
        return per_example.clipped_sum(weights, clip)


@pytest.mark.parametrize("positions", [1, 6, 20])
def test_gram_matrices_give_the_same(positions: int) -> None:
    """wide has 192 weights, so two Gram matrices of 1 or 6 positions are smaller, of 20 not."""
    torch.manual_seed(0)
    model, x = Layers(positions), torch.randn(5, positions, 16)
    alone = [
        torch.autograd.grad(model(x[i : i + 1]).sum(), list(model.parameters())) for i in range(5)
    ]
    named = [dict(zip(dict(model.named_parameters()), g, strict=True)) for g in alone]
    norms = [norm(gradients) for gradients in named]
    clip = float(np.median(norms))
    weights = torch.tensor([1.0, 1.0, 0.5, 1.0, 2.0])
    by_hand = {
        name: sum(
            min(float(w), clip / n) * g[name] for g, n, w in zip(named, norms, weights, strict=True)
        )
        for name in named[0]
    }
    assert differs(layers_sum(model, x, weights, clip), by_hand) < 1e-5  # type: ignore[arg-type]


@pytest.mark.parametrize("positions", [1, 20])
@pytest.mark.parametrize("size", [0.0, 1e-20, 1e6, 1e18, 1e30, 1e36, float("inf"), float("nan")])
def test_no_example_moves_the_sum_by_more_than_the_clip(size: float, positions: int) -> None:
    """One example is as hostile as float32 allows: the sum with it and without it."""
    torch.manual_seed(0)
    model, x = Layers(positions), torch.randn(4, positions, 16)
    weights = torch.ones(4)
    found = []
    for last in (size, 0.0):
        per_example = PerExampleGradients(model, dict(model.named_parameters()))
        with per_example.watching():
            (model(x) * torch.tensor([1.0, 1.0, 1.0, last])).sum().backward()
            found.append(per_example.clipped_sum(weights, 0.5))
    assert all(bool(tensor.isfinite().all()) for sums in found for tensor in sums.values())
    moved = norm({name: found[0][name].double() - found[1][name].double() for name in found[0]})
    assert moved <= 0.5 + 1e-6  # the sums of the other three round, too
    if 1e6 <= size <= 1e30:
        assert moved > 0.5 - 1e-5


def test_a_layer_used_twice_has_one_gradient() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(3, 3), torch.randn(4, 3)
    alone = [
        torch.autograd.grad(layer(layer(x[i : i + 1])).square().sum(), list(layer.parameters()))
        for i in range(4)
    ]
    norms = [float(torch.cat([g.flatten() for g in gs]).norm()) for gs in alone]
    clip = sorted(norms)[1] * 1.01
    per_example = PerExampleGradients(layer, dict(layer.named_parameters()))
    with per_example.watching():
        layer(layer(x)).square().sum().backward()
        found = per_example.clipped_sum(torch.ones(4), clip)
    for number, name in enumerate(("weight", "bias")):
        by_hand = sum(min(1.0, clip / n) * gs[number] for gs, n in zip(alone, norms, strict=True))
        assert torch.allclose(found[name], by_hand, atol=1e-5)  # type: ignore[arg-type]


def test_what_a_mask_holds_back_does_not_count() -> None:
    layer, x = nn.Linear(2, 1, bias=False), torch.tensor([[3.0, 4.0]])
    mask = {"weight": torch.tensor([[True, False]])}
    per_example = PerExampleGradients(layer, {"weight": layer.weight}, mask)
    with per_example.watching():
        layer(x).sum().backward()
        found = per_example.clipped_sum(torch.ones(1), 1.5)["weight"]
    assert torch.allclose(found, torch.tensor([[1.5, 0.0]]), atol=1e-5)


def test_examples_laid_end_to_end_are_refused() -> None:
    layer, x = nn.Linear(3, 2), torch.randn(4, 5, 3)
    per_example = PerExampleGradients(layer, dict(layer.named_parameters()))
    with per_example.watching():
        functional.mse_loss(layer(x.flatten(0, 1)), torch.zeros(20, 2)).backward()
        with pytest.raises(PrivacyError, match=r"weight, bias.*\(20, 3\) in a batch of 4"):
            per_example.clipped_sum(torch.ones(4), 1.0)


def test_a_parameter_of_no_known_layer_is_refused() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))

    with pytest.raises(PrivacyError, match=r"'odd\.scale'.*no layer"):
        model = Odd()
        check_layers(model, {"odd.scale": model.scale})


def test_nothing_is_left_of_the_hooks() -> None:
    model = Layers(1)
    with (
        pytest.raises(ZeroDivisionError),
        PerExampleGradients(model, dict(model.named_parameters())).watching(),
    ):
        assert model.wide._forward_hooks
        raise ZeroDivisionError
    assert not model.wide._forward_hooks and not model.thin._forward_hooks


def test_opacus_puts_nothing_on_the_screen() -> None:
    code = (
        "import logging; from torch import nn; from client.per_example import check_layers; "
        "layer = nn.Linear(1, 1); check_layers(layer, {'w': layer.weight}); "
        "assert not logging.root.handlers"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
