"""The low-rank SVD of a sum of products against numpy's SVD of the dense sum."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies import low_rank
from strategies.low_rank import Term, best_rank, orthonormal_rows, to_energy

many = settings(max_examples=150, deadline=None)


@st.composite
def sums(draw: st.DrawFn) -> list[Term]:
    """Any shapes, mixed ranks, d = r, zero terms and padding, equal columns, fp16 factors."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    d_out, d_in = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    dtype = draw(st.sampled_from([torch.float16, torch.float32, torch.float64]))
    kind = draw(st.sampled_from(["full", "padded", "deficient", "zero"]))
    terms: list[Term] = []
    for _ in range(draw(st.integers(1, 5))):
        r = draw(st.integers(1, 6))
        B = torch.from_numpy(rng.standard_normal((d_out, r))).to(dtype)
        A = torch.from_numpy(rng.standard_normal((r, d_in))).to(dtype)
        if kind == "padded":
            B[:, r // 2 :], A[r // 2 :] = 0.0, 0.0
        elif kind == "deficient":
            A[:] = A[0].clone()
        elif kind == "zero":
            B[:] = 0.0
        terms.append((draw(st.sampled_from([1.0, 0.3, -2.0])), B, A))
    return terms


def dense(terms: list[Term]) -> np.ndarray:
    return sum(c * (B.double().numpy() @ A.double().numpy()) for c, B, A in terms)


def check(terms: list[Term], B: np.ndarray, A: np.ndarray, rank: int) -> None:
    """B A is the best of its rank: it lacks the singular values after it, and no more."""
    M = dense(terms)
    values = np.linalg.svd(M, compute_uv=False)
    size = sum(abs(c) * float(b.double().norm() * a.double().norm()) for c, b, a in terms)
    assert B.shape == (len(M), rank) and A.shape == (rank, M.shape[1])
    error = np.linalg.norm(M - B @ A)
    assert error == pytest.approx(np.linalg.norm(values[rank:]), abs=1e-12 * size)
    lengths = np.linalg.norm(B, axis=0)
    expected = np.zeros(rank)
    expected[: min(rank, len(values))] = values[:rank]
    np.testing.assert_allclose(lengths, expected, atol=1e-12 * size)
    assert (A[range(rank), np.abs(A).argmax(1)] > -1e-6).all()


def check_bases(terms: list[Term], B: np.ndarray, A: np.ndarray) -> None:
    """The directions in use come first and are orthogonal on both sides."""
    size = sum(abs(c) * float(b.double().norm() * a.double().norm()) for c, b, a in terms)
    lengths = np.linalg.norm(B, axis=0)
    used = lengths > 0
    assert np.array_equal(used, A.any(1)) and not (~used[:-1] & used[1:]).any()
    np.testing.assert_allclose(A[used] @ A[used].T, np.eye(used.sum()), atol=1e-12)
    B_used = B[:, used] / lengths[used]
    # left vectors of small values are as far off as their values are small
    loose = 1e-12 * size / lengths[used].min(initial=1.0)
    np.testing.assert_allclose(B_used.T @ B_used, np.eye(used.sum()), atol=1e-12 + loose)


@many
@given(terms=sums(), rank=st.integers(1, 8))
def test_best_rank_is_the_svd_of_the_dense_sum(terms: list[Term], rank: int) -> None:
    B, A = best_rank(terms, rank)
    assert B.dtype == A.dtype == torch.float64
    check(terms, B.numpy(), A.numpy(), rank)
    check_bases(terms, B.numpy(), A.numpy())
    if rank > 1:  # nested: the cut is the best of the smaller rank
        check(terms, B[:, : rank - 1].numpy(), A[: rank - 1].numpy(), rank - 1)


@many
@given(
    terms=sums(),
    error=st.sampled_from([0.0, 1e-6, 0.1, 0.5]),
    max_rank=st.none() | st.integers(1, 6),
    beside=st.sampled_from([0.0, 1.0, 100.0]),
)
def test_to_energy_is_the_smallest_rank_that_holds_it(
    terms: list[Term], error: float, max_rank: int | None, beside: float
) -> None:
    found = to_energy(terms, 1.0 - error**2, max_rank, beside=beside)
    B, A = (factor.numpy() for factor in found)
    rank = len(A)
    check(terms, B, A, rank)
    check_bases(terms, B, A)
    values = np.linalg.svd(dense(terms), compute_uv=False)
    values[values < 1e-12 * values.max(initial=0.0)] = 0.0
    # 1 - e^2 is rounded, and e = 0 leaves what float32 cannot tell
    allowed = max(error, 1.5e-8) * np.sqrt((values**2).sum() + beside)
    if max_rank is None or rank < max_rank:
        assert np.linalg.norm(values[rank:]) <= allowed * (1 + 1e-3)
    if rank:
        assert np.linalg.norm(values[rank - 1 :]) > allowed * (1 - 1e-3)
    assert max_rank is None or rank <= max_rank


@many
@given(terms=sums())
def test_orthonormal_rows_keep_the_product_and_all_directions(terms: list[Term]) -> None:
    _, B, A = terms[0]
    made_B, made_A = (factor.numpy() for factor in orthonormal_rows(B, A))
    assert made_B.shape == B.shape and made_A.shape == A.shape
    check([(1.0, B, A)], made_B, made_A, len(A))
    rows = made_A[made_A.any(1)]
    assert len(rows) == min(A.shape)
    np.testing.assert_allclose(rows @ rows.T, np.eye(len(rows)), atol=1e-12)
    onto_rows = A.double().numpy() @ rows.T @ rows
    np.testing.assert_allclose(onto_rows, A.double().numpy(), atol=1e-12 * float(A.norm()))


def test_by_hand() -> None:
    """3 e1 e2^T - 4 e2 e1^T, in two terms of which one is padded."""
    eye = torch.eye(3)
    padded = torch.zeros(3, 2)
    padded[:, 0] = eye[:, 1]
    terms = [(3.0, eye[:, :1], eye[1:2]), (-4.0, padded, torch.cat([eye[:1], torch.zeros(1, 3)]))]
    B, A = best_rank(terms, 3)
    assert A.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert B.tolist() == [[0, 3, 0], [-4, 0, 0], [0, 0, 0]]
    # 16 of 25
    assert len(to_energy(terms, 0.64)[1]) == 1 and len(to_energy(terms, 0.65)[1]) == 2
    assert len(to_energy(terms, 1.0, max_rank=1)[1]) == 1
    assert len(to_energy([(1.0, torch.zeros(3, 2), torch.ones(2, 4))], 1.0)[1]) == 0


# More columns and sides than the exact SVD takes


def large(spectrum: str) -> list[Term]:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape)).float()

    A, B = normal(8, 160), normal(150, 8)
    if spectrum == "flat":
        return [(0.05, normal(150, 8), normal(8, 160)) for _ in range(18)]
    return [(0.05, B + 0.3 * normal(150, 8), A + 0.3 * normal(8, 160)) for _ in range(18)]


# best: how much of the error is above that of the best approximation. Drifting clients leave a gap
# behind the rank, and the Krylov spaces converge; where all values are alike they come near.
@pytest.mark.parametrize(("spectrum", "best"), [("drift", 1e-9), ("flat", 5e-3)])
def test_randomised_svd_comes_near_the_best(
    monkeypatch: pytest.MonkeyPatch, spectrum: str, best: float
) -> None:
    terms = large(spectrum)
    M = dense(terms)
    values = np.linalg.svd(M, compute_uv=False)
    monkeypatch.setattr(low_rank, "_EXACT", 100)
    monkeypatch.setattr(low_rank, "_by_qr", None)  # neither is the dense SVD's: n < d
    B, A = (factor.numpy() for factor in best_rank(terms, 8))
    assert np.linalg.norm(M - B @ A) <= np.linalg.norm(values[8:]) * (1 + best)
    np.testing.assert_allclose(A @ A.T, np.eye(8), atol=1e-12)
    again, _ = best_rank(terms, 8)
    assert np.array_equal(again.numpy(), B)


def test_the_energy_behind_a_randomised_svd_is_that_of_the_whole_sum(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The eight directions hold 99.56% of it, which only the whole sum's norm tells."""
    terms = large("drift")
    M = dense(terms)
    values = np.linalg.svd(M, compute_uv=False)
    shares = (values**2).cumsum() / (values**2).sum()
    monkeypatch.setattr(low_rank, "_EXACT", 100)
    for rank in (5, 8):
        assert len(to_energy(terms, shares[rank - 1] - 1e-6, max_rank=12)[1]) == rank
        assert len(to_energy(terms, shares[rank - 1] + 1e-6, max_rank=12)[1]) == rank + 1
    assert len(to_energy(terms, 1.0, max_rank=12)[1]) == 12
