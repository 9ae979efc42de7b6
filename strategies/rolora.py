"""RoLoRA: train and average B in one round, A in the next.

"Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA"
Shuangyi Chen, Yuanxin Guo, Yue Ju, Harik Dalal, Zhongwen Zhu, Ashish Khisti. NeurIPS 2025.
https://arxiv.org/abs/2502.01755

In a round all clients hold the same frozen factor and train the other one, so the mean of the
moving factor is the exact mean of products,

    sum p_k B_k A = Bbar A   in the first round, the third, ...,
    sum p_k B A_k = B Abar   in the second, the fourth, ...,

half of the bytes come up, and both factors learn, which FFA-LoRA's A does not. B moves first: B = 0
leaves A without a gradient. Both factors go down, since a client that was not sampled in the last
round does not have its result.

A server optimiser keeps buffers for each factor and steps the moving one. A client's optimizer
starts afresh in each round.
"""

from __future__ import annotations

from fedgraft.adapter import LoraLayer, Tensors
from fedgraft.config import Config
from strategies.fedavg import keep_mean
from strategies.ffa_lora import factor_b
from strategies.local import A_ONLY, B_ONLY
from strategies.options import SteppedOptions
from strategies.refusals import refuse_kept_optimizer
from strategies.rule import Capabilities, LayerContext, Phase, Plan, SumOnlyRule


def factor_a(update: LoraLayer, context: LayerContext) -> Tensors:
    """What a client adds to the mean: its A (r, d_in)."""
    return {"A": update.A}


class RoLoRA(SumOnlyRule):
    """Alternate between the factors: B moves in odd rounds, counted from 1, and A in even ones."""

    name = "rolora"
    title = "RoLoRA"
    citation = "Chen et al., NeurIPS 2025, arXiv:2502.01755"
    capabilities = Capabilities(sum_only=True, exact=True, server_optimizer=True)
    Options = SteppedOptions
    opens = True

    def check(self, config: Config) -> None:
        """Refuse to keep optimizers: what a client kept is of the other factor.

        Raises:
            ConfigError: `train.optimizer-state` is "keep".
        """
        why = "a factor trains in every other round, after the other one has moved"
        refuse_kept_optimizer(config, self.name, why)

    def plan(self, round: int) -> Plan:
        """Return the round's moving factor."""
        return Plan(train=B_ONLY if _moves_b(round) else A_ONLY)

    def phases(self, round: int) -> tuple[Phase, ...]:
        """Return the one phase: the mean of the moving factor."""
        if _moves_b(round):
            return (Phase("mean of B", factor_b, keep_mean),)
        return (Phase("mean of A", factor_a, keep_mean),)


def _moves_b(round: int) -> bool:
    return round % 2 == 1
