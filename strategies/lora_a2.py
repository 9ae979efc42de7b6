"""LoRA-A2: alternate between the factors, and let every client spend its ranks where they matter.

"Towards Robust and Efficient Federated Low-Rank Adaptation with Heterogeneous Clients"
Jabin Koo, Minwoo Jang, Jungseul Ok. ACL 2025. https://arxiv.org/abs/2410.22815

Alternating freeze: one round trains B with A frozen and common to all, the next A with B frozen, B
first (it starts from zero, and A would get no gradient). The mean of the moving factor then is the
exact mean of the updates, as in FFA-LoRA, and yet both factors move.

Adaptive rank selection: the adapter's rank r is a pool, of which a client may send only
`strategy.budget` ranks a module, on average over its N modules. It trains for one epoch to see what
matters, scores rank i of every module by how much it changed the product,

    S_i = ||dB[:, i] A[i, :]||_F = ||dB[:, i]|| ||A[i, :]||,   or ||B[:, i]|| ||dA[i, :]||,

keeps the budget * N ranks of the highest scores over ALL modules together, goes back to the factors
that it received, and trains with everything else masked. Clients of different data choose different
ranks and collide less; modules that need more get more.

What is not selected does not change, so differences travel and zeros cost a bit
(`Plan.sparse`); the server adds sum p_k dB_k, or sum p_k dA_k. The learning rate of B is
`strategy.lr-ratio` = 5 times that of A, which is `train.lr`.

The paper's text does not say whether training goes on from the scoring epoch or starts again, and
its code is not public. It starts again here: what the masked ranks learned in that epoch would be
part of the model that the others train against, and is thrown away. The epoch is paid for in time,
not in bytes; `strategy.scoring-epochs` shortens it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field
from torch import Tensor

from fedgraft.adapter import LoraLayer, Tensors, factor_name
from fedgraft.config import Config
from fedgraft.errors import ConfigError
from strategies.fedavg import keep_mean
from strategies.local import A_ONLY, B_ONLY, LocalUpdate, LocalWork, Training
from strategies.options import RuleOptions
from strategies.refusals import refuse_kept_optimizer, refuse_lr_ratio
from strategies.rule import Capabilities, LayerContext, Phase, Plan, SumOnlyRule
from strategies.selection import largest

_Above0 = Annotated[float, Field(gt=0.0)]


class LoRAA2Options(RuleOptions):
    """Options of LoRA-A2.

    Attributes:
        budget: ranks a module that a client may train and send, on average over modules.
        lr_ratio: the learning rate of B over that of A.
        scoring_epochs: passes over the client's data before ranks are chosen.
    """

    budget: _Above0 = 2.0
    lr_ratio: _Above0 = 5.0
    scoring_epochs: _Above0 = 1.0


def rank_scores(
    moving: str, start: Mapping[str, Tensor], moved: Mapping[str, Tensor], layer: str
) -> Tensor:
    """Return S (r), how much each rank of a layer changed the product.

    Args:
        moving: the factor that trained, "A" or "B".
        start: the factors that training started from, by tensor name.
        moved: what training made of the moving one.
        layer: the layer's name.
    """
    frozen = "A" if moving == "B" else "B"
    name = factor_name(layer, moving)
    change = moved[name].double() - start[name].double()
    other = start[factor_name(layer, frozen)].double()
    scores: Tensor = change.norm(dim=_across(moving)) * other.norm(dim=_across(frozen))
    return scores


class LoRAA2(SumOnlyRule):
    """Train B, then A, in turn, and of each only the ranks that matter to the client."""

    name = "lora-a2"
    title = "LoRA-A2"
    citation = "Koo et al., ACL 2025, arXiv:2410.22815"
    capabilities = Capabilities(sum_only=True, exact=True, mixed_ranks=True, one_training=False)
    Options = LoRAA2Options
    opens = True
    options: LoRAA2Options

    def check(self, config: Config) -> None:
        """Refuse a budget above the pool, and to keep optimizers.

        Raises:
            ConfigError: the budget is more than the adapter's rank, `train.optimizer-state` is
                "keep", or train.lr-ratio is set.
        """
        refuse_lr_ratio(config, self.name, "has a ratio of its own, strategy.lr-ratio")
        refuse_kept_optimizer(config, self.name, "factors and ranks take turns")
        budget, pool = self.options.budget, config.adapter.rank
        if budget > pool:
            raise ConfigError(
                f"strategy.budget is {budget:g}, but modules have adapter.rank = {pool} ranks",
                "Raise adapter.rank, the pool to choose from, or lower strategy.budget; rolora "
                "trains all ranks in the same turns.",
            )

    def plan(self, round: int) -> Plan:
        """Return the round's moving factor: B in odd rounds, A in even ones."""
        return Plan(train=B_ONLY if round % 2 else A_ONLY, sparse=True)

    def local(self, work: LocalWork) -> LocalUpdate:
        """Score all ranks, then train the best of them from where the round started."""
        (moving,) = work.plan_factors
        rates = {"B": self.options.lr_ratio}
        scoring = Training(
            work.plan_factors,
            work.plan_extras,
            rates=rates,
            epochs=self.options.scoring_epochs,
        )
        moved = work.train(work.start, scoring).tensors
        scores = {layer: rank_scores(moving, work.start, moved, layer) for layer in work.scalings}
        chosen = largest(scores, max(1, round(self.options.budget * len(scores))))
        masks = {
            name: mask.unsqueeze(_across(moving)).expand(work.start[name].shape)
            for layer, mask in chosen.items()
            for name in [factor_name(layer, moving)]
        }
        training = Training(work.plan_factors, work.plan_extras, rates=rates, masks=masks)
        return LocalUpdate(work.train(work.start, training).tensors)

    def phases(self, round: int) -> tuple[Phase, ...]:
        """Return the one phase: the mean of the moving factor."""
        (moving,) = self.plan(round).train

        def contribute(update: LoraLayer, context: LayerContext) -> Tensors:
            """What a client adds to the mean: the moving factor, most of it as it was."""
            return {moving: getattr(update, moving)}

        return (Phase(f"mean of {moving}", contribute, keep_mean),)


def _across(factor: str) -> int:
    """Return the axis of a factor that is not its ranks': rows of A and columns of B are ranks."""
    return 1 if factor == "A" else 0
