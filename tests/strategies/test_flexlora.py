"""FlexLoRA with different ranks: scalings inside the sum, cuts, and rank-aware weights."""

from __future__ import annotations

from dataclasses import replace

import dense
import numpy as np
import pytest
import torch
from federations import LAYER, Federation, federation, federations, numpy_of, of_ranks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedgraft.adapter import Adapter, LoraLayer
from fedgraft.config import Config
from fedgraft.errors import ConfigError
from strategies.ranks import by_rank, cut_adapter
from strategies.registry import build_rule

many = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def best(matrix: np.ndarray, rank: int) -> np.ndarray:
    U, S, V = np.linalg.svd(matrix, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ V[:rank]


def size_of(clients: list[dense.Client]) -> float:
    return max(np.linalg.norm(c.B) * np.linalg.norm(c.A) for c in clients)


@many
@given(fed=federations(), data=st.data())
def test_mixed_ranks_get_the_best_adapter_of_their_own_rank(
    fed: Federation, data: st.DataObject
) -> None:
    """DW = sum p_k alpha / r_k B_k A_k; a client of rank m holds alpha / m B A = best_m(DW)."""
    rank = fed.current.layers[LAYER].rank
    drawn = st.integers(1, rank)
    ranks = [data.draw(drawn) for _ in fed.updates]
    fed, clients = of_ranks(fed, ranks)
    rule = build_rule("flexlora")
    made = fed.aggregate(rule).adapter
    DW = dense.ideal(clients)
    for m in range(1, rank + 1):
        held = cut_adapter(made, m, rule.cut, by_rank).layers[LAYER]
        assert held.rank == m and held.scaling == pytest.approx(2.0 * rank / m)
        A, B = numpy_of(held)
        np.testing.assert_allclose(held.scaling * B @ A, best(DW, m), atol=1e-6 * size_of(clients))


@many
@given(fed=federations(), data=st.data())
def test_rank_aware_weights_are_shares_among_those_who_have_the_slice(
    fed: Federation, data: st.DataObject
) -> None:
    rank = fed.current.layers[LAYER].rank
    ranks = [data.draw(st.integers(1, rank)) for _ in fed.updates]
    fed, clients = of_ranks(fed, ranks)
    layer = fed.aggregate("flexlora", **{"rank-aware": True}).adapter.layers[LAYER]
    total = np.zeros((len(layer.B), layer.A.shape[1]))
    for i in range(rank):
        have = [c for c, own in zip(clients, ranks, strict=True) if own > i]
        shares = sum(c.share for c in have)
        for c in have:
            total += c.share / shares * np.outer(c.B[:, i], c.A[i])
    A, B = numpy_of(layer)
    np.testing.assert_allclose(
        layer.scaling * B @ A, best(total, rank), atol=1e-6 * size_of(clients)
    )


def test_rank_aware_by_hand() -> None:
    """Three equal clients, one of rank 2 with slices of 3 and 1, two of rank 1 with a slice of 3.

    alpha = 2, so a client of rank 1 has the scaling 2 and one of rank 2 the scaling 1, with B as
    if all had 1: (6 + 6 + 3) / 3 = 5 on e1 e1^T. The second slice is 1 / 3 on e2 e2^T by the
    paper's weights, and 1 by the weights of those who have it.
    """
    A, B = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"
    large = {A: torch.eye(2), B: torch.diag(torch.tensor([3.0, 1.0]))}
    small = {A: torch.eye(2), B: torch.diag(torch.tensor([3.0, 7.0]))}
    current = Adapter({LAYER: LoraLayer(torch.eye(2), torch.zeros(2, 2), 1.0)})
    updates = {"a": (1.0, small), "b": (1.0, large), "c": (1.0, small)}
    fed, _ = of_ranks(Federation(current, updates), [1, 2, 1])
    plain = fed.aggregate("flexlora").adapter.layers[LAYER]
    aware = fed.aggregate("flexlora", **{"rank-aware": True}).adapter.layers[LAYER]
    torch.testing.assert_close(plain.product(), torch.diag(torch.tensor([5.0, 1 / 3])))
    torch.testing.assert_close(aware.product(), torch.diag(torch.tensor([5.0, 1.0])))
    torch.testing.assert_close(plain.A, torch.eye(2))


def test_rank_collapse_and_its_cure() -> None:
    """Clients that train nothing: by the paper's weights the large client's ranks fade away.

    Four clients of rank 1 and one of rank 4 send back what they got. Of the directions beyond the
    first a fifth is left after each round; rank-aware weights leave all.
    """
    start = torch.linalg.qr(torch.from_numpy(np.random.default_rng(0).standard_normal((6, 4))))[0]
    for aware, left in ((False, 0.2**3), (True, 1.0)):
        rule = build_rule("flexlora", {"rank-aware": aware})
        layer = LoraLayer(start.T.float(), 2.0 * start.float(), 1.0)
        for _ in range(3):
            current = Adapter({LAYER: layer})
            sent = [cut_adapter(current, rank, rule.cut, by_rank) for rank in (1, 1, 1, 1, 4)]
            updates = {str(k): (1.0, adapter.tensors()) for k, adapter in enumerate(sent)}
            fed, _ = of_ranks(Federation(current, updates), [1, 1, 1, 1, 4])
            layer = fed.aggregate(rule).adapter.layers[LAYER]
        values = torch.linalg.svdvals(layer.product())
        torch.testing.assert_close(values[:4], 2.0 * torch.tensor([1.0, left, left, left]))


def test_ranks_without_energy_can_learn_again() -> None:
    """One client of rank 1: of the server's four ranks three get new random rows, and B = 0."""
    fed = federation(np.random.default_rng(1), d_out=7, d_in=9, r=4, weights=[1.0])
    fed, clients = of_ranks(fed, [1])
    layer = fed.aggregate("flexlora").adapter.layers[LAYER]
    A, B = numpy_of(layer)
    assert np.linalg.matrix_rank(A) == 4 and np.abs(A[1:]).max() <= 1 / 3
    assert not B[:, 1:].any()
    np.testing.assert_allclose(layer.scaling * B @ A, dense.ideal(clients), atol=1e-6)
    nothing = replace(fed.current.layers[LAYER], B=torch.zeros(7, 4))
    zero = {"0": (1.0, Adapter({LAYER: nothing}, fed.current.extras).tensors())}
    layer = replace(fed, updates=zero, ranks={}).aggregate("flexlora").adapter.layers[LAYER]
    assert not layer.B.any() and np.linalg.matrix_rank(numpy_of(layer)[0]) == 4


@pytest.mark.parametrize("name", ["flexlora", "flora", "fedsvd", "rolora"])
def test_optimizers_that_outlive_the_factors_are_refused(name: str) -> None:
    build_rule(name).check(Config())
    keep = Config().with_overrides({"train.optimizer-state": "keep"})
    with pytest.raises(ConfigError, match=f"under {name} ") as caught:
        build_rule(name).check(keep)
    assert "fedavg" in caught.value.remedy
    build_rule("fedex-lora").check(keep)
