"""FlexLoRA: average the products, and cut their sum to every client's rank by an SVD.

"Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources"
Jiamu Bai, Daoyuan Chen, Bingchen Qian, Liuyi Yao, Yaliang Li. NeurIPS 2024.
https://arxiv.org/abs/2402.11505

DW = sum p_k s_k B_k A_k = U S V^T, and a client of rank r_i goes on from

    B = U_{r_i} S_{r_i} / s_i,  A = V_{r_i}^T,

the best approximation of DW that it can hold. The server keeps the one of its own rank, whose first
rows are those of every smaller one. s_k = alpha / r_k is inside the sum and divided out again, in
the factors that the rule sees; ports that forget it give small clients too much or too little.

The paper forms the dense DW. Here its decomposition comes from the stacked factors: exactly up to a
few hundred columns, by a randomised SVD above (`strategies.low_rank`).

`strategy.rank-aware` weighs every rank slice by the clients that contributed to it,

    DW = sum_k sum_{i <= r_k} (p_k / sum_{j: r_j >= i} p_j) s_k B_k[:, i] A_k[i, :],

after "Preventing Rank Collapse in Federated Low-Rank Adaptation with Client Heterogeneity"
Fei Wu, Jia Hu, Geyong Min, Shiqiang Wang. 2026. https://arxiv.org/abs/2602.13486 (raFLoRA): with
p_k alone the directions that only large clients train shrink in each round, until the energy of the
global adapter sits in the smallest client's rank. Slices are comparable since every client starts
from the first rows of one ordered basis.

The basis is remade in each round, so there is no server optimiser. Where DW has fewer directions
than the server's rank, the free rows of A are drawn anew, with B = 0 there: rows of zeros on both
sides could never learn again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedgraft.config import Config
from strategies.fresh import fresh_A
from strategies.low_rank import Term, best_rank
from strategies.options import RuleOptions
from strategies.refusals import refuse_kept_optimizer
from strategies.rule import (
    Capabilities,
    LayerContext,
    LayerResult,
    PerClientRule,
    WeightedLayer,
)


class FlexLoRAOptions(RuleOptions):
    """Options of FlexLoRA.

    Attributes:
        rank_aware: weigh every rank slice by the clients that contributed to it; the same as the
            paper's weights where all ranks are equal.
    """

    rank_aware: bool = False


class FlexLoRA(PerClientRule):
    """Keep the best approximation of the mean of products, in a basis ordered by importance."""

    name = "flexlora"
    title = "FlexLoRA"
    citation = "Bai et al., NeurIPS 2024, arXiv:2402.11505"
    capabilities = Capabilities(sum_only=False, mixed_ranks=True)
    Options = FlexLoRAOptions
    options: FlexLoRAOptions

    def check(self, config: Config) -> None:
        """Refuse to keep optimizers: both factors are of another basis in the next round.

        Raises:
            ConfigError: `train.optimizer-state` is "keep".
        """
        refuse_kept_optimizer(config, self.name, "the basis of B and A is remade")

    def combine(self, updates: Sequence[WeightedLayer], context: LayerContext) -> LayerResult:
        """Return U S and V^T of DW, of the server's rank."""
        terms = _by_slices(updates) if self.options.rank_aware else _by_clients(updates)
        B, A = best_rank(terms, context.current.rank)
        unused = ~A.any(1)
        if bool(unused.any()):
            A[unused] = fresh_A(context, self.name).double()[unused]
        return LayerResult(context.current.with_factors({"A": A, "B": B}))


def _by_clients(updates: Sequence[WeightedLayer]) -> list[Term]:
    return [(u.share, u.factors.B, u.factors.A) for u in updates]


def _by_slices(updates: Sequence[WeightedLayer]) -> list[Term]:
    """Return terms in which each slice's weights add up to 1 over those who have the slice."""
    rank = updates[0].factors.rank
    total = torch.zeros(rank, dtype=torch.float64)
    for u in updates:
        total[: u.factors.own_rank] += u.share
    return [
        (u.share, u.factors.B[:, :own] / total[:own].to(u.factors.B.device), u.factors.A[:own])
        for u in updates
        if (own := u.factors.own_rank)
    ]
