"""Every example's own gradient, clipped and summed, from one backward pass over many examples.

With x (n, ..., d_in) a linear layer's inputs and g (n, ..., d_out) the loss's gradient by its
outputs, example i's gradient by the weight is g_i^T x_i: autograd sums these over i, and clipping
has to come before the sum. Hooks keep x and g of the layers that train; the formulas for each type
of layer are Opacus' (Yousefpour et al. 2021, arXiv:2109.12298). Where an example's two Gram
matrices are smaller than its gradient, that is never made: its norm follows from them, and x and g
give the clipped sum as well (ghost clipping, Li et al. 2022, arXiv:2110.05679, without their second
backward pass: Bu et al. 2023, arXiv:2210.00038). A factor of low rank is smaller than the Gram
matrices of any but the shortest sequences, a classifier on one vector is larger.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedgraft.errors import PrivacyError

_MARGIN = 1e-6
"""Taken off the clip, so that rounding in float32 leads over it nowhere."""
_SMALL = 1e-30
"""Factors below it are applied in float64: in float32 they lose their digits."""

Sums = Callable[[Tensor, Tensor | None], dict[str, Tensor]]
"""Makes the sums weighted by factors (n,), over the chosen examples only or all for None."""


@dataclass
class _Layer:
    """One module that trains, and what its hooks saw since the last backward pass.

    Attributes:
        module: of a type that Opacus has formulas for.
        parameters: those of it that train, by their names in the adapter.
        uses: inputs and gradients by outputs of every call.
    """

    module: nn.Module
    parameters: dict[str, nn.Parameter]
    uses: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def watch(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Be told of a forward pass; the backward pass adds to `uses`."""
        if not (torch.is_grad_enabled() and output.requires_grad):
            return
        x = inputs[0].detach()

        def take(gradient: Tensor) -> None:
            self.uses.append((x, gradient.detach()))

        output.register_hook(take)  # type: ignore[no-untyped-call]


class PerExampleGradients:
    """Watches the layers that train, and makes clipped sums of what it saw.

    Args:
        model: where the layers are.
        parameters: those that train, by name.
        masks: by name, 1 where an entry may move: what cannot move does not count for the norm.

    Raises:
        PrivacyError: a parameter lies in a layer whose per-example gradients are not known.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        masks: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._layers = _owners(model, parameters)
        self._masks = dict(masks or {})

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Have hooks on the layers inside the block; none is left afterwards."""
        handles = [layer.module.register_forward_hook(layer.watch) for layer in self._layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.forget()

    def forget(self) -> None:
        """Let go of what was seen."""
        for layer in self._layers:
            layer.uses.clear()

    def seen(self) -> frozenset[str]:
        """Return the names of the parameters that the last backward pass went through."""
        return frozenset(n for layer in self._layers if layer.uses for n in layer.parameters)

    def clipped_sum(self, weights: Tensor, clip: float) -> dict[str, Tensor]:
        """Return the sums of the examples' clipped gradients by name, and forget what was seen.

        An example's gradient is scaled to the norm `clip` over all parameters together where its
        own is larger. One that is no number, or too large for float32, counts as zero, so it spoils
        no other's.

        Args:
            weights: by which each example's gradient is multiplied before it is clipped, (n,),
                finite and not negative.
            clip: largest L2 norm.

        Raises:
            PrivacyError: a layer does not have the examples on its inputs' first axis.
        """
        weights = weights.to(wide(weights.device))
        squares = torch.zeros_like(weights)
        sums: list[Sums] = []
        for layer in self._layers:
            if not layer.uses:
                continue
            if self._is_ghost(layer):
                self._check(layer, len(weights))
                found, sum_up = _ghost(layer)
            else:
                found, sum_up = _summed(self._whole(layer, len(weights)))
            squares += found
            sums.append(sum_up)
        self.forget()
        norms = squares.sqrt() * weights
        usable = torch.isfinite(norms)
        factors = weights * torch.where(
            norms > clip, clip * (1.0 - _MARGIN) / norms.clamp(min=clip), 1.0
        )
        chosen = None if bool(usable.all()) else usable.nonzero().flatten()
        made: dict[str, Tensor] = {}
        for sum_up in sums:
            made |= sum_up(factors, chosen)
        return made

    def _whole(self, layer: _Layer, examples: int) -> dict[str, Tensor]:
        """Return each example's gradients of one layer, by name, (n, ...) each."""
        self._check(layer, examples)
        total: dict[str, Tensor] = {}
        for x, g in layer.uses:
            found = _samplers()[type(layer.module)](layer.module, [x], g)
            for name, parameter in layer.parameters.items():
                total[name] = total[name] + found[parameter] if name in total else found[parameter]
        return {
            name: gradient if (mask := self._masks.get(name)) is None else gradient * mask
            for name, gradient in total.items()
        }

    def _is_ghost(self, layer: _Layer) -> bool:
        """Whether the Gram matrices, T x T each, are smaller than the gradient d_out x d_in."""
        if (
            type(layer.module) is not nn.Linear
            or len(layer.uses) != 1
            or any(name in self._masks for name in layer.parameters)
        ):
            return False
        x = layer.uses[0][0]
        positions = x[0].numel() // x.shape[-1] if len(x) else 0
        return 2 * positions**2 <= layer.module.weight.numel()

    @staticmethod
    def _check(layer: _Layer, examples: int) -> None:
        for x, g in layer.uses:
            if x.shape[0] != examples or g.shape[0] != examples:
                raise PrivacyError(
                    f"a layer that trains ({', '.join(layer.parameters)}) saw inputs of shape "
                    f"{tuple(x.shape)} in a batch of {examples}: no example's own gradient can be "
                    "told there",
                    "Set adapter.targets to layers that keep the examples apart, or model."
                    'attention to "sdpa" where the base lays sequences end to end.',
                )


def check_layers(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuse parameters whose per-example gradients are not known.

    Raises:
        PrivacyError: names the first of them.
    """
    _owners(model, parameters)


def wide(device: torch.device) -> torch.dtype:
    """Return the type in which norms and sums are computed: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def _owners(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> list[_Layer]:
    """Return the modules that the parameters belong to."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    layers: list[_Layer] = []
    for module in model.modules():
        own = {
            names[id(parameter)]: parameter
            for parameter in module.parameters(recurse=False)
            if id(parameter) in names
        }
        if own and type(module) in _samplers():
            layers.append(_Layer(module, own))
    known = {name for layer in layers for name in layer.parameters}
    for name in parameters:
        if name not in known:
            raise PrivacyError(
                f'privacy.mode is "example", and no example\'s own gradient of {name!r} is known: '
                "it lies in no layer that Opacus has a formula for",
                "Leave that module out of adapter.targets; linear layers work.",
            )
    return layers


def _samplers() -> Mapping[type[nn.Module], Callable[..., dict[nn.Parameter, Tensor]]]:
    """Return Opacus' formulas by type of layer, which take a layer, its inputs and gradients."""
    handlers = logging.root.handlers[:]
    from opacus.grad_sample import GradSampleModule

    logging.root.handlers = handlers  # the import adds one that prints to the screen
    samplers: Mapping[type[nn.Module], Callable[..., dict[nn.Parameter, Tensor]]]
    samplers = GradSampleModule.GRAD_SAMPLERS
    return samplers


def _summed(gradients: Mapping[str, Tensor]) -> tuple[Tensor, Sums]:
    """Return the squared norms (n,) of gradients (n, ...), and what sums them."""
    squares = sum(
        torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=wide(g.device)).square()
        for g in gradients.values()
    )

    def sum_up(factors: Tensor, chosen: Tensor | None) -> dict[str, Tensor]:
        if chosen is not None:
            factors = factors[chosen]
        exact = bool((factors < _SMALL).any())
        made = {}
        for name, gradient in gradients.items():
            flat = gradient.flatten(1) if chosen is None else gradient.flatten(1)[chosen]
            kind = wide(flat.device) if exact else flat.dtype
            made[name] = (factors.to(kind) @ flat.to(kind)).reshape(gradient.shape[1:])
        return made

    assert isinstance(squares, Tensor)
    return squares, sum_up


def _ghost(layer: _Layer) -> tuple[Tensor, Sums]:
    """Return a linear layer's squared norms, and sums, without any example's gradient."""
    from opacus.grad_sample.linear import compute_linear_norm_sample

    ((x, g),) = layer.uses
    x, g = x.to(wide(x.device)), g.to(wide(g.device))
    norms = compute_linear_norm_sample(layer.module, [x], g)
    squares = sum(norms[parameter].square() for parameter in layer.parameters.values())

    def sum_up(factors: Tensor, chosen: Tensor | None) -> dict[str, Tensor]:
        inputs, scaled = (x, g) if chosen is None else (x[chosen], g[chosen])
        scaled = scaled * (factors if chosen is None else factors[chosen]).reshape(
            -1, *[1] * (g.ndim - 1)
        )
        scaled = scaled.flatten(0, -2)
        made = {}
        for name, parameter in layer.parameters.items():
            whole = scaled.T @ inputs.flatten(0, -2) if parameter.ndim == 2 else scaled.sum(0)
            made[name] = whole
        return made

    assert isinstance(squares, Tensor)
    return squares, sum_up
