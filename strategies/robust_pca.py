"""Robust PCA: split a tall matrix into a low-rank and a sparse part.

Principal component pursuit,

    minimise ||L||_* + lambda ||S||_1 subject to L + S = M,   lambda = 1 / sqrt(max(n, K)),

"Robust Principal Component Analysis?"
Emmanuel J. Candès, Xiaodong Li, Yi Ma, John Wright. Journal of the ACM 2011.
https://arxiv.org/abs/0912.3599 (theorem 1.1, algorithm 1)

by alternating directions on the augmented Lagrangian:

    L <- singular values of M - S + Y / mu, less 1 / mu
    S <- entries of M - L + Y / mu, less lambda / mu
    Y <- Y + mu (M - L - S).

For K columns and n >> K rows no SVD of that size is taken: with X = M - S + Y / mu, the K x K Gram
matrix X^T X = V diag(sigma^2) V^T gives L = X V diag(max(0, 1 - 1 / (mu sigma))) V^T. And since the
new Y / mu is Y / mu + M - L clipped to +-lambda / mu, and S what the clip took off, one pass over
blocks of rows does a whole step and sums the next Gram matrix, in 4 n K^2 operations. Blocks are
float32, the K x K matrices float64.

Where it differs. The paper keeps mu at n K / (4 ||M||_1), which takes hundreds of steps on tall
matrices. Here mu starts from 1.25 / ||M||_2 and follows two residuals, r = ||M - L - S|| over ||M||
and s = mu ||S - S_before|| over ||Y||, up where r is the larger and down where s is, for the first
sixty steps (a mu that stays from then on makes it converge):

"Distributed Optimization and Statistical Learning via the Alternating Direction Method of
Multipliers"
Stephen Boyd, Neal Parikh, Eric Chu, Borja Peleato, Jonathan Eckstein. Foundations and Trends in
Machine Learning 2011. (section 3.4.1)

Some fifty steps bring both below 1e-3, with S within 5e-3 of the minimum's (relative to ||M||).
Letting mu grow without regard to s (the inexact method, arXiv:1009.5055, rho = 1.5) takes half as
many and leaves an error of 0.02 to 0.4.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_TOLERANCE = 1e-3
_STEPS, _SETTLED = 300, 60
_START, _CHANGE, _BALANCE = 1.25, 1.3, 2.0
_ROWS = 4096
_NEVER_ZERO = 1e-300


def sparse_part(M: Tensor) -> Tensor:
    """Return S (n, K), float32; the low-rank part is M - S.

    Args:
        M: (n, K), n not much smaller than K.
    """
    largest = M.abs().max()
    S = torch.zeros_like(M, dtype=torch.float32)
    if largest == 0.0:
        return S
    M = (M / largest).float()  # squares of huge entries must not overflow
    U = torch.zeros_like(M)  # Y / mu
    gram = M.double().T @ M.double()
    size = float(gram.trace().sqrt())
    penalty = max(M.shape) ** -0.5
    mu = following = _START / float(torch.linalg.eigvalsh(gram)[-1].sqrt())
    primal = dual = math.inf
    for step in range(_STEPS):
        mu = following
        if step < _SETTLED:  # by the last step's residuals: the next Gram matrix is summed in this
            following = _balanced(mu, primal, dual)
        shrink, gram = _shrinkage(gram, mu).float(), torch.zeros_like(gram)
        left = moved = clip = 0.0
        for start in range(0, len(M), _ROWS):  # in place where it can be: memory is what it costs
            m, s, u = (tensor[start : start + _ROWS] for tensor in (M, S, U))
            raised = m + u
            raised = torch.addmm(raised, raised - s, shrink, alpha=-1.0)
            clipped = raised.clamp(-penalty / mu, penalty / mu)
            sparse = raised.sub_(clipped)
            left += _square(u.sub_(clipped))
            moved += _square(s.sub_(sparse))
            clip += _square(clipped)
            u.copy_(clipped.mul_(mu / following))
            s.copy_(sparse)
            block = clipped.add_(m).sub_(sparse)
            gram += block.T @ block
        primal, dual = math.sqrt(left) / size, math.sqrt(moved / max(clip, _NEVER_ZERO))
        if max(primal, dual) <= _TOLERANCE:
            break
    return S * largest


def _shrinkage(gram: Tensor, mu: float) -> Tensor:
    """Return the (K, K) matrix that takes 1 / mu off the singular values of X, from X^T X."""
    squares, V = torch.linalg.eigh(gram)
    values = mu * squares.clamp(min=0.0).sqrt()
    kept = torch.where(values > 1.0, 1.0 - 1.0 / values, 0.0)
    return torch.mm(V * kept, V.T)


def _balanced(mu: float, primal: float, dual: float) -> float:
    """Return the next mu, from the residuals r and s."""
    if primal > _BALANCE * dual:
        return mu * _CHANGE
    return mu / _CHANGE if dual > _BALANCE * primal else mu


def _square(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor)) ** 2
