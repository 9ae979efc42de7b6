"""FLoRA: stack the clients' factors, add their product to the base, and start afresh.

"FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations"
Ziyao Wang, Zheyu Shen, Yexiao He, Guoheng Sun, Hongyi Wang, Lingjuan Lyu, Ang Li. NeurIPS 2024.
https://arxiv.org/abs/2409.05976

With B = [B_1 ... B_K] and A = [p_1 s_1 A_1; ...; p_K s_K A_K] stacked, B A is

    DW = sum p_k s_k B_k A_k,

without cross terms and for any ranks. It joins the base, and the next round trains a new adapter: A
random, B = 0. Every round thus starts cold, in a new random subspace.

Where this differs. The scaling s_k = alpha / r_k stands inside the sum (here it is folded into B_k
before the rule sees it); public ports forget it, or take the server's. The base's weights are not
written: DW is kept beside them as a frozen low-rank pair, see `strategies.residual`, so that a
quantised base and late joiners can have it. The new A is drawn once for all clients; those of a
smaller rank get its first rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedgraft.config import Config
from strategies.fresh import fresh_A
from strategies.refusals import refuse_init, refuse_kept_optimizer
from strategies.residual import ResidualOptions, grown
from strategies.rule import (
    Capabilities,
    LayerContext,
    LayerResult,
    PerClientRule,
    WeightedLayer,
)


class FLoRA(PerClientRule):
    """Add the exact mean of products to the base and train a new adapter each round."""

    name = "flora"
    title = "FLoRA"
    citation = "Wang et al., NeurIPS 2024, arXiv:2409.05976"
    capabilities = Capabilities(
        sum_only=False,
        exact=True,
        mixed_ranks=True,
        base_residual=True,
        dora=False,
        any_start=False,
    )
    Options = ResidualOptions
    options: ResidualOptions

    def check(self, config: Config) -> None:
        """Refuse to keep optimizers, and another first A: A and B are new in every round.

        Raises:
            ConfigError: `train.optimizer-state` is "keep", or adapter.init is set.
        """
        refuse_init(config, self.name, "draws new factors after every round")
        refuse_kept_optimizer(config, self.name, "every round trains new factors")

    def combine(self, updates: Sequence[WeightedLayer], context: LayerContext) -> LayerResult:
        """Return a new random A with B = 0, and the residual with DW added."""
        terms = [(u.share * u.factors.scaling, u.factors.B, u.factors.A) for u in updates]
        new = {"A": fresh_A(context, self.name), "B": torch.zeros_like(context.current.B)}
        residual = grown(context.residual, terms, self.options)
        return LayerResult(context.current.with_factors(new), residual=residual)
