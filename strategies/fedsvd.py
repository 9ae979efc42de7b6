"""FedSVD: freeze A for a round, average B, and let a decomposition of B A choose the next A.

"FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA"
Seanie Lee, Sangwoo Park, Dong Bok Lee, Dominik Wagner, Haebin Seong, Tobias Bocklet, Juho Lee, Sung
Ju Hwang. NeurIPS 2025. https://arxiv.org/abs/2505.12805

Clients hold the same A and train B, so the mean of B is exact, as in FFA-LoRA, and with noise on
the updates there is no product of two noises. But A does not stay what it was drawn as: with
U S V^T the singular value decomposition of Bbar A (rank r at most), the next round starts from

    A = V^T,  B = U S,

the same product, with the directions learned so far as the rows of A and all of them of length 1.
The decomposition needs nothing that is not already released, so it costs no privacy.

Bbar A is never formed: two QR decompositions and an SVD of r x r give it. Directions of A that B
does not use stay among its rows, since B cannot grow into rows of zeros; an SVD of the dense
product leaves arbitrary vectors there. A must be sent to the clients with every new basis. The
official code can decompose every n rounds only (`strategy.period`; its scripts use 1).
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from fedgraft.config import Config
from strategies.fedavg import keep_mean
from strategies.ffa_lora import factor_b
from strategies.local import B_ONLY
from strategies.low_rank import orthonormal_rows
from strategies.options import RuleOptions
from strategies.refusals import refuse_kept_optimizer, refuse_lr_ratio
from strategies.rule import Capabilities, LayerContext, LayerResult, Phase, Plan, SumOnlyRule


class FedSVDOptions(RuleOptions):
    """Options of FedSVD.

    Attributes:
        period: a new basis every so many rounds.
    """

    period: Annotated[int, Field(gt=0)] = 1


class FedSVD(SumOnlyRule):
    """Average B over a shared A, then turn the product so that A's rows are orthonormal."""

    name = "fedsvd"
    title = "FedSVD"
    citation = "Lee et al., NeurIPS 2025, arXiv:2505.12805"
    capabilities = Capabilities(sum_only=True, exact=True)
    Options = FedSVDOptions
    options: FedSVDOptions

    def check(self, config: Config) -> None:
        """Refuse to keep optimizers: B is of another basis in the next round.

        Raises:
            ConfigError: `train.optimizer-state` is "keep", or train.lr-ratio is set.
        """
        refuse_lr_ratio(config, self.name, "never trains A")
        refuse_kept_optimizer(config, self.name, "the basis of B and A is remade")

    def plan(self, round: int) -> Plan:
        """Return what the paper asks for: B trains and goes up, both factors go down."""
        return Plan(train=B_ONLY)

    def phases(self, round: int) -> tuple[Phase, ...]:
        """Return the one phase: the mean of B."""
        return (Phase("mean of B", factor_b, keep_mean),)

    def conclude(self, context: LayerContext) -> LayerResult:
        """Return U S and V^T of Bbar A; in rounds between two bases, Bbar and the same A."""
        made = context.current.with_factors(context.shared)
        if context.round % self.options.period == 0:
            B, A = orthonormal_rows(made.B, made.A)
            made = made.with_factors({"A": A, "B": B})
        return LayerResult(made)
