"""Robust PCA: split a tall matrix into a low-rank and a sparse part.

Principal component pursuit,

    minimise ||L||_* + lambda ||S||_1 subject to L + S = M,   lambda = 1 / sqrt(max(n, K)),

"Robust Principal Component Analysis?"
Emmanuel J. Candès, Xiaodong Li, Yi Ma, John Wright. Journal of the ACM 2011.
https://arxiv.org/abs/0912.3599 (theorem 1.1, algorithm 1)

by alternating directions on the augmented Lagrangian, with U = Y / mu:

    L <- singular values of X = M - S + U, less 1 / mu
    R <- M - L' + U,   L' = alpha L + (1 - alpha) (M - S)
    S <- entries of R, less lambda / mu;   U <- R - S, which is R clipped to +-lambda / mu.

alpha = 1 is the paper; 1.7 is over-relaxation, which saves a quarter of the steps:

"Distributed Optimization and Statistical Learning via the Alternating Direction Method of
Multipliers"
Stephen Boyd, Neal Parikh, Eric Chu, Borja Peleato, Jonathan Eckstein. Foundations and Trends in
Machine Learning 2011. (section 3.4.3)

For K columns and n >> K rows no SVD of that size is taken: the K x K Gram matrix
X^T X = V diag(sigma^2) V^T gives L = X P with P = V diag(max(0, 1 - 1 / (mu sigma))) V^T, and

    R <- M + (2 - alpha) U - X Q,   Q = alpha P - (alpha - 1) I.

S, U and X all follow from R, so that one pass over blocks of rows does a whole step and sums the
next Gram matrix, in 4 n K^2 operations. Blocks are float32, the K x K matrices float64.

Where it differs. The paper keeps mu at n K / (4 ||M||_1), which takes hundreds of steps on tall
matrices; here it is 3 over the root mean square of the columns' norms. Some thirty steps bring the
change of R below 1e-3 ||M||, with S some 5e-3 ||M|| from the minimum's at the most. S and U
change by no more than R, so ||M - L - S|| and the change of S, the residuals of section 3.3, are
below that too. Letting mu grow (the inexact method, arXiv:1009.5055, rho = 1.5) leaves an error of
0.02 to 0.4.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TOLERANCE = 1e-3
_STEPS = 300
_PENALTY, _RELAXED = 3.0, 1.7
_ROWS = 2048


def sparse_part(M: Tensor) -> Tensor:
    """Return S (n, K), float32; the low-rank part is M - S.

    Args:
        M: (n, K), n not much smaller than K.
    """
    n, K = M.shape
    largest = M.abs().max()
    R = torch.zeros_like(M, dtype=torch.float32)
    if largest == 0.0:
        return R
    M = (M / largest).float()  # squares of huge entries must not overflow
    gram = torch.zeros(K, K, dtype=torch.float64, device=M.device)
    for m in torch.split(M, _ROWS):
        gram += m.T @ m
    size = float(gram.trace().sqrt())
    mu = _PENALTY * K**0.5 / size
    bound = max(n, K) ** -0.5 / mu
    for _ in range(_STEPS):
        Q, gram = _relaxed_shrinkage(gram, mu).float(), torch.zeros_like(gram)
        moved = 0.0
        for m, r in zip(torch.split(M, _ROWS), torch.split(R, _ROWS), strict=True):
            u = r.clamp(-bound, bound)
            x = torch.sub(m, r).add_(u, alpha=2.0)
            made = torch.add(m, u, alpha=2.0 - _RELAXED).addmm_(x, Q, alpha=-1.0)
            moved += float(torch.linalg.vector_norm(r.sub_(made))) ** 2
            r.copy_(made)
            x = torch.sub(m, r).add_(r.clamp(-bound, bound), alpha=2.0)
            gram += x.T @ x
        if moved <= (_TOLERANCE * size) ** 2:
            break
    return torch.nn.functional.softshrink(R, bound).mul_(largest)


def _relaxed_shrinkage(gram: Tensor, mu: float) -> Tensor:
    """Return Q (K, K) from X^T X."""
    squares, V = torch.linalg.eigh(gram)
    values = mu * squares.clamp(min=0.0).sqrt()
    kept = torch.where(values > 1.0, 1.0 - 1.0 / values, 0.0)
    return torch.mm(V * (_RELAXED * kept - (_RELAXED - 1.0)), V.T)
