"""The best low-rank approximation of a sum of low-rank products, without forming the sum.

M = sum c_k B_k A_k is d_out x d_in, of rank n at most, n the columns of all B_k together; columns
that padding left empty are skipped. Results are float64.

- n below both sides: with Q_B R_B = qr([c_k B_k]) and Q_A R_A = qr([A_k]^T), the SVD of R_B R_A^T
  (n, n) makes that of M, in about 2 n^2 (d_in + d_out) operations: Q_B and Q_A stay Householder
  reflections, and only the singular vectors that are kept go through them.
- n not below: M is no larger than its factors, and its own SVD is taken.
- n and both sides large, and few ranks wanted: a randomised SVD by block Krylov spaces, which reads
  the terms one by one, several times, and keeps nothing of their size. From a random Omega
  (d_in, m) it takes the space of M Omega, (M M^T) M Omega, (M M^T)^2 M Omega, ... and in it the
  best approximation of M:

  "Finding Structure with Randomness: Probabilistic Algorithms for Constructing Approximate Matrix
  Decompositions", Nathan Halko, Per-Gunnar Martinsson, Joel Tropp. SIAM Review 2011.
  https://arxiv.org/abs/0909.4061 (algorithms 4.4 and 5.1), with the spaces of all powers kept as in
  "Randomized Block Krylov Methods for Stronger and Faster Approximate Singular Value
  Decomposition", Cameron Musco, Christopher Musco. NeurIPS 2015.
  https://arxiv.org/abs/1504.05477 (algorithm 2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fedgraft.seeds import stream

Term = tuple[float, Tensor, Tensor]
"""One product of a sum: its coefficient c_k, B_k (d_out, r_k) and A_k (r_k, d_in)."""

_Basis = Callable[[Tensor], Tensor]
"""Takes coordinates in an orthonormal basis (n, m) to vectors (d, m)."""

_EXACT = 384
"""Up to so many columns, or rows, an exact SVD takes a fraction of a second."""
_STACK = 8
"""So many terms are stacked at a time."""
_OVERSAMPLING = 8
_POWERS = 3


def best_rank(terms: Sequence[Term], rank: int) -> tuple[Tensor, Tensor]:
    """Return B = U S (d_out, rank) and A = V^T (rank, d_in), the best approximation of that rank.

    The rows of A are orthonormal and in falling order of their singular values, so that the first
    of them are the best approximation of every smaller rank. Where M has fewer directions than
    `rank`, the rest of both factors is zero. The largest entry of each row of A is positive: an SVD
    leaves signs open, and they must be the same on every machine.

    Args:
        terms: at least one, all of the same d_out and d_in, of any ranks.
        rank: the rank of the result.
    """
    M = _Sum.of(terms)
    found_B, found_A = _svd(M, rank).first(rank)
    B, A = found_B.new_zeros(M.d_out, rank), found_A.new_zeros(rank, M.d_in)
    B[:, : len(found_A)], A[: len(found_A)] = found_B, found_A
    return B, A


def to_energy(
    terms: Sequence[Term], energy: float, max_rank: int | None = None, *, beside: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return B = U S and A = V^T of the smallest rank that holds a share of the energy.

    The energy of M is ||M||_F^2, the sum of its squared singular values: a share of 1 - e^2 leaves
    a relative error of at most e. The rank is 0 where M is zero.

    Args:
        terms: as for `best_rank`.
        energy: the share, above 0 and at most 1; 1 leaves an error of at most 1.5e-8, which is
            less than float32 can tell.
        max_rank: the rank is no larger than this, whatever is lost.
        beside: the energy of what M is added to; the share is of both together.
    """
    M = _Sum.of(terms)
    svd = _svd(M, max_rank)
    S = svd.S
    lost = S.square().flip(0).cumsum(0).flip(0)  # the energy from each value on
    if energy < 1.0 and M.randomised(max_rank):  # which saw a part of M only
        lost = lost + max(M.energy() - float(lost[:1].sum()), 0.0)
    allowed = max(1.0 - energy, torch.finfo(S.dtype).eps) * (lost[:1] + beside)
    rank = int((lost > allowed).sum())
    if max_rank is not None:
        rank = min(rank, max_rank)
    return svd.first(rank)


def uncut(terms: Sequence[Term]) -> tuple[Tensor, Tensor] | None:
    """Return B and A whose product is M, with nothing cut off, where a decomposition is slow.

    That is where M is large both ways and has many columns. It is then probably of rank n, and at
    its simplest as B = [c_k B_k] and A = [A_k]; or of full rank, and at its simplest as M itself
    beside an identity. None for any other sum.
    """
    M = _Sum.of(terms)
    smallest = min(M.d_out, M.d_in)
    if min(M.columns, smallest) <= _EXACT:
        return None
    if M.columns < smallest:
        return torch.cat([c * B for c, B, _ in M.terms], 1), torch.cat([A for _, _, A in M.terms])
    whole = M.dense()
    eye = torch.eye(smallest, dtype=whole.dtype, device=whole.device)
    return (whole, eye) if M.d_in == smallest else (eye, whole)


def orthonormal_rows(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Return B and A of the same product and shapes, the rows of A orthonormal: B = U S, A = V^T.

    Directions of A that B does not use come last and stay, so that B can grow into them; only rows
    beyond d_in, of which no more can be orthonormal, are zero. Signs are as in `best_rank`.

    Args:
        B: of shape (d_out, r).
        A: of shape (r, d_in).
    """
    left, R_left = torch.linalg.qr(B.double())
    right, R_right = torch.linalg.qr(A.double().T)
    U, S, V = torch.linalg.svd(R_left @ R_right.T, full_matrices=True)  # r x r at most
    V = V @ right.T
    signs = _signs(V)
    made_B, made_A = torch.zeros_like(B.double()), torch.zeros_like(A.double())
    made_B[:, : len(S)] = (left @ U[:, : len(S)]) * (S * signs[: len(S)])
    made_A[: len(V)] = signs[:, None] * V
    return made_B, made_A


@dataclass(frozen=True)
class _Sum:
    """M as its terms, without the columns that are zero."""

    terms: tuple[Term, ...]
    d_out: int
    d_in: int

    @classmethod
    def of(cls, terms: Sequence[Term]) -> _Sum:
        d_out, d_in = terms[0][1].shape[0], terms[0][2].shape[1]
        live: list[Term] = []
        for c, B, A in terms:
            used = B.any(0) & A.any(1)
            live.append((c, B, A) if bool(used.all()) else (c, B[:, used], A[used]))
        return cls(tuple(live), d_out, d_in)

    @property
    def columns(self) -> int:
        return sum(len(A) for _, _, A in self.terms)

    def randomised(self, wanted: int | None) -> bool:
        """Whether `wanted` values are so few of so many that the exact SVD is not worth it."""
        smallest = min(self.columns, self.d_out, self.d_in)
        return wanted is not None and smallest > max(_EXACT, 4 * (wanted + _OVERSAMPLING))

    def times(self, X: Tensor) -> Tensor:
        """Return M X (d_out, m) for X (d_in, m), in X's precision."""
        total = X.new_zeros(self.d_out, X.shape[1])
        for c, B, A in self._in(X.dtype):
            total.addmm_(B, c * (A @ X))
        return total

    def transposed_times(self, Y: Tensor) -> Tensor:
        """Return M^T Y (d_in, m) for Y (d_out, m), in Y's precision."""
        total = Y.new_zeros(self.d_in, Y.shape[1])
        for c, B, A in self._in(Y.dtype):
            total.addmm_(A.T, c * (B.T @ Y))
        return total

    def _in(self, dtype: torch.dtype) -> Iterator[tuple[float | Tensor, Tensor, Tensor]]:
        """Yield all terms in one precision.

        Those that must be copied for it are stacked, which halves the time of their products; c is
        then a column.
        """
        if all(B.dtype == A.dtype == dtype for _, B, A in self.terms):
            yield from self.terms
            return
        for start in range(0, len(self.terms), _STACK):
            part = self.terms[start : start + _STACK]
            c = torch.cat([A.new_full((len(A), 1), c, dtype=dtype) for c, _, A in part])
            B = torch.cat([B for _, B, _ in part], dim=1)
            yield c, B.to(dtype), torch.cat([A for _, _, A in part]).to(dtype)

    def dense(self) -> Tensor:
        """Return M itself, for when it is no larger than its factors."""
        device = self.terms[0][1].device
        total = torch.zeros(self.d_out, self.d_in, dtype=torch.float64, device=device)
        for c, B, A in self.terms:
            total.addmm_(B.double(), A.double(), alpha=c)
        return total

    def energy(self) -> float:
        """Return ||M||_F^2 as sum c_k <B_k, M A_k^T>."""
        parts = (c * (B.double() * self.times(A.double().T)).sum() for c, B, A in self.terms)
        return float(sum(parts))


@dataclass(frozen=True)
class _Svd:
    """The SVD of M in two bases: M = left(U) diag(S) right(V)^T.

    Attributes:
        U, V: coordinates of the singular vectors, one a column.
        S: the singular values, in falling order.
        left, right: the bases.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    left: _Basis
    right: _Basis

    def first(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return B = U S and A = V^T of the first `rank` values, or of all if they are fewer."""
        A = self.right(self.V[:, :rank]).T
        signs = _signs(A)
        return self.left(self.U[:, :rank]) * (signs * self.S[:rank]), signs[:, None] * A


def _svd(M: _Sum, wanted: int | None) -> _Svd:
    """Return the SVD of M without values that are rounding; at least the `wanted` first of it."""
    if M.randomised(wanted):
        assert wanted is not None
        found = _by_krylov(M, wanted)
    elif M.columns < min(M.d_out, M.d_in):
        found = _by_qr(M)
    else:
        U, S, V = torch.linalg.svd(M.dense(), full_matrices=False)
        found = _Svd(U, S, V.T, _as_it_is, _as_it_is)
    rounding = max(M.columns, M.d_out, M.d_in) * torch.finfo(found.S.dtype).eps
    kept = int((rounding * found.S[:1] < found.S).sum())
    return replace(found, S=found.S[:kept], U=found.U[:, :kept], V=found.V[:, :kept])


def _by_qr(M: _Sum) -> _Svd:
    left, R_left = _qr(torch.cat([c * B.double() for c, B, _ in M.terms], dim=1))
    right, R_right = _qr(torch.cat([A.double() for _, _, A in M.terms]).T)
    U, S, V = torch.linalg.svd(R_left @ R_right.T)
    return _Svd(U, S, V.T, left, right)


def _by_krylov(M: _Sum, wanted: int) -> _Svd:
    """Return the SVD of M within the Krylov spaces of a random block.

    float32 is enough to find the spaces (an error of e in them costs e^2 of the energy in them),
    and twice as fast; what is done in them is float64.
    """
    normal = stream(0, "randomised SVD").standard_normal((M.d_in, wanted + _OVERSAMPLING))
    random = torch.from_numpy(normal).to(M.terms[0][1].device, torch.float32)
    # orthonormal after each step, or all columns would turn to the largest direction
    block, _ = torch.linalg.qr(M.times(random))
    blocks = [block]
    for _ in range(_POWERS):
        across, _ = torch.linalg.qr(M.transposed_times(block))
        block, _ = torch.linalg.qr(M.times(across))
        blocks.append(block)
    space, _ = torch.linalg.qr(torch.cat(blocks, dim=1).double())
    right, R = _qr(M.transposed_times(space))
    U, S, V = torch.linalg.svd(R.T)
    return _Svd(U, S, V.T, partial(torch.mm, space), right)


def _qr(X: Tensor) -> tuple[_Basis, Tensor]:
    """Return the QR decomposition of a tall matrix, the first as a basis that is never formed."""
    reflections, scales = torch.geqrf(X)
    R = reflections[: X.shape[1]].triu()

    def basis(coordinates: Tensor) -> Tensor:
        vectors = X.new_zeros(len(X), coordinates.shape[1])
        vectors[: len(coordinates)] = coordinates
        return torch.ormqr(reflections, scales, vectors)

    return basis, R


def _as_it_is(coordinates: Tensor) -> Tensor:
    return coordinates


def _signs(V: Tensor) -> Tensor:
    """Return the sign of the largest entry of each row (m); of the first where several are."""
    size = V.abs()
    # entries that rounding alone tells apart count as equal
    largest = (size >= (1.0 - 1e-6) * size.amax(1, keepdim=True)).int().argmax(1)
    return V.gather(1, largest[:, None])[:, 0].sign()
