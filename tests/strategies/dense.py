"""Oracles: every rule and diagnostic as its definition says it, on dense float64 matrices.

Slow and obvious on purpose, and independent of the code under test: products are formed in full,
regressions are solved by least squares on the stacked system, minima are searched numerically.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize


@dataclass(frozen=True)
class Client:
    """One client's factors of one layer, A (r, d_in) and B (d_out, r), and its share p_k."""

    A: np.ndarray
    B: np.ndarray
    share: float


def ideal(clients: list[Client]) -> np.ndarray:
    """DW = sum p_k B_k A_k."""
    return sum(c.share * (c.B @ c.A) for c in clients)


def means(clients: list[Client]) -> tuple[np.ndarray, np.ndarray]:
    """Abar and Bbar."""
    return sum(c.share * c.A for c in clients), sum(c.share * c.B for c in clients)


def ridge(clients: list[Client], lambda_rel: float) -> tuple[np.ndarray, np.ndarray]:
    """Abar and Bbar + X, X minimising ||R - X Abar||^2 + lambda ||X||^2 with the relative lambda.

    With lambda = 0 and Abar of deficient rank, the X of least norm (what lstsq gives).
    """
    A, B = means(clients)
    strength = lambda_rel * np.trace(A @ A.T) / len(A)
    left = np.vstack([A.T, np.sqrt(strength) * np.eye(len(A))])
    right = np.vstack([(ideal(clients) - B @ A).T, np.zeros((len(A), len(B)))])
    return A, B + np.linalg.lstsq(left, right, rcond=1e-12)[0].T


@dataclass(frozen=True)
class Cosine:
    """The paper's objective of B in the flattened cosine, given the means that clients receive."""

    A: np.ndarray
    B: np.ndarray
    DW: np.ndarray
    penalty: float

    def loss(self, Y: np.ndarray) -> float:
        """1 - cos(Y Abar, DW) + lambda ||Y - Bbar||^2; the cosine with a zero matrix is 0."""
        product = Y @ self.A
        length = np.linalg.norm(self.DW) * np.linalg.norm(product)
        cosine = (self.DW * product).sum() / length if length > 0 else 0.0
        return float(1.0 - cosine + self.penalty * ((Y - self.B) ** 2).sum())

    def minimum(self, starts: list[np.ndarray]) -> float:
        """The lowest loss that a numerical optimiser finds from these starts."""
        S = np.linalg.norm(self.DW)

        def loss_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
            Y = flat.reshape(self.B.shape)
            product = Y @ self.A
            t, q = (self.DW * product).sum(), np.linalg.norm(product)
            slope = (t * product / q**2 - self.DW) / (S * q)
            return self.loss(Y), (slope @ self.A.T + 2 * self.penalty * (Y - self.B)).ravel()

        options = {"maxiter": 5000, "ftol": 1e-16, "gtol": 1e-13}
        found = [
            minimize(loss_and_gradient, s.ravel(), jac=True, method="L-BFGS-B", options=options)
            for s in starts
        ]
        return float(min(result.fun for result in found))


def bias(clients: list[Client], A: np.ndarray, B: np.ndarray) -> tuple[float, float, float, float]:
    """Squared norms of DW, of R = DW - Bbar Abar, of DW - B A, and of R on row(Abar)."""
    A_mean, B_mean = means(clients)
    DW = ideal(clients)
    R = DW - B_mean @ A_mean
    onto_rows = np.linalg.pinv(A_mean) @ A_mean
    return tuple(float((M**2).sum()) for M in (DW, R, DW - B @ A, R @ onto_rows))
