"""Inner products of the clients' changes of a product, from the factors alone.

With B A the current product of a layer and B_k A_k a client's, the change is

    D_k = B_k A_k - B A = E_k A + (B + E_k) F_k,   E_k = B_k - B,   F_k = A_k - A,

and every <D_i, D_j>_F follows from the entries of two Gram matrices of (K + 1) r columns, those of
[E_1 ... E_K, B] and of [F_1; ...; F_K; A]: with P_ij and Q_ij their r x r blocks, index 0 for B
and A, and <X, Y> the sum of products of entries,

    <D_i, D_j> = <P_ij, Q_00> + <P_ij + P_i0, Q_0j> + <P_ij + P_0j, Q_i0>
                 + <P_ij + P_i0 + P_0j + P_00, Q_ij>.

No term holds the current product itself, so the changes are right however small they are beside it
(from <B_i A_i, B_j A_j> they would cancel: at a drift of 1e-3 they lose six digits). How a client
factors its product does not matter: (B_k Q^-1, Q A_k) has the same change.

Cost: (K r)^2 (d_in + d_out) operations of float64 and a quarter more, in blocks of rows, so that
memory is that of the (K r)^2 Gram matrices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedgraft.adapter import LoraLayer

_BLOCK = 1024
"""Rows of d_out (or columns of d_in) that are widened to float64 at a time."""
_PARTS = 4
"""Parts of a Gram matrix's columns; of each only the rows up to it are computed."""


def gram_of_changes(layers: Sequence[LoraLayer], current: LoraLayer) -> Tensor:
    """Return <s D_i, s D_j>_F (K, K), float64, for one layer of K clients, s its scaling.

    Args:
        layers: the clients' factors, padded to the current layer's rank.
        current: the factors that the round started from.
    """
    K, r = len(layers), current.rank
    left = _gram([layer.B for layer in layers], current.B)
    right = _gram([layer.A.T for layer in layers], current.A.T)
    P, Q = (gram.reshape(K + 1, r, K + 1, r) for gram in (left, right))
    E, E_B, B_E, B = P[:K, :, :K], P[:K, :, K:], P[K:, :, :K], P[K:, :, K:]
    F, F_A, A_F, A = Q[:K, :, :K], Q[:K, :, K:], Q[K:, :, :K], Q[K:, :, K:]
    products = (E * A).sum((1, 3))
    products += ((E + E_B) * A_F).sum((1, 3)) + ((E + B_E) * F_A).sum((1, 3))
    products += ((E + E_B + B_E + B) * F).sum((1, 3))
    return current.scaling**2 * _symmetric(products)


def norms_of_changes(layers: Sequence[LoraLayer], current: LoraLayer) -> Tensor:
    """Return ||s D_k||_F^2 (K), float64: the Gram matrix's diagonal at a K-th of its cost.

    With D_k = [E_k, B + E_k] [A; F_k] it is <L^T L, R R^T> for those two, of 2 r columns and rows.

    Args:
        layers: the clients' factors, padded to the current layer's rank.
        current: the factors that the round started from.
    """
    B, A = current.B.double(), current.A.double()
    found = []
    for layer in layers:
        left = torch.cat([layer.B.double() - B, layer.B.double()], dim=1)
        right = torch.cat([A, layer.A.double() - A])
        found.append(((left.T @ left) * (right @ right.T)).sum().clamp(min=0.0))
    return current.scaling**2 * torch.stack(found)


def gram_of_values(values: Sequence[Tensor], current: Tensor) -> Tensor:
    """Return <v_i - v, v_j - v> (K, K), float64, for one tensor that is not LoRA."""
    changes = torch.stack([(value.double() - current.double()).flatten() for value in values])
    return _symmetric(changes @ changes.T)


def squared_distances(gram: Tensor) -> Tensor:
    """Return ||D_i - D_j||^2 (K, K) from the Gram matrix of changes: symmetric, 0 where rounding.

    Equal changes have distance 0, whatever order their sums ran in.
    """
    squares = gram.diagonal()
    both = squares[:, None] + squares
    distances = both - 2.0 * gram
    # sums of (K r)^2 products are off by a few hundred times eps at the worst
    return torch.where(distances > 1e-13 * both, distances, 0.0)


def _gram(factors: Sequence[Tensor], current: Tensor) -> Tensor:
    """Return the Gram matrix of the columns of [X_1 - X, ..., X_K - X, X], each (d, r)."""
    columns = (len(factors) + 1) * current.shape[1]
    total = torch.zeros(columns, columns, dtype=torch.float64, device=current.device)
    part = -(-columns // _PARTS)
    for start in range(0, len(current), _BLOCK):
        rows = slice(start, start + _BLOCK)
        base = current[rows].double()
        block = torch.cat([*(factor[rows].double() - base for factor in factors), base], dim=1)
        for end in range(part, columns + part, part):
            some = slice(end - part, end)
            total[:end, some].addmm_(block[:, :end].T, block[:, some])
    return total.triu() + total.triu(1).T


def _symmetric(gram: Tensor) -> Tensor:
    return 0.5 * (gram + gram.T)
