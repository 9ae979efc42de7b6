"""FedEx-LoRA: average the factors, and add to the base what their product lacks.

"FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Large Language Models"
Raghav Singhal, Kaustubh Ponkshe, Praneeth Vepakomma. ACL 2025. https://arxiv.org/abs/2410.09432

Clients go on from Abar = sum p_k A_k and Bbar = sum p_k B_k, as in FedAvg, and the base takes

    s (sum p_k B_k A_k - Bbar Abar) = s sum p_k (B_k - Bbar)(A_k - Abar)
                                    = s sum_{k < K} p_k (B_k - Bbar)(A_k - A_K),

so that W0 + s Bbar Abar becomes the mean of the clients' models exactly. The last sum is what is
computed here (sum p_k (B_k - Bbar) = 0): nothing cancels in it however little the clients drift
apart, and its rank is (K - 1) r at most.

Where this differs. The paper adds a dense matrix to W0; here it is kept beside the base as a frozen
low-rank pair, see `strategies.residual`, so that a quantised base can take it, and a client that
joins late gets the sum of all rounds. Its compression is measured against the energy of Bbar Abar
and of the residual together. s stands inside the residual: ports that leave it out are wrong by a
factor of alpha / r. A server optimiser would move Abar and Bbar away from what the residual was
taken against, so there is none.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedgraft.config import Config
from fedgraft.errors import ConfigError
from strategies.means import weighted_mean
from strategies.residual import ResidualOptions, grown
from strategies.rule import (
    Capabilities,
    LayerContext,
    LayerResult,
    PerClientRule,
    WeightedLayer,
)


class FedExLoRA(PerClientRule):
    """Average A and B, and let the base take the averaging error."""

    name = "fedex-lora"
    title = "FedEx-LoRA"
    citation = "Singhal et al., ACL 2025, arXiv:2410.09432"
    capabilities = Capabilities(sum_only=False, exact=True, base_residual=True, dora=False)
    Options = ResidualOptions
    options: ResidualOptions

    def check(self, config: Config) -> None:
        """Refuse to compress a residual that must take the first product away exactly.

        Raises:
            ConfigError: adapter.init leaves a part of the base in the factors, and strategy.energy
                or strategy.max-rank allow an error relative to it.
        """
        lossy = self.options.energy < 1.0 or self.options.max_rank is not None
        if config.adapter.init in ("pissa", "olora") and lossy:
            raise ConfigError(
                f'adapter.init is "{config.adapter.init}", whose product the residual must take '
                "away exactly, and strategy.energy or strategy.max-rank compress it",
                'Leave both out, or set adapter.init to "default".',
            )

    def combine(self, updates: Sequence[WeightedLayer], context: LayerContext) -> LayerResult:
        """Return the means, and the residual with this round's averaging error added."""
        mean = weighted_mean((u.share, {"A": u.factors.A, "B": u.factors.B}) for u in updates)
        A, B = mean["A"], mean["B"]
        scaling, last = context.current.scaling, updates[-1].factors.A
        # float32 holds a difference to 6e-8 of itself, however small it is
        terms = [
            (scaling * u.share, (u.factors.B - B).float(), u.factors.A - last) for u in updates[:-1]
        ]
        held = scaling**2 * float(((B.T @ B) * (A @ A.T)).sum())  # ||s Bbar Abar||^2
        residual = grown(context.residual, terms, self.options, beside=held)
        return LayerResult(context.current.with_factors(mean), residual=residual)
