"""Training behind a fixed basis: a parameter is U C, and C alone is trained.

Rules that train few numbers in a fixed subspace (Fed-SB trains R of B = B0 R) need it. The model
keeps its parameter; before a forward pass it holds U C, and its gradient G becomes U^T G for C.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedgraft.adapter import Tensors


class Latent:
    """What an optimizer steps in place of a model's parameters.

    Args:
        parameters: those that train, by tensor name.
        bases: U (d, m) with independent columns, by the names of those that lie behind one.

    Attributes:
        leaves: by the same names, the parameter itself or its core C (m, r).
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], bases: Mapping[str, Tensor]) -> None:
        self._parameters = parameters
        self._bases = {
            name: basis.to(parameters[name].device, parameters[name].dtype)
            for name, basis in bases.items()
            if name in parameters
        }
        self.leaves = dict(parameters)
        for name, basis in self._bases.items():
            self.leaves[name] = nn.Parameter(_core(basis, parameters[name].detach()))
        self.push_forward()

    @torch.no_grad()
    def push_forward(self) -> None:
        """Let the model hold U C."""
        for name, basis in self._bases.items():
            self._parameters[name].copy_(basis @ self.leaves[name])

    def pull_back(self) -> None:
        """Give every core the gradient of its parameter."""
        for name, basis in self._bases.items():
            gradient = self._parameters[name].grad
            self.leaves[name].grad = None if gradient is None else basis.T @ gradient

    def cores(self) -> Tensors:
        """Return the cores, float32, on the CPU."""
        return {
            name: self.leaves[name].detach().to("cpu", torch.float32, copy=True)
            for name in self._bases
        }


def _core(basis: Tensor, value: Tensor) -> Tensor:
    """Return C (m, r) for which U C is nearest to a value (d, r).

    By the normal equations, in float64: torch's lstsq gives other bits from call to call.
    """
    U = basis.double()
    solution: Tensor = torch.linalg.solve(U.T @ U, U.T @ value.double())
    # solve gives columns in a row, and torch's fused optimizers step a parameter and a gradient of
    # different layouts as if they had the same
    return solution.to(value.dtype).contiguous()
