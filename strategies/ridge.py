"""Least squares for a correction of B: what LoRA-FAIR's ridge is, and its cosine falls back on.

See `strategies.lora_fair` for the objective and its source.
"""

from __future__ import annotations

import torch
from torch import Tensor

RIDGE_LAMBDA = 1e-2
"""The ridge's lambda relative to trace(G) / r, unless the config says another."""


def ridge_correction(residual: Tensor, A: Tensor, lambda_rel: float) -> Tensor:
    """Return X = residual (G + lambda I)^-1 with lambda = lambda_rel * trace(G) / r, in float64.

    Directions in which G + lambda I vanishes (Abar = 0; or no lambda to speak of and Abar of
    deficient rank) cannot change the product X Abar: X gets nothing there.

    Args:
        residual: (DW - Bbar Abar) Abar^T, of shape (d_out, r).
        A: Abar, of shape (r, d_in).
        lambda_rel: the relative lambda, 0 or more.
    """
    A = A.double()
    eigenvalues, basis = torch.linalg.eigh(A @ A.T)
    shifted = eigenvalues.clamp(min=0.0) + lambda_rel * eigenvalues.mean()
    # the residual comes from float32 contributions: below this share it would divide their rounding
    smallest = torch.finfo(torch.float32).eps * shifted.max()
    inverse = torch.where(shifted > smallest, 1.0 / shifted, 0.0)
    correction: Tensor = residual.double() @ ((basis * inverse) @ basis.T)
    return correction
