"""The dense or naive computations that rules stand for, and what the two are compared by.

"By definition" makes a matrix a client, as a direct reading of a formula does; "in place" adds
every product to one matrix. All hold the updates in a list and stay in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from aggregation_workload import ROUND, Prepared
from torch import Tensor

from fedgraft.adapter import LoraLayer
from strategies.aggregation import Aggregated
from strategies.coordinatewise import Coordinatewise
from strategies.hetlora import HetLoRA
from strategies.krum import Krum
from strategies.lora_fair import LoRAFair, LoRAFairCosine
from strategies.lora_fair_cosine import CosineProblem
from strategies.norm_bounding import NormBounding
from strategies.rule import SurveyingRule, WeightedLayer

Made = tuple[Tensor, ...]
"""One tensor, or B and A, of which the product counts."""
Updates = Sequence[WeightedLayer]


@dataclass(frozen=True)
class Rival:
    """A dense or naive form of a rule, what it and the rule are compared by, and whether it must be
    far slower."""

    rule: str
    form: str
    dense: Callable[[Prepared], Made]
    ours: Callable[[Aggregated], Made]
    options: dict[str, Any] = field(default_factory=dict)
    target: bool = False


# The dense forms


def relative(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


def dense_of(made: Made) -> Tensor:
    return made[0] @ made[1] if len(made) == 2 else made[0]


def layer_of(work: Prepared) -> LoraLayer:
    (layer,) = work.current.layers.values()
    return layer


def held(work: Prepared) -> Updates:
    """All updates in a list."""
    (name,) = work.current.layers
    return list(work.spool.updates(name, layer_of(work), work.rule.plan(ROUND).train))


def means(updates: Updates, shares: Sequence[float] | None = None) -> tuple[Tensor, Tensor]:
    """Bbar and Abar."""
    given = torch.tensor(shares or [u.share for u in updates], dtype=torch.float64)
    p = given.to(updates[0].factors.A)
    B = torch.stack([u.factors.B for u in updates])
    A = torch.stack([u.factors.A for u in updates])
    return torch.einsum("k,kij->ij", p, B), torch.einsum("k,kij->ij", p, A)


def by_definition(updates: Updates) -> Tensor:
    """DW = sum p_k (B_k A_k)."""
    DW = sum(u.share * (u.factors.B @ u.factors.A) for u in updates)
    assert isinstance(DW, Tensor)
    return DW


def in_place(updates: Updates) -> Tensor:
    """DW, every product added to one matrix."""
    first = updates[0].factors
    DW = first.B.new_zeros(first.B.shape[0], first.A.shape[1])
    for u in updates:
        DW.addmm_(u.factors.B, u.factors.A, alpha=u.share)
    return DW


def list_means(work: Prepared) -> Made:
    return means(held(work))[:1]


def list_means_of_A(work: Prepared) -> Made:
    return means(held(work))[1:]


def stacked(updates: Updates) -> Tensor:
    """DW = [p_k B_k] [A_k], one product with K r inner columns."""
    left = torch.cat([u.share * u.factors.B for u in updates], dim=1)
    return left @ torch.cat([u.factors.A for u in updates])


def correction(updates: Updates, DW_of: Callable[[Updates], Tensor], lambda_rel: float) -> Tensor:
    """LoRA-FAIR's X = (DW - Bbar Abar) Abar^T (G + lambda I)^-1."""
    B, A = means(updates)
    G = A @ A.T
    shift = lambda_rel * G.trace() / len(G) * torch.eye(len(G)).to(G)
    X: Tensor = torch.linalg.solve(G + shift, (DW_of(updates) - B @ A) @ A.T, left=False)
    return X


def corrected(DW_of: Callable[[Updates], Tensor], work: Prepared) -> Made:
    """Bbar + X."""
    updates = held(work)
    assert isinstance(work.rule, LoRAFair)
    X = correction(updates, DW_of, work.rule.options.lambda_)
    return (means(updates)[0] + X,)


def cosine(work: Prepared) -> Made:
    """LoRA-FAIR's cosine, with H = DW Abar^T and ||DW|| from the dense DW."""
    updates = held(work)
    assert isinstance(work.rule, LoRAFairCosine)
    B, A = (mean.double() for mean in means(updates))
    DW = in_place(updates)
    H = (DW @ A.T.float()).double()
    problem = CosineProblem(B, A @ A.T, H, float(DW.norm()), work.rule.options.lambda_)
    return (problem.solve(A)[0].float(),)


def best_of_rank(product: Tensor, rank: int) -> Made:
    U, S, V = torch.linalg.svd(product, full_matrices=False)
    return U[:, :rank] * S[:rank], V[:rank]


def svd_of_mean(work: Prepared) -> Made:
    """FlexLoRA: the SVD of the mean product."""
    return best_of_rank(in_place(held(work)), layer_of(work).rank)


def svd_of_product(work: Prepared) -> Made:
    """FedSVD: the SVD of Bbar A."""
    return best_of_rank(torch.mm(*means(held(work))), layer_of(work).rank)


def residual_before(work: Prepared) -> Tensor:
    (residual,) = work.current.residual.values()
    return residual.product()


def sum_of_products(work: Prepared) -> Made:
    """FLoRA: what has joined the base."""
    return (residual_before(work) + layer_of(work).scaling * in_place(held(work)),)


def averaging_error(work: Prepared) -> Made:
    """FedEx-LoRA: what has joined the base."""
    updates = held(work)
    B, A = means(updates)
    error = in_place(updates) - B @ A
    return (residual_before(work) + layer_of(work).scaling * error,)


def dense_norms(work: Prepared) -> Made:
    """HetLoRA: weights from the norms of dense products."""
    updates = held(work)
    norms = torch.stack([(u.factors.B @ u.factors.A).norm() for u in updates])
    assert isinstance(work.rule, HetLoRA)
    return means(updates, (norms / norms.sum()).tolist())[:1]


def dense_changes(updates: Updates, layer: LoraLayer) -> Tensor:
    """What every client changes of the product, (K, d_out d_in), all of them held."""
    product = layer.product().flatten()
    changes = torch.empty(len(updates), len(product), device=product.device)
    for change, u in zip(changes, updates, strict=True):
        torch.sub(u.factors.product().flatten(), product, out=change)
    return changes


def dense_distances(work: Prepared) -> Made:
    """Krum: distances between dense changes."""
    updates = held(work)
    changes = dense_changes(updates, layer_of(work))
    assert isinstance(work.rule, Krum)
    shares = work.rule.weigh((changes @ changes.T).double(), [u.share for u in updates]).shares
    chosen = updates[shares.index(1.0)].factors
    return chosen.B, chosen.A


def weighted_changes(work: Prepared) -> Made:
    """Multi-Krum, the geometric median and norm bounding: dense changes, weighted, and an SVD."""
    updates, layer = held(work), layer_of(work)
    changes = dense_changes(updates, layer)
    assert isinstance(work.rule, SurveyingRule)
    bounds = isinstance(work.rule, NormBounding)
    survey = changes.square().sum(1) if bounds else changes @ changes.T
    shares = work.rule.weigh(survey.double(), [u.share for u in updates]).shares
    made = layer.product() + (torch.tensor(shares).to(changes) @ changes).view(
        len(layer.B), layer.A.shape[1]
    )
    B, A = best_of_rank(made, layer.rank)
    return B / layer.scaling, A


def entries(work: Prepared) -> Made:
    """Coordinate median and trimmed mean: all products held and sorted, and an SVD."""
    updates = held(work)
    values = np.stack([(u.factors.B @ u.factors.A).cpu().numpy() for u in updates])
    values.sort(axis=0)
    assert isinstance(work.rule, Coordinatewise)
    f = work.rule.left_out(len(values))
    middle = torch.from_numpy(values[f : len(values) - f].mean(axis=0))
    return best_of_rank(middle.to(layer_of(work).B.device), layer_of(work).rank)


# What rules are compared by


def factor_B(made: Aggregated) -> Made:
    (layer,) = made.adapter.layers.values()
    return (layer.B,)


def factor_A(made: Aggregated) -> Made:
    (layer,) = made.adapter.layers.values()
    return (layer.A,)


def product(made: Aggregated) -> Made:
    (layer,) = made.adapter.layers.values()
    return layer.B, layer.A


def residual(made: Aggregated) -> Made:
    (layer,) = made.adapter.residual.values()
    return layer.B, layer.A


RIVALS = (
    Rival("fedavg", "all updates in a list", list_means, factor_B),
    Rival("lora-fair", "by definition", partial(corrected, by_definition), factor_B, target=True),
    Rival("lora-fair", "in place", partial(corrected, in_place), factor_B),
    Rival("lora-fair", "in place", cosine, factor_B, {"objective": "cosine"}),
    Rival("flexlora", "SVD of the mean product", svd_of_mean, product, target=True),
    Rival("fedsvd", "SVD of the product", svd_of_product, product),
    Rival("fedex-lora", "dense residual", averaging_error, residual),
    Rival("flora", "dense residual", sum_of_products, residual),
    Rival("hetlora", "dense norms", dense_norms, factor_B),
    Rival("krum", "dense distances", dense_distances, product),
    Rival("multi-krum", "dense changes, SVD", weighted_changes, product),
    Rival("geometric-median", "dense changes, SVD", weighted_changes, product),
    Rival("geometric-median", "dense changes, SVD", weighted_changes, product, {"mixing": True}),
    Rival("norm-bounding", "dense changes, SVD", weighted_changes, product),
    Rival("coordinate-median", "all products sorted, SVD", entries, product),
    Rival("trimmed-mean", "all products sorted, SVD", entries, product),
    Rival("ffa-lora", "all updates in a list", list_means, factor_B),
    Rival("fedrot-lora", "all updates in a list", list_means, factor_B),
    Rival("fedsa-lora", "all updates in a list", list_means_of_A, factor_A),
    Rival("rolora", "all updates in a list", list_means_of_A, factor_A),
)
