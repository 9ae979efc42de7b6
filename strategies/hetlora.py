"""HetLoRA: clients of different ranks that prune themselves, weighed by how much they learned.

"Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models"
Yae Jee Cho, Luyang Liu, Zheng Xu, Aldi Fahrezi, Gauri Joshi. EMNLP 2024.
https://arxiv.org/abs/2401.06432

Server. Clients of a smaller rank start from the first rows of the global A and the first columns of
B; what they send is padded with zeros to the server's rank, and averaged with weights

    p_k = ||dW_k|| / sum_j ||dW_j||,   dW_k = s_k B_k A_k over all layers (Frobenius norm),

in place of n_k / sum n: an update of small norm is taken to hold little, as one of small rank does.
||s_k B_k A_k||^2 = s_k^2 <B_k^T B_k, A_k A_k^T> comes from r x r products. Extras, which the paper
has none of, are averaged with the same weights but do not count in them.

Client. It adds to its loss, with g = gamma r_k rounded down,

    lambda sum over layers ||B_k[:, g:]|| ||A_k[g:, :]||,

and where that sum (without lambda) is smaller after training than before, it drops these ranks and
has rank g from then on (`strategy.min-rank` at least). gamma near 1 drops one rank at a time; gamma
= 1 or lambda = 0 switch the penalty off, gamma = 1 pruning too.

Where this differs. A client that prunes rescales B, so that the product it keeps is the one that it
trained, although alpha / r is larger for its new rank. Where no client has learned anything (all
norms are 0) weights are by examples. Ranks that no client of a round has stay as they are: with A
and B both zero they would never get a gradient again.

Averaging with padding shrinks what only large clients hold, and a norm can be inflated: this is not
a rule for clients that are not trusted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fedgraft.adapter import Tensors, factor_name, parse_factor
from fedgraft.config import Config
from fedgraft.errors import ConfigError
from strategies.local import LocalUpdate, LocalWork
from strategies.means import weighted_mean
from strategies.options import RuleOptions
from strategies.ranks import cut_factor, ranks_of
from strategies.rule import (
    Capabilities,
    ExtraContext,
    LayerContext,
    LayerResult,
    SurveyingRule,
    Weighing,
    WeightedExtra,
    WeightedLayer,
)


class HetLoRAOptions(RuleOptions):
    """Options of HetLoRA.

    Attributes:
        gamma: the share of its ranks that a client keeps when it prunes; 1 never prunes.
        lambda_: the weight of the penalty on the ranks that would go, written `strategy.lambda`.
        min_rank: no client prunes itself below this.
    """

    gamma: Annotated[float, Field(gt=0.0, le=1.0)] = 0.99
    lambda_: Annotated[float, Field(ge=0.0)] = 0.01
    min_rank: Annotated[int, Field(gt=0)] = 1


class HetLoRA(SurveyingRule):
    """Average padded factors, weighed by the norms of whole updates; clients prune their ranks."""

    name = "hetlora"
    title = "HetLoRA"
    citation = "Cho et al., EMNLP 2024, arXiv:2401.06432"
    capabilities = Capabilities(sum_only=False, mixed_ranks=True, any_start=False)
    Options = HetLoRAOptions
    options: HetLoRAOptions
    prunes = True

    def check(self, config: Config) -> None:
        """Refuse a least rank that no client reaches.

        Raises:
            ConfigError: strategy.min-rank is above adapter.rank.
        """
        if self.options.min_rank > config.adapter.rank:
            raise ConfigError(
                f"strategy.min-rank is {self.options.min_rank}, and adapter.rank is "
                f"{config.adapter.rank}: no client would ever prune",
                "Lower it, or set strategy.gamma=1, which switches pruning off.",
            )

    # On the client

    def local(self, work: LocalWork) -> LocalUpdate:
        """Train with the penalty on the last ranks, and drop them when they have shrunk."""
        own = max(ranks_of(work.start).values())
        least = min(self.options.min_rank, own)
        kept = max(int(self.options.gamma * own + 1e-9), least)  # 0.29 * 100 is below 29
        if kept == own:
            return super().local(work)
        penalty = self.options.lambda_

        def penalised(parameters: Mapping[str, Tensor]) -> Tensor:
            return penalty * tail_norm(parameters, kept)

        how = replace(work.planned, penalty=penalised if penalty else None)
        trained = work.train(work.start, how).tensors
        if tail_norm(trained, kept) < tail_norm(work.start, kept):
            trained = _pruned(trained, kept, work)
        return LocalUpdate(trained)

    # On the server

    def survey(self, updates: Sequence[WeightedLayer], context: LayerContext) -> Tensor:
        """Return ||s_k B_k A_k||^2 (K) for one layer, float64."""
        squares = []
        for u in updates:
            A, B = u.factors.A.double(), u.factors.B.double()
            product = ((B.T @ B) * (A @ A.T)).sum().clamp(min=0.0)
            squares.append(u.factors.scaling**2 * product)
        return torch.stack(squares)

    def survey_extra(self, updates: Sequence[WeightedExtra], context: ExtraContext) -> Tensor:
        """Return zeros (K): extras are no low-rank update."""
        return torch.zeros(len(updates), dtype=torch.float64, device=context.current.device)

    def weigh(self, survey: Tensor, shares: Sequence[float]) -> Weighing:
        """Return shares in proportion to the norms; by examples where all norms are 0."""
        norms = survey.sqrt()
        total = float(norms.sum())
        if total == 0.0:
            return Weighing(tuple(shares), ("all updates are zero: weighted by examples",))
        return Weighing(tuple((norms / total).tolist()))

    def combine(self, updates: Sequence[WeightedLayer], context: LayerContext) -> LayerResult:
        """Return the weighted means of the padded factors; ranks nobody has stay as they are."""
        mean = weighted_mean((u.share, {"A": u.factors.A, "B": u.factors.B}) for u in updates)
        largest, current = max(u.factors.own_rank for u in updates), context.current
        mean["A"][largest:] = current.A[largest:].double()
        mean["B"][:, largest:] = current.B[:, largest:].double()
        return LayerResult(current.with_factors(mean))


def tail_norm(tensors: Mapping[str, Tensor], kept: int) -> Tensor:
    """Return the sum over layers of ||B[:, kept:]|| ||A[kept:, :]||.

    Args:
        tensors: factors by name, of any rank above `kept`; zeros that pad them change nothing.
        kept: the ranks that are no part of the tail.
    """
    total: Tensor | float = 0.0
    for name, A in tensors.items():
        parsed = parse_factor(name)
        if parsed is not None and parsed[1] == "A":
            B = tensors[factor_name(parsed[0], "B")]
            total = total + torch.linalg.norm(B[:, kept:]) * torch.linalg.norm(A[kept:])
    return torch.as_tensor(total)


def _pruned(tensors: Tensors, kept: int, work: LocalWork) -> Tensors:
    """Return the first ranks of all factors, B rescaled to the scaling of that rank."""
    made: Tensors = {}
    for name, tensor in tensors.items():
        parsed = parse_factor(name)
        made[name] = cut_factor(name, tensor, kept)
        if parsed is not None and parsed[1] == "B":
            made[name] = made[name] * (work.scalings[parsed[0]] / work.scaling_at(kept))
    return made
