"""How much of a layer's change is noise: the signal-to-noise ratio of a private round.

With A, B the current factors, A', B' the means that clipping alone would have given, and N_A, N_B
the noise on them, the product of the released means changes by

    (B' + N_B)(A' + N_A) - B A = [B' A' - B A] + [N_B A' + B' N_A] + N_B N_A:

signal, noise, and the product of both noises. The last one is what FFA-LoRA (arXiv:2403.12313)
does without: with A frozen N_A is zero. It grows with the square of the noise, where the other two
only grow with it.

These figures use means that no noise covers. They are for studies, and no part of a release.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedgraft.adapter import LoraLayer, Tensors


@dataclass(frozen=True)
class SignalToNoise:
    """Frobenius norms of the three parts, each with the layer's scaling.

    Attributes:
        signal: ||s (B' A' - B A)||, what the clipped updates change.
        noise: ||s (N_B A' + B' N_A + N_B N_A)||, what the noise changes.
        noise_product: ||s N_B N_A||, the part of it that is a product of two noises.
    """

    signal: float
    noise: float
    noise_product: float

    @property
    def ratio(self) -> float | None:
        """signal / noise; None without noise."""
        return self.signal / self.noise if self.noise else None


def signal_to_noise(
    current: LoraLayer, noised: Mapping[str, Tensor], noise: Tensors
) -> SignalToNoise:
    """Measure one layer, without forming a product of its size.

    Args:
        current: the factors that the round started from.
        noised: the means as released, of "A" (r, d_in), "B" (d_out, r) or both.
        noise: what was added to them.
    """
    A, B = current.A.double(), current.B.double()
    zero_A, zero_B = torch.zeros_like(A), torch.zeros_like(B)
    released_A, released_B = noised.get("A", A), noised.get("B", B)
    noise_A, noise_B = noise.get("A", zero_A), noise.get("B", zero_B)
    clean_A, clean_B = released_A - noise_A, released_B - noise_B
    s = abs(current.scaling)
    return SignalToNoise(
        signal=s * _norm([clean_B - B, B], [clean_A, clean_A - A]),
        noise=s * _norm([noise_B, clean_B], [released_A, noise_A]),
        noise_product=s * _norm([noise_B], [noise_A]),
    )


def _norm(left: list[Tensor], right: list[Tensor]) -> float:
    """Return ||sum_i L_i R_i||_F of factors L_i (d_out, r) and R_i (r, d_in)."""
    L, R = torch.cat(left, dim=1), torch.cat(right)
    return float(((L.T @ L) * (R @ R.T)).sum().clamp(min=0.0).sqrt())
