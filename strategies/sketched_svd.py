"""The leading singular vectors of a matrix that nobody holds, from two linear sketches of it.

"Practical Sketching Algorithms for Low-Rank Matrix Approximation"
Joel A. Tropp, Alp Yurtsever, Madeleine Udell, Volkan Cevher. SIAM Journal on Matrix Analysis and
Applications 2017. https://arxiv.org/abs/1609.00048 (algorithms 4 and 7)

From Y = G Omega (d_out, m) and W = Psi G (l, d_in), Omega and Psi random and known to all, with
Q an orthonormal basis of Y,

    G ~ Q (Psi Q)^+ W,

which is G Omega (Psi G Omega)^+ Psi G without its cancellations. Sketches are linear in G, so the
sketch of a sum is the sum of sketches, and clients whose gradients add up to G need show no more
than that. As the paper advises, m = 2 r + 1 and l = 2 m + 1; where a side is no longer than that,
the sketch is the whole matrix and the result exact.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedgraft.seeds import stream


def sketch_sizes(rank: int, d_out: int, d_in: int) -> tuple[int, int]:
    """Return m and l for the `rank` leading singular vectors of a (d_out, d_in) matrix."""
    m = min(2 * rank + 1, d_in)
    return m, min(2 * m + 1, d_out)


def probes(seed: int, name: str, rank: int, d_out: int, d_in: int) -> tuple[Tensor, Tensor]:
    """Return Omega (d_in, m) and Psi (l, d_out), float32, the same on every machine.

    Args:
        seed: the run's.
        name: of the matrix; each has its own probes.
        rank: how many singular vectors are wanted.
        d_out, d_in: the matrix's shape.
    """
    m, rows = sketch_sizes(rank, d_out, d_in)
    omega = _normal(seed, f"sketch from the right: {name}", d_in, m)
    psi = _normal(seed, f"sketch from the left: {name}", d_out, rows)
    return omega, psi.T.contiguous()


def _normal(seed: int, purpose: str, size: int, columns: int) -> Tensor:
    """Return a standard normal (size, columns); the identity where it would be square."""
    if columns == size:
        return torch.eye(size)
    return torch.from_numpy(stream(seed, purpose).standard_normal((size, columns), np.float32))


def leading(Y: Tensor, W: Tensor, psi: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (d_out, n), S (n) and V^T (n, d_in) of the sketched matrix, in float64.

    n = min(rank, d_out, d_in); U and V have orthonormal columns, S falls and is not negative.

    Args:
        Y: G Omega.
        W: Psi G.
        psi: the Psi that W was made with.
        rank: how many are wanted.
    """
    Q, _ = torch.linalg.qr(Y.double())
    core = torch.linalg.pinv(psi.double() @ Q) @ W.double()
    left, S, V = torch.linalg.svd(core, full_matrices=False)
    n = min(rank, Y.shape[0], W.shape[1])
    return (Q @ left)[:, :n], S[:n], V[:n]
