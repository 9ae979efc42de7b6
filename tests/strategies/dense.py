"""Oracles: every rule and diagnostic as its definition says it, on dense float64 matrices.

Slow and obvious on purpose, and independent of the code under test: products are formed in full,
regressions are solved by least squares on the stacked system, minima are searched numerically.
"""

from __future__ import annotations

from collections.abc import Callable
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


def means_and_unheld(
    means_of: Callable[[list[Client]], tuple[np.ndarray, np.ndarray]],
    clients: list[Client],
    ranks: list[int],
    current: Client,
) -> tuple[np.ndarray, np.ndarray]:
    """Means of padded factors; ranks that nobody has are the current ones."""
    A, B = means_of(clients)
    A[max(ranks) :], B[:, max(ranks) :] = current.A[max(ranks) :], current.B[:, max(ranks) :]
    return A, B


def best_of_rank(clients: list[Client], current: Client) -> np.ndarray:
    """The best approximation of DW by a matrix of the current layer's rank."""
    U, S, V = np.linalg.svd(ideal(clients), full_matrices=False)
    rank = len(current.A)
    return (U[:, :rank] * S[:rank]) @ V[:rank]


def by_norms(clients: list[Client]) -> tuple[np.ndarray, np.ndarray]:
    """Means of A and B with weights in proportion to ||B_k A_k||; by examples where all are 0."""
    norms = [float(np.linalg.norm(c.B @ c.A)) for c in clients]
    if not any(norms):
        return means(clients)
    weighted = [Client(c.A, c.B, n / sum(norms)) for c, n in zip(clients, norms, strict=True)]
    return means(weighted)


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


def bias(
    clients: list[Client], A: np.ndarray, B: np.ndarray, joined: np.ndarray | float = 0.0
) -> tuple[float, float, float, float]:
    """Squared norms of DW, of R = DW - Bbar Abar, of DW - B A - J, and of R on row(Abar)."""
    A_mean, B_mean = means(clients)
    DW = ideal(clients)
    R = DW - B_mean @ A_mean
    onto_rows = np.linalg.pinv(A_mean) @ A_mean
    return tuple(float((M**2).sum()) for M in (DW, R, DW - B @ A - joined, R @ onto_rows))


# Robust rules, on the clients' whole changes: one row a client, (K, n)


def krum_order(changes: np.ndarray, byzantine: int) -> list[int]:
    """Clients by the sum of squared distances to their K - f - 2 closest ones, lowest first."""
    scores = []
    for change in changes:
        distances = sorted(((change - other) ** 2).sum() for other in changes)
        scores.append(sum(distances[1 : len(changes) - byzantine - 1]))
    return sorted(range(len(changes)), key=lambda k: scores[k])


def median_slope(changes: np.ndarray, weights: np.ndarray, point: np.ndarray) -> float:
    """How far from 0 the subgradient of sum w_k ||v - D_k|| is at a point, at the least.

    At a client's own change the subgradient of its term is any vector of length w_k at most.
    """
    away = point - changes
    lengths = np.linalg.norm(away, axis=1)
    far = lengths > 1e-5 * lengths.max()
    pull = (weights[far, None] * away[far] / lengths[far, None]).sum(0)
    return float(max(np.linalg.norm(pull) - weights[~far].sum(), 0.0))


def norm_bounded(changes: np.ndarray, weights: np.ndarray, bound: float) -> np.ndarray:
    """The weighted sum of changes, each shortened to the bound."""
    return sum(
        w * change * min(1.0, bound / max(np.linalg.norm(change), 1e-300))
        for w, change in zip(weights, changes, strict=True)
    )


def trimmed_mean(values: np.ndarray, byzantine: int) -> np.ndarray:
    """Entry by entry the mean without the f largest and f smallest; values (K, ...)."""
    return np.sort(values, axis=0)[byzantine : len(values) - byzantine].mean(axis=0)


def mixed(changes: np.ndarray, byzantine: int) -> np.ndarray:
    """M (K, K): row k averages the K - f updates nearest to update k, of equals the first ones."""
    K = len(changes)
    M = np.zeros((K, K))
    for k, change in enumerate(changes):
        distances = ((changes - change) ** 2).sum(1)
        distances[k] = -1.0
        M[k, np.argsort(distances, kind="stable")[: K - byzantine]] = 1.0 / (K - byzantine)
    return M
