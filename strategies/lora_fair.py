"""LoRA-FAIR: correct Bbar so that the product of the means comes closer to the mean product.

"LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement"
Jieming Bian, Lei Wang, Letian Zhang, Jie Xu. ICCV 2025. https://arxiv.org/abs/2411.14961

The paper minimises, over a correction dB of the server's mean Bbar,

    S(DW, (Bbar + dB) Abar) + lambda ||dB||,

S a cosine dissimilarity, by gradient descent, and sends Abar and Bbar + dB to the clients. This
file has the Frobenius form of it, our default, in closed form; `strategies.lora_fair_cosine` has
the paper's cosine. With R = DW - Bbar Abar, G = Abar Abar^T (r, r) and X = dB:

    minimise ||R - X Abar||_F^2 + lambda ||X||_F^2,   X = R Abar^T (G + lambda I)^-1.

R Abar^T (d_out, r) comes from a weighted sum of what each client can compute once it knows both
means, so the rule needs sums only, in two phases:

    1. Abar = sum p_k A_k,  Bbar = sum p_k B_k
    2. R Abar^T = sum p_k (B_k - Bbar) [(A_k - Abar) Abar^T]

Centred like this it holds in float32 however little the clients drift apart; sum p_k B_k (A_k
Abar^T) - Bbar G is the same on paper and cancels. Nothing of size d_out x d_in is ever formed.

lambda is not free of scale (a Kaiming-initialised A has G about I/3), so the ridge takes it
relative to the mean eigenvalue of G: lambda = strategy.lambda * trace(G) / r. Only the part of R in
the row space of Abar can be repaired.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field

from fedgraft.adapter import LoraLayer, Tensors
from strategies.fedavg import MEANS
from strategies.lora_fair_cosine import corrected_by_cosine
from strategies.options import RuleOptions, SteppedOptions
from strategies.ridge import RIDGE_LAMBDA, ridge_correction
from strategies.rule import (
    Capabilities,
    LayerContext,
    LayerResult,
    PerClientRule,
    Phase,
    Rule,
    SumOnlyRule,
    WeightedLayer,
)


class LoRAFairOptions(SteppedOptions):
    """Options of LoRA-FAIR.

    Attributes:
        objective: `ridge`, the Frobenius form, or `cosine`, the paper's.
        lambda_: the paper's lambda, written `strategy.lambda`: relative to trace(G) / r for the
            ridge, absolute for the cosine (where 0.01 is the paper's own).
    """

    objective: Literal["ridge", "cosine"] = "ridge"
    lambda_: Annotated[float, Field(ge=0.0)] = RIDGE_LAMBDA


def centred_residual(update: LoraLayer, context: LayerContext) -> Tensors:
    """What a client adds in phase 2: (B_k - Bbar) [(A_k - Abar) Abar^T], of shape (d_out, r)."""
    A, B = context.shared["A"], context.shared["B"]
    return {"residual": (update.B - B) @ ((update.A - A) @ A.T)}


def no_residual(context: LayerContext) -> Tensors:
    """What phase 2 is measured from: nothing, since its products are centred as they stand."""
    return {"residual": torch.zeros_like(context.current.B)}


class LoRAFair(SumOnlyRule):
    """Average A and B, then correct Bbar by ridge regression on the averaging error."""

    name = "lora-fair"
    title = "LoRA-FAIR"
    citation = "Bian et al., ICCV 2025, arXiv:2411.14961"
    capabilities = Capabilities(sum_only=True, server_optimizer=True)
    Options = LoRAFairOptions
    options: LoRAFairOptions

    @classmethod
    def build(cls, options: RuleOptions) -> Rule:
        """Return the rule of `strategy.objective`: this one, or the paper's cosine."""
        cosine = isinstance(options, LoRAFairOptions) and options.objective == "cosine"
        return LoRAFairCosine(options) if cosine else cls(options)

    def phases(self, round: int) -> tuple[Phase, ...]:
        """Return the two phases: the means, then the centred residual and the corrected B."""
        return (MEANS, Phase("residual", centred_residual, self._corrected, no_residual))

    def _corrected(self, mean: Tensors, context: LayerContext) -> Tensors:
        correction = ridge_correction(mean["residual"], context.shared["A"], self.options.lambda_)
        return {"B": context.shared["B"] + correction}


class LoRAFairCosine(PerClientRule):
    """Average A and B, then correct Bbar by the paper's cosine objective."""

    name = LoRAFair.name
    title = "LoRA-FAIR (cosine)"
    citation = LoRAFair.citation
    capabilities = Capabilities(sum_only=False, server_optimizer=True)
    Options = LoRAFairOptions
    options: LoRAFairOptions

    def combine(self, updates: Sequence[WeightedLayer], context: LayerContext) -> LayerResult:
        """Return Abar and the corrected Bbar, with a note where the cosine had no safe optimum."""
        factors, notes = corrected_by_cosine(updates, self.options.lambda_)
        return LayerResult(context.current.with_factors(factors), notes=notes)
