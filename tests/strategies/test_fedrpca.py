"""FedRPCA: robust PCA against a dense solver, and what the rule makes of its two parts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from federations import LAYER, Federation, federation, federations
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from strategies.robust_pca import sparse_part

some = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def shrunk(X: np.ndarray, threshold: float) -> np.ndarray:
    return np.sign(X) * np.maximum(np.abs(X) - threshold, 0.0)


def objective(M: np.ndarray, S: np.ndarray) -> float:
    """||M - S||_* + lambda ||S||_1."""
    nuclear = np.linalg.svd(M - S, compute_uv=False).sum()
    return float(nuclear + np.abs(S).sum() / math.sqrt(max(M.shape)))


def pursuit(M: np.ndarray) -> np.ndarray:
    """S by algorithm 1 of Candès et al. in float64, with full SVDs and a fixed mu, to 1e-9."""
    penalty, mu = 1.0 / math.sqrt(max(M.shape)), M.size / (4.0 * np.abs(M).sum())
    S, Y = np.zeros_like(M), np.zeros_like(M)
    for _ in range(5000):
        U, values, V = np.linalg.svd(M - S + Y / mu, full_matrices=False)
        L = (U * shrunk(values, 1.0 / mu)) @ V
        before, S = S, shrunk(M - L + Y / mu, penalty / mu)
        Y = Y + mu * (M - L - S)
        size = 1e-9 * np.linalg.norm(M)
        if np.linalg.norm(M - L - S) < size and np.linalg.norm(S - before) < size:
            break
    return S


def noisy(seed: int, rows: int, columns: int, tails: float) -> np.ndarray:
    """A common column and, for each column, noise of Student's t: many outliers for few degrees."""
    rng = np.random.default_rng(seed)
    common = rng.standard_normal((rows, 1))
    return common + 0.7 * rng.standard_t(tails, (rows, columns))


@some
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(20, 120),
    columns=st.integers(2, 8),
    tails=st.sampled_from([2.0, 30.0]),
    scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e30]),
)
def test_robust_pca_is_the_dense_solvers(
    seed: int, rows: int, columns: int, tails: float, scale: float
) -> None:
    """By the objective, to the tolerance at which it stops: the minimum may be flat."""
    M = noisy(seed, rows, columns, tails)
    S = sparse_part(torch.from_numpy(scale * M)).double().numpy() / scale
    assert objective(M, S) <= objective(M, pursuit(M)) * (1 + 6e-3)


def test_a_low_rank_and_a_sparse_part_are_told_apart() -> None:
    """400 x 30 of rank 1 with 3% of the entries changed by far more: recovered, theorem 1.1."""
    rng = np.random.default_rng(1)
    L = rng.standard_normal((400, 1)) @ rng.standard_normal((1, 30))
    true = np.where(rng.random(L.shape) < 0.03, 10.0 * rng.standard_normal(L.shape), 0.0)
    S = sparse_part(torch.from_numpy(L + true)).double().numpy()
    assert np.linalg.norm(S - true) <= 0.01 * np.linalg.norm(L + true)
    assert np.linalg.norm(L) > 0.3 * np.linalg.norm(true)  # neither part is negligible


def test_rows_in_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    M = torch.from_numpy(noisy(2, 50, 4, 3.0))
    whole = sparse_part(M)
    monkeypatch.setattr("strategies.robust_pca._ROWS", 7)
    torch.testing.assert_close(sparse_part(M), whole, rtol=1e-3, atol=1e-4)


def test_nothing_and_one_entry() -> None:
    M = torch.zeros(30, 5)
    assert not sparse_part(M).any()
    M[3, 2] = 5.0
    torch.testing.assert_close(sparse_part(M), M, rtol=1e-3, atol=1e-3)


# The rule


def combined(fed: Federation, beta: float | None) -> dict[str, torch.Tensor]:
    return fed.aggregate("fedrpca", beta=beta).adapter.tensors()


@some
@given(fed=federations())
def test_beta_1_is_fedavg(fed: Federation) -> None:
    assert (
        fed.aggregate("fedrpca", beta=1.0).adapter.digest()
        == fed.aggregate("fedavg").adapter.digest()
    )


def test_one_client_stands_as_it_is() -> None:
    fed = federation(np.random.default_rng(3), d_out=5, d_in=4, r=2, weights=[3.0])
    _, tensors = fed.updates["client-0"]
    for name, tensor in combined(fed, None).items():
        assert torch.equal(tensor, tensors[name])


@pytest.mark.parametrize("beta", [0.0, 2.0, 3.5, None])
def test_the_sparse_parts_mean_is_scaled(beta: float | None) -> None:
    """Per factor, by the dense solver: current + sum p_k L_k + beta sum p_k S_k."""
    fed = federation(np.random.default_rng(4), d_out=30, d_in=20, r=2, weights=[1.0, 4.0, 2.0, 3.0])
    made, now = combined(fed, beta), fed.current.tensors()
    shares = np.array([1.0, 4.0, 2.0, 3.0]) / 10.0
    for name in (f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"):
        current = now[name].double().numpy().ravel()
        M = np.stack(
            [t[name].double().numpy().ravel() - current for _, t in fed.updates.values()], 1
        )
        S = pursuit(M)
        scale = min(np.linalg.norm(M) / np.linalg.norm(S), 10.0) if beta is None else beta
        expected = current + (M - S) @ shares + scale * (S @ shares)
        error = np.linalg.norm(made[name].double().numpy().ravel() - expected)
        # within the solver's tolerance; with four columns the minimum is sharp enough
        assert error <= 0.03 * max(abs(scale - 1.0), 1.0) * np.linalg.norm(M @ shares)
        assert np.linalg.norm(S @ shares) > 0.1 * np.linalg.norm(M @ shares)


def test_extras_are_averaged_whatever_beta_is() -> None:
    fed = federation(np.random.default_rng(5), d_out=5, d_in=4, r=2, weights=[1.0, 2.0])
    plain = fed.aggregate("fedavg").adapter.extras["classifier.weight"]
    assert torch.equal(combined(fed, 3.0)["classifier.weight"], plain)


def test_huge_and_equal_updates_stay_finite() -> None:
    fed = federation(np.random.default_rng(6), d_out=5, d_in=4, r=2, weights=[1.0] * 3)
    weight, tensors = fed.updates["client-0"]
    for scale in (1e15, 0.0):
        fed.updates["client-0"] = (weight, {n: scale * t for n, t in tensors.items()})
        assert all(t.isfinite().all() for t in combined(fed, None).values())
    fed.updates.update(dict.fromkeys(fed.updates, fed.updates["client-1"]))
    assert all(t.isfinite().all() for t in combined(fed, None).values())
