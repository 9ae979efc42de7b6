"""Norm bounding: no client changes the model by more than a bound.

"Can You Really Backdoor Federated Learning?"
Ziteng Sun, Peter Kairouz, Ananda Theertha Suresh, H. Brendan McMahan. 2019.
https://arxiv.org/abs/1911.07963 (section 4)

An attacker that wants to replace the model must send a large update, so each update is clipped
before they are averaged. With D_k what client k changes of the products (`strategies.robust`) and
||D_k|| its norm over the whole adapter,

    D = sum w_k D_k min(1, M / ||D_k||).

M is `strategy.norm`, or, when unset, the median of the round's norms, which clients cannot raise
beyond honest norms while fewer than half of them are hostile (the paper takes M from what honest
clients send). Clipping bounds what an attack can do in one round; it does not find the attacker,
so signs turned at an honest norm pass. It costs little where nobody is hostile.

The paper may add a little Gaussian noise to the mean; that is left to the privacy settings. It
weighs by examples; see `strategy.weights` for why equal is the default here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from strategies.gram import norms_of_changes
from strategies.robust import Surveyed, WeightOptions
from strategies.rule import ExtraContext, LayerContext, Weighing, WeightedExtra, WeightedLayer


class NormBoundingOptions(WeightOptions):
    """Options of norm bounding.

    Attributes:
        norm: M, the largest norm of a client's change of the whole adapter, products with their
            scaling and extras; the (lower) median of the round's norms when unset.
    """

    norm: Annotated[float, Field(gt=0.0)] | None = None


class NormBounding(Surveyed):
    """Average the clients' changes, each clipped to a norm."""

    name = "norm-bounding"
    title = "Norm bounding"
    citation = "Sun et al. 2019, arXiv:1911.07963"
    Options = NormBoundingOptions
    options: NormBoundingOptions

    def survey(self, updates: Sequence[WeightedLayer], context: LayerContext) -> Tensor:
        """Return one layer's part of ||D_k||^2, (K)."""
        return norms_of_changes([update.factors for update in updates], context.current)

    def survey_extra(self, updates: Sequence[WeightedExtra], context: ExtraContext) -> Tensor:
        """Return one extra's part of ||D_k||^2, (K)."""
        changes = (update.value.double() - context.current.double() for update in updates)
        return torch.stack([change.square().sum() for change in changes])

    def weigh(self, survey: Tensor, shares: Sequence[float]) -> Weighing:
        """Return each client's weight times min(1, M / ||D_k||)."""
        norms = survey.sqrt()
        bound = norms.median() if self.options.norm is None else self.options.norm
        # a client that changed nothing is within any bound
        kept = torch.where(norms > bound, bound / norms, 1.0)
        weights = self.options.weights_of(shares).to(survey.device)
        return Weighing(tuple((weights * kept).tolist()))
