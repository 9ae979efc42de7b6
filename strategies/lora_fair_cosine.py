"""LoRA-FAIR's correction by the paper's own objective, a flattened cosine, solved exactly.

"LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement"
Jieming Bian, Lei Wang, Letian Zhang, Jie Xu. ICCV 2025. https://arxiv.org/abs/2411.14961

With Y = Bbar + dB the server minimises

    loss(Y) = 1 - <Y Abar, DW> / (||Y Abar|| ||DW||) + lambda ||Y - Bbar||_F^2,

the penalty squared, because under the norm itself dB = 0 is the optimum whenever the gradient of
the cosine at Bbar is at most lambda, as it is in most layers. The paper descends by SGD; here the
stationary points are found instead, from Gram matrices. With G = Abar Abar^T, H = DW Abar^T,
S = ||DW||_F, t = <Y, H> and q^2 = <Y G, Y>, those with t > 0 are

    Y = (sigma H + l Bbar)(G + l I)^-1,   sigma = q^2 / t,   l = 2 lambda S q^3 / t.

In the eigenbasis of G everything is a sum over its r eigenvalues, so each l gives its sigma (the
positive root of a quadratic), and l is a root of F(l) = l t - 2 lambda S q^3. F is not monotone and
may have several roots: log l is scanned for changes of sign, each is refined, and the lowest loss
wins. S holds products between clients, so this rule needs every client's own factors.

Where <Bbar, H G^-1> <= 0 the infimum is Y -> 0, which would erase the adapter; <Bbar, H> < 0, which
one hostile client can cause, puts the optimum at t < 0. There, and where no root is better than
Bbar as it is, the ridge solution takes over; and Bbar stays where the ridge, too, is no better than
that by the loss above. So the result never ends above the loss of doing nothing, and a note in the
log says what was done.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor

from fedgraft.adapter import Tensors
from strategies.means import weighted_mean
from strategies.ridge import RIDGE_LAMBDA, ridge_correction
from strategies.rule import WeightedLayer

_NEGLIGIBLE = 1e-13
"""Eigenvalues of G below this share of the largest are round-off, and would make false roots."""
_SCAN = 400
"""Points at which F is looked at: 15 a decade of l or more."""
_TIE = 1e-12
"""Losses closer than this are equal: what float64 resolves of a cosine near 1."""


def corrected_by_cosine(
    updates: Sequence[WeightedLayer], penalty: float
) -> tuple[Tensors, tuple[str, ...]]:
    """Return {"A": Abar, "B": the corrected Bbar}, and notes where no optimum was safe.

    Args:
        updates: all clients' factors of one layer.
        penalty: the paper's lambda, absolute.
    """
    mean = weighted_mean(
        (update.share, {"A": update.factors.A, "B": update.factors.B}) for update in updates
    )
    # rounded like FedAvg's, so that what follows corrects the means that clients receive
    A, B = _rounded(mean["A"]), _rounded(mean["B"])
    projected = weighted_mean(
        (update.share, {"H": update.factors.B.double() @ (update.factors.A.double() @ A.T)})
        for update in updates
    )
    problem = CosineProblem(
        B=B,
        G=A @ A.T,
        H=projected["H"],
        S=product_norm(
            torch.cat([u.share * u.factors.B.double() for u in updates], dim=1),
            torch.cat([u.factors.A for u in updates]).double(),
        ),
        penalty=penalty,
    )
    Y, notes = problem.solve(A)
    return {"A": A, "B": Y}, notes


def _rounded(tensor: Tensor) -> Tensor:
    return tensor.float().double()


def product_norm(left: Tensor, right: Tensor) -> float:
    """Return ||left @ right||_F of left (m, n) and right (n, k), from two n x n Gram matrices."""
    squared = float((left.T @ left * (right @ right.T)).sum())
    return math.sqrt(max(squared, 0.0))


@dataclass(frozen=True)
class CosineProblem:
    """The objective of one layer, in float64.

    Attributes:
        B: Bbar, of shape (d_out, r).
        G: Abar Abar^T, of shape (r, r).
        H: DW Abar^T, of shape (d_out, r).
        S: ||DW||_F.
        penalty: the paper's lambda, absolute.
    """

    B: Tensor
    G: Tensor
    H: Tensor
    S: float
    penalty: float

    def loss(self, Y: Tensor) -> float:
        """Return the loss at Y (d_out, r); the cosine with a vanishing matrix counts as 0."""
        length = self.S * math.sqrt(max(float((Y @ self.G * Y).sum()), 0.0))
        cosine = float((Y * self.H).sum()) / length if length > 0.0 else 0.0
        return 1.0 - cosine + self.penalty * float((Y - self.B).square().sum())

    def solve(self, A: Tensor) -> tuple[Tensor, tuple[str, ...]]:
        """Return the corrected B (d_out, r) and notes on what stood in for the optimum, if any.

        Losses are compared at float32 values, for those are what clients receive.
        """
        nothing = self.loss(self.B)
        best, reason = self._optimum()
        if best is not None and self.loss(best) <= nothing + _TIE:
            return best, ()
        ridge = _rounded(self.B + ridge_correction(self.H - self.B @ self.G, A, RIDGE_LAMBDA))
        if self.loss(ridge) <= nothing:
            return ridge, (f"the ridge stood in for the cosine: {reason}",)
        return self.B, (f"B stays the mean, neither cosine nor ridge would better it: {reason}",)

    def _optimum(self) -> tuple[Tensor | None, str]:
        """Return the stationary point of lowest loss, or None; and why it may not be taken."""
        eigenvalues, basis = torch.linalg.eigh(self.G)
        kept = eigenvalues > _NEGLIGIBLE * eigenvalues.max().clamp(min=0.0)
        e, basis = eigenvalues[kept], basis[:, kept]
        H, B = self.H @ basis, self.B @ basis
        spectrum = _Spectrum(
            e=e.numpy(),
            hh=H.square().sum(0).numpy(),
            hb=(H * B).sum(0).numpy(),
            bb=B.square().sum(0).numpy(),
            strength=2.0 * self.penalty * self.S,
        )
        if spectrum.hb.sum() < 0.0:
            return None, "<Bbar, H> < 0"
        if (spectrum.hb / spectrum.e).sum() <= 0.0:
            return None, "<Bbar, H G^-1> <= 0"
        # in the directions not kept H = 0, so only the penalty speaks and Y = Bbar
        points = [
            _rounded(self.B + ((sigma * H - e * B) / (e + shift)) @ basis.T)
            for shift, sigma in spectrum.roots()
        ]
        return min(points, key=self.loss, default=None), "no stationary point beats Bbar"


@dataclass(frozen=True)
class _Spectrum:
    """F in the eigenbasis of G, where the problem is four numbers an eigenvalue.

    The formulas' l is `shift` here: one or many, of any shape.

    Attributes:
        e: the eigenvalues of G, above 0.
        hh, hb, bb: inner products of the columns of H and Bbar in the eigenbasis.
        strength: 2 lambda S.
    """

    e: np.ndarray
    hh: np.ndarray
    hb: np.ndarray
    bb: np.ndarray
    strength: float

    def sigma(self, shift: np.ndarray) -> np.ndarray:
        """Return sigma at each l: the positive root of a sigma^2 + b sigma - c = 0 (a, c >= 0)."""
        each = shift[..., None]
        weight = (self.e + each) ** -2.0
        a = (self.hh * weight).sum(-1)
        b = (self.hb * (each - self.e) * weight).sum(-1)
        c = (each * self.e * self.bb * weight).sum(-1)
        size = np.abs(b) + np.sqrt(b * b + 4.0 * a * c)
        # of the two forms of the root, the one in which nothing cancels
        sigma: np.ndarray = np.where(
            b <= 0.0, size / (2.0 * a), 2.0 * c / np.where(b > 0.0, size, 1.0)
        )
        return sigma

    def excess(self, shift: np.ndarray) -> np.ndarray:
        """Return F(l) = l t - 2 lambda S q^3 at each l."""
        t, q = self._t_and_q(shift)
        excess: np.ndarray = shift * t - self.strength * q**3
        return excess

    def roots(self) -> list[tuple[float, float]]:
        """Return the roots l of F, each with its sigma; <Bbar, H G^-1> must be above 0."""
        zero = np.zeros(())
        if self.strength == 0.0:
            return [(0.0, float(self.sigma(zero)))]
        # F is nearly linear far below and far above the eigenvalues: one root there, if any
        t, q = self._t_and_q(zero)
        ends = [self.strength * q**3 / t]
        if self.hb.sum() > 0.0:
            ends.append(self.strength * (self.e * self.bb).sum() ** 1.5 / self.hb.sum())
        grid = np.geomspace(1e-6 * self.e.min(), 1e6 * self.e.max(), _SCAN)
        grid = np.unique([1e-3 * min(ends), *grid, 1e3 * max(ends)])
        positive = self.excess(grid) > 0.0
        found = [
            np.exp(brentq(lambda x: self.excess(np.exp(x)), np.log(grid[i]), np.log(grid[i + 1])))
            for i in np.flatnonzero(positive[1:] != positive[:-1])
        ]
        return [(float(shift), float(self.sigma(shift))) for shift in found]

    def _t_and_q(self, shift: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        each, sigma = shift[..., None], self.sigma(shift)[..., None]
        t = ((sigma * self.hh + each * self.hb) / (self.e + each)).sum(-1)
        squares = sigma**2 * self.hh + 2.0 * sigma * each * self.hb + each**2 * self.bb
        q = np.sqrt(np.maximum((self.e * squares / (self.e + each) ** 2).sum(-1), 0.0))
        return t, q
